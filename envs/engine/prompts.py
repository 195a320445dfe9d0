"""From samples to prompts: what identifies them, and their embeddings with each image encoded once.

Letters: T tokens, D model width, C crops, P patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cachetools import LRUCache
from PIL import Image
from torch import Tensor

from envs.data.sample import Sample
from envs.engine.caches import keep, tensor_bytes
from envs.engine.keys import PromptKey
from envs.engine.look_ahead import LookAhead
from envs.latency.record import RequestShape
from envs.model.device_indices import DeviceIndices
from envs.model.molmoe import AdaptiveMolmoE
from envs.model.vision import Staged
from envs.processing.processor import MolmoEProcessor

Tiling = tuple[int, int]
_ImageKey = tuple[str, Tiling]
_VIEWS = 1  # the global view comes before the crops
# Samples whose sizes and prompts are remembered; a long-lived server sees more than memory should keep.
_ENTRIES = 1 << 16
# Crops that threads may keep ready, most of a megabyte each.
_CROPS_AHEAD = 256


@dataclass(frozen=True)
class Prompt:
    """A sample at one tiling. Equal keys mean equal computation, whatever the sample's id or answers."""

    key: PromptKey
    sample: Sample
    tier: str
    tokens: int


@dataclass(frozen=True)
class _Layout:
    """What a tiling alone decides: the token ids before the text, and the place of each image token (C, t)."""

    head_ids: Tensor
    image_input_idx: Tensor


@dataclass(frozen=True)
class _Ready:
    """An image cut for the encoder: crops, masks (C, P), the token ids before the text, places of image tokens."""

    staged: Staged
    masks: Tensor
    head_ids: Tensor
    image_input_idx: Tensor


class Prompts:
    """Prepares prompts for one model and processor; keeps image features and layouts.

    Args:
        feature_bytes: bound of kept image features.
        crops: most crops encoded in one pass.
    """

    def __init__(self, model: AdaptiveMolmoE, processor: MolmoEProcessor, feature_bytes: int, crops: int) -> None:
        self.model = model
        self.processor = processor
        # On a CPU one image at a time, so that its features are the same to the last bit whatever else is asked for.
        self.crops = 1 if model.device.type == "cpu" else max(1, crops)
        self.images_encoded = 0
        self._features: LRUCache[_ImageKey, Tensor] = LRUCache(feature_bytes, tensor_bytes)
        self._loaded: tuple[str, Image.Image] | None = None
        self._ahead = LookAhead[_ImageKey, Prompt, _Ready](self._prepare, _CROPS_AHEAD)
        # The geometry allows a few dozen tilings; no more can come.
        self._layouts: dict[Tiling, _Layout] = {}
        self._sizes: LRUCache[str, tuple[int, int]] = LRUCache(_ENTRIES)
        self._prompts: LRUCache[tuple[str | None, str, str | None, str], Prompt] = LRUCache(_ENTRIES)

    @property
    def held_bytes(self) -> int:
        """Bytes of kept image features."""
        return int(self._features.currsize)

    def size(self, sample: Sample) -> tuple[int, int] | None:
        """Width and height of a sample's image; None without one."""
        if sample.image is None:
            return None
        digest = sample.image.digest
        if digest not in self._sizes:
            self._sizes[digest] = sample.image.size
        return self._sizes[digest]

    def tiling(self, sample: Sample, tier: str) -> Tiling | None:
        """Rows and columns of crops a sample gets at a tier; None without an image."""
        size = self.size(sample)
        return None if size is None else self.processor.tiling(size, tier)

    def shape(self, sample: Sample, tier: str) -> RequestShape:
        """Sizes of a request, without decoding its image."""
        size = self.size(sample)
        counts = self.processor.shape(size, tier, sample.question, sample.style)
        pixels = 0 if size is None else size[0] * size[1]
        return RequestShape(counts.crops, counts.image_tokens, counts.prompt_tokens, pixels)

    def prompt(self, sample: Sample, tier: str) -> Prompt:
        """The prompt of a sample at a tier, its image untouched."""
        digest = None if sample.image is None else sample.image.digest
        known = (digest, sample.question, sample.style, tier)
        if known not in self._prompts:
            text = tuple(self.processor.prompt_ids(sample.question, sample.style))
            key = PromptKey(digest, self.tiling(sample, tier), text)
            self._prompts[known] = Prompt(key, sample, tier, self.shape(sample, tier).prompt_tokens)
        return self._prompts[known]

    def embed(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Embeddings (T, D) of each prompt, image features added. Each (image, tiling) is encoded once."""
        features = self._encode(prompts)
        indices = DeviceIndices(self.model.device)
        texts = [indices.add(prompt.key.text_ids) for prompt in prompts]
        start = indices.add([self.processor.eos_id])
        indices.send()
        out = []
        for prompt, text in zip(prompts, texts, strict=True):
            tiling = prompt.key.tiling
            if tiling is None:
                out.append(self.model.language.embed(torch.cat((indices[start], indices[text]))))
                continue
            layout = self._layouts[tiling]
            inputs = {
                "input_ids": torch.cat((layout.head_ids, indices[text])).unsqueeze(0),
                "image_input_idx": layout.image_input_idx.unsqueeze(0),
            }
            out.append(self.model.embed(inputs, features[_image_key(prompt)].unsqueeze(0)).squeeze(0))
        return out

    def expect(self, waves: Sequence[Sequence[Prompt]]) -> None:
        """Which prompts `embed` will be asked for, wave by wave: on a GPU, threads get their images ready meanwhile."""
        if self.model.device.type != "cpu":
            pending = [item for wave in waves for item in self._missing(wave).items()]
            self._ahead.expect((key, prompt, _crops(key[1])) for key, prompt in dict(pending).items())

    def _missing(self, prompts: Sequence[Prompt]) -> dict[_ImageKey, Prompt]:
        """Images at their tilings that are not kept, tilings of one side by side, so that it is loaded once."""
        found = {_image_key(prompt): prompt for prompt in prompts if prompt.key.tiling is not None}
        return {key: found[key] for key in sorted(found) if key not in self._features}

    def _encode(self, prompts: Sequence[Prompt]) -> dict[_ImageKey, Tensor]:
        """Features (C, t, D) of every image at its tiling, from memory or encoded together."""
        keys = {_image_key(prompt) for prompt in prompts if prompt.key.tiling is not None}
        found = {key: kept for key in keys if (kept := self._features.get(key)) is not None}
        pending = list(self._missing(prompts).items())
        while pending:
            take, crops = 0, 0
            while take < len(pending) and (not take or crops + _crops(pending[take][0][1]) <= self.crops):
                crops += _crops(pending[take][0][1])
                take += 1
            found.update(self._encode_together(dict(pending[:take])))
            pending = pending[take:]
        self._loaded = None
        return found

    def _encode_together(self, waiting: dict[_ImageKey, Prompt]) -> dict[_ImageKey, Tensor]:
        device = self.model.device
        ready = [self._ahead.take(key, prompt) for key, prompt in waiting.items()]
        for (_, tiling), one in zip(waiting, ready, strict=True):
            if tiling not in self._layouts:
                self._layouts[tiling] = _Layout(*(ids.to(device) for ids in (one.head_ids, one.image_input_idx)))
        crops, masks = (
            torch.cat([part.to(device, non_blocking=True) for part in parts])
            for parts in ([one.staged.crops for one in ready], [one.masks for one in ready])
        )
        blank = torch.cat([one.staged.blank for one in ready])
        encoded = self.model.vision.encode(Staged(crops, blank), masks)
        self.images_encoded += len(waiting)
        counts = [len(one.masks) for one in ready]
        found = {key: part.clone() for key, part in zip(waiting, encoded.split(counts), strict=True)}
        for key, part in found.items():
            keep(self._features, key, part)
        return found

    @torch.inference_mode()
    def _prepare(self, prompt: Prompt) -> _Ready:
        """Everything about a prompt's image that needs no device; called from threads."""
        image, sample = prompt.sample.image, prompt.sample
        assert image is not None
        loaded = self._loaded
        if loaded is None or loaded[0] != image.digest:
            self._loaded = loaded = image.digest, image.load()
        inputs = self.processor(loaded[1], sample.question, prompt.tier, sample.style)
        ids, masks = inputs["input_ids"][0], inputs["image_masks"][0]
        if self.model.device.type == "cuda":
            masks = masks.pin_memory()
        staged = self.model.vision.stage(inputs["images"][0])
        return _Ready(staged, masks, ids[: len(ids) - len(prompt.key.text_ids)], inputs["image_input_idx"][0])


def _image_key(prompt: Prompt) -> _ImageKey:
    assert prompt.key.image is not None
    assert prompt.key.tiling is not None
    return prompt.key.image, prompt.key.tiling


def _crops(tiling: Tiling) -> int:
    return _VIEWS + tiling[0] * tiling[1]
