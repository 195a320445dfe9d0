"""An image and a question to model inputs, and answer tokens back to text.

Crops are described by `preprocessor_config.json` of a model folder, tokens by `tokenizer.json` and
`tokenizer_config.json`. The processor's time is part of every request's latency, so results that depend on the image's
size alone are computed once per tiling.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from envs.errors import UserError
from envs.knobs import TIER_CROPS, TIERS
from envs.model.checkpoint import resolve_folder
from envs.model.config import AdaptiveMolmoEConfig
from envs.processing.image_processor import (
    AdaptiveMolmoEImageProcessor,
    ImageGeometry,
    ImageLayout,
    image_token_count,
    make_layout,
    select_tiling,
)
from envs.processing.images import ImageRef, check_size, excerpt, open_image, to_rgb
from envs.processing.prompt import prompt_text

CONFIG_FILE: Final = "preprocessor_config.json"
MODEL_CONFIG_FILE: Final = "config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
FILES: Final = (CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, MODEL_CONFIG_FILE)
IMAGE_TOKENS: Final = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
PAD_ID: Final = -1
"""Fills `input_ids` on the right, padded crops and their masks and indices."""

ImageLike = Image.Image | ImageRef | str | Path | bytes | np.ndarray[Any, Any]
Inputs = Mapping[str, Tensor]


class PromptShape(NamedTuple):
    """Size of a request: crops (the global view included), image tokens, and all prompt tokens."""

    crops: int
    image_tokens: int
    prompt_tokens: int


class AdaptiveMolmoEProcessor(ProcessorMixin):
    """Turns requests into model inputs. Make one with `from_pretrained`.

    Args:
        image_processor: how images are cut into crops, and whether the model was trained on prompt styles; if not,
            every question is asked plainly.
        tokenizer: with the four image tokens among its added tokens; its end-of-text also opens every prompt.
        max_tokens: longest prompt in tokens, images included; None for no limit.
    """

    def __init__(
        self,
        image_processor: AdaptiveMolmoEImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.geometry: ImageGeometry = image_processor.geometry
        self.max_tokens = max_tokens
        # A question that spells "<im_patch>" or "<|endoftext|>" is text, not a command to the model. The wrapper sets
        # this anew at every call, hence a copy.
        self.text_encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.text_encoder.encode_special_tokens = True
        self.eos_id = self._token_id(tokenizer.eos_token or "<|endoftext|>")
        start, end, patch, column = (self._token_id(token) for token in IMAGE_TOKENS)
        self.special_ids = (start, end, patch, column)
        self._layout = lru_cache(maxsize=256)(self._make_layout)

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, revision: str | None = None, **kwargs: Any
    ) -> "AdaptiveMolmoEProcessor":
        """The processor of a model folder, a hub id or `embedded`. Weights are neither needed nor fetched.

        `kwargs` are what transformers' Auto classes add, such as `token`.

        Raises:
            UserError: no such folder or hub model, or a file that is missing or inconsistent.
        """
        folder = resolve_folder(path_or_id, revision, FILES, kwargs)
        try:
            image_processor = AdaptiveMolmoEImageProcessor(**_read_json(folder / CONFIG_FILE))
        except UserError as error:
            raise UserError(f"{folder / CONFIG_FILE}: {error.message}") from None
        config = _read_json(folder / TOKENIZER_CONFIG_FILE)
        special = {key: token["content"] if isinstance(token := config.get(key), dict) else token for key in _SPECIAL}
        path = folder / TOKENIZER_FILE
        try:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"cannot read {path}: {error}; give a folder with the published tokenizer files") from None
        return cls(image_processor, tokenizer, _max_tokens(folder))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Writes `preprocessor_config.json` and the tokenizer's files, as published."""
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.image_processor, self.tokenizer, self.max_tokens)

    def __call__(
        self, images: ImageLike | None = None, text: str = "", tier: str = "high", style: str | None = None
    ) -> BatchFeature:
        """Model inputs of one request, batch size 1.

        Args:
            images: an image, a reference to one, a path, the bytes of a file, or 8-bit pixels (H, W), (H, W, 3) or
                (H, W, 4); None for a text-only request.
            text: the question as asked, options of a multiple-choice question included (see `with_options`).
            tier: `low`, `medium` or `high`: at most 3, 6 or 12 crops.
            style: prompt style such as `vqa2`; None for a plain question.

        Returns:
            `input_ids` (1, T) int64 and, with an image, `images` (1, crops, patches, pixels) float32, `image_masks`
            (1, crops, patches) float32 and `image_input_idx` (1, crops, tokens per crop) int64.

        Raises:
            UserError: an unknown tier, an image that cannot be read, or a prompt longer than the model takes.
        """
        question = self.prompt_ids(text, style)
        if images is None:
            self._check_length(0, 1 + len(question))
            return BatchFeature({"input_ids": torch.tensor([[self.eos_id, *question]])})
        rgb = _load(images)
        tiling = self.tiling(rgb.size, tier)
        layout = self._layout(tiling)
        self._check_length(len(layout.ids), 1 + len(question))
        crops = self.image_processor.preprocess(rgb, tiling)
        ids = np.concatenate([[self.eos_id], layout.ids, question])
        input_ids, input_idx = (torch.from_numpy(n.astype(np.int64))[None] for n in (ids, layout.input_idx))
        return BatchFeature({"input_ids": input_ids, **crops, "image_input_idx": input_idx})

    def tiling(self, size_wh: tuple[int, int], tier: str = "high") -> tuple[int, int]:
        """Rows and columns of crops that an image of this width and height gets at a tier."""
        if tier not in TIER_CROPS:
            raise UserError(f"tier {tier!r} is not allowed: choose one of {', '.join(TIERS)}")
        check_size(size_wh)
        return select_tiling(self.geometry, (int(size_wh[0]), int(size_wh[1])), TIER_CROPS[tier])

    def shape(self, size_wh: tuple[int, int] | None, tier: str, question: str, style: str | None = None) -> PromptShape:
        """Counts of a request without decoding its image; `size_wh` is None for a text-only request."""
        text = 1 + len(self.prompt_ids(question, style))
        if size_wh is None:
            self._check_length(0, text)
            return PromptShape(0, 0, text)
        tiling = self.tiling(size_wh, tier)
        image_tokens = image_token_count(self.geometry, tiling)
        self._check_length(image_tokens, text)
        return PromptShape(1 + tiling[0] * tiling[1], image_tokens, image_tokens + text)

    def prompt_ids(self, question: str, style: str | None = None) -> list[int]:
        """Token ids of ` User: {style}: {question} Assistant:`, without the opening end-of-text token."""
        return self.encode(prompt_text(question, style if self.image_processor.prompt_styles else None))

    def question_ids(self, question: str) -> list[int]:
        """Token ids of the question alone, with the leading space it has in a prompt."""
        return self.encode(f" {question}")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Control tokens spelled out in it stay text."""
        try:
            return list(self.text_encoder.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError):  # a lone surrogate cannot be passed on as UTF-8
            raise UserError(f"the text {excerpt(text)} is not valid Unicode: give it as UTF-8") from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The answer text of generated token ids up to end-of-text, without control tokens or outer spaces."""
        ids = [int(i) for i in token_ids if int(i) >= 0]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return str(self.text_encoder.decode(ids, skip_special_tokens=True)).strip()

    def _check_length(self, image_tokens: int, text_tokens: int) -> None:
        """Refuse prompts beyond the positions that the model was trained for, before anything runs."""
        total = image_tokens + text_tokens
        if self.max_tokens is not None and total > self.max_tokens:
            raise UserError(
                f"the prompt is {total:,} tokens long ({text_tokens:,} of text, {image_tokens:,} of the image), above "
                f"the model's max_sequence_length of {self.max_tokens:,}: shorten the question"
            )

    def _make_layout(self, tiling: tuple[int, int]) -> ImageLayout:
        layout = make_layout(self.geometry, tiling, self.special_ids)
        # Positions count from the start of the prompt, which the end-of-text token opens.
        return ImageLayout(layout.ids, np.where(layout.input_idx < 0, layout.input_idx, layout.input_idx + 1))

    def _token_id(self, token: str) -> int:
        token_id = self.text_encoder.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer has no token {token!r}: give a folder with the published tokenizer files")
        return int(token_id)


class MolmoProcessor(AdaptiveMolmoEProcessor):
    """The processor under the name that published files give, by which `AutoProcessor` finds it."""


MolmoEProcessor = AdaptiveMolmoEProcessor
"""The short name."""

AutoProcessor.register(AdaptiveMolmoEConfig, MolmoProcessor)


def collate(requests: Sequence[Inputs]) -> dict[str, Tensor]:
    """One batch from several requests: prompts padded on the right and missing crops filled, both with -1."""
    batch = {"input_ids": _stack([request["input_ids"] for request in requests])}
    pictured = [request for request in requests if "images" in request]
    if not pictured:
        return batch
    for key in ("images", "image_masks", "image_input_idx"):
        first = pictured[0][key]
        empty = first.new_empty((1, 0, *first.shape[2:]))
        batch[key] = _stack([request.get(key, empty) for request in requests])
    return batch


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates along the batch, padding the second dimension with -1."""
    longest = max(tensor.shape[1] for tensor in tensors)
    out = tensors[0].new_full((sum(t.shape[0] for t in tensors), longest, *tensors[0].shape[2:]), PAD_ID)
    row = 0
    for tensor in tensors:
        out[row : row + tensor.shape[0], : tensor.shape[1]] = tensor
        row += tensor.shape[0]
    return out


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {path}: {reason}; give a folder with the published processor files") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}: give a folder with the published processor files")
    return content


def _max_tokens(folder: Path) -> int | None:
    """The longest sequence that the model's config allows; None without such an entry."""
    path = folder / MODEL_CONFIG_FILE
    longest = _read_json(path).get("max_sequence_length") if path.is_file() else None
    return longest if type(longest) is int and longest > 0 else None


def _load(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, str | Path | bytes):
        return open_image(image)
    if isinstance(image, ImageRef):
        return image.load()
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            check_size((image.shape[1], image.shape[0]))
            return to_rgb(Image.fromarray(image))
        seen = f"an array of shape {image.shape} and type {image.dtype}"
    else:
        seen = f"a {type(image).__name__}"
    raise UserError(
        f"the image is {seen}: give a PIL image, a path, the bytes of a file, or a uint8 array of shape (H, W), "
        "(H, W, 3) or (H, W, 4)"
    )
