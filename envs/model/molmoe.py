"""AdaptiveMolmoE: a MolmoE that runs any execution plan."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model.checkpoint import check_weights, load_weights, published_state_dict, resolve_folder, save_weights
from envs.model.config import MolmoEConfig
from envs.model.decode import DecodeBatch
from envs.model.device import resolve_device
from envs.model.execution_tree import per_row
from envs.model.fingerprint import FingerprintCache, fingerprint
from envs.model.language import Language
from envs.model.single_row import SingleRow
from envs.model.vision import VisionBackbone

Plans = ExecutionPlan | Sequence[ExecutionPlan]
SHARD_BYTES = 5 * 10**9


class AdaptiveMolmoE(nn.Module):
    """The model: `vision` turns crops into image tokens, `language` reads them and the prompt under a plan.

    Inputs are a mapping, batch first, with the published names: `input_ids` (B, T) right-padded with -1 and, with
    images, `images` (B, crops, patches, pixels), `image_masks` (B, crops, patches) and `image_input_idx` (B, crops,
    tokens a crop; negative where the crop or token is not used). Plans are one `ExecutionPlan`, or one per row.

    `experts` names the mixture-of-experts kernel used where a call does not: "auto", "dense" or "grouped".
    """

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionBackbone(config)
        self.language = Language(config)
        self.experts = "auto"
        self._fingerprint: tuple[object, str] | None = None
        self._single_row: SingleRow | None = None
        self._loaded: object = None
        self._cache: FingerprintCache | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        blank_crops: str | None = None,
    ) -> "AdaptiveMolmoE":
        """Read a checkpoint in the published layout: a folder, a hub id, or "embedded". In eval mode, frozen.

        Args:
            blank_crops: which crops count as empty, see `MolmoEConfig`; as the checkpoint says if None.

        Raises:
            UserError: nothing there, or files that are corrupt or do not fit each other.
        """
        folder = resolve_folder(path_or_id, revision)
        config = MolmoEConfig.from_pretrained(folder)
        config = config if blank_crops is None else config.with_blank_crops(blank_crops)
        tensors = check_weights(folder, config)  # before memory is taken
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=resolve_device(device))
        parameters = dict(model.named_parameters())
        load_weights(folder, config, tensors, parameters)
        model._loaded, model._cache = model._state(), FingerprintCache.open(folder, config, parameters)
        return model.eval().requires_grad_(False)

    @classmethod
    def initialise(cls, config: MolmoEConfig, seed: int = 0) -> "AdaptiveMolmoE":
        """Fresh weights for training: normal, deviation 1/sqrt(fan-in), scaled down where a block adds to its input."""
        model = cls(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("norm", "ln_f", "qk_norm")):
                    parameter.fill_(1.0)
                elif "norm." in name or "pre_ln." in name:
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, _deviation(name, parameter, config), generator=generator)
        return model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.language.wte.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.language.wte.dtype

    @property
    def single_row(self) -> SingleRow:
        """What runs one request at a time; made at first use, and anew where the weights have moved."""
        if self._single_row is None or not self._single_row.fits_model(self):
            self._single_row = SingleRow(self)
        return self._single_row

    @property
    def fingerprint(self) -> str:
        """sha256 over weights, their dtype and the config; computed again when a weight changes."""
        state = self._state()
        if self._fingerprint is None or self._fingerprint[0] != state:
            cache = self._cache if state == self._loaded else None
            value = cache.read() if cache else None
            if value is None:
                value = fingerprint(self.config, dict(self.named_parameters()))
                if cache:
                    cache.write(value)
            self._fingerprint = (state, value)
        return self._fingerprint[1]

    def _state(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever a weight is replaced or written to."""
        return tuple((parameter.data_ptr(), parameter._version) for parameter in self.parameters())

    def encode_images(self, images: Tensor, image_masks: Tensor | None = None) -> Tensor:
        """Image tokens (N, crops, tokens a crop, D) of images (N, crops, patches, pixels)."""
        encoded: Tensor = self.vision(images, image_masks)
        return encoded

    def embed(self, inputs: Mapping[str, Tensor], image_features: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D): words, plus image tokens added at `image_input_idx` (negative indices are dropped).

        `image_features` are those of `encode_images`, computed here from `images` where not given.
        """
        x_BTD = self.language.embed(inputs["input_ids"].to(self.device))
        if image_features is None and inputs.get("images") is not None:
            image_features = self.encode_images(inputs["images"], inputs.get("image_masks"))
        if image_features is None:
            return x_BTD
        rows, tokens, width = x_BTD.shape
        index = inputs["image_input_idx"].reshape(rows, -1)
        # Checked on a CPU only: on another device reading the value would synchronize.
        if index.device.type == "cpu" and int(index.max()) >= tokens:
            raise UserError(f"image_input_idx contains {int(index.max())}: the prompt has only {tokens} tokens")
        index = index.to(self.device)
        row_starts = torch.arange(rows, device=index.device).unsqueeze(1) * tokens
        # A dropped index adds zeros to the row's first token: picking the used ones would need their number.
        features = image_features.reshape(rows, -1, width).to(x_BTD.dtype)
        features = features.masked_fill((index < 0).unsqueeze(-1), 0)
        places = (index.clamp(min=0) + row_starts).flatten()
        added = x_BTD.reshape(-1, width).index_add(0, places, features.flatten(0, 1))
        return added.view_as(x_BTD)

    def language_feature(self, question_token_ids: Tensor | Sequence[int]) -> Tensor:
        """Mean word embedding (D,) of a question's tokens."""
        return self.language.embed(torch.as_tensor(question_token_ids, device=self.device)).mean(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states after the final norm."""
        return self.language.logits(hidden)

    def forward(self, inputs: Mapping[str, Tensor], plan: Plans) -> Tensor:
        """Logits (B, T, vocabulary); those at padded positions mean nothing."""
        lengths = prompt_lengths(inputs["input_ids"])
        hidden = self.language(self.embed(inputs), plans=_checked(plan, lengths), lengths=lengths, experts=self.experts)
        return self.language.logits(hidden)

    @torch.inference_mode()
    def generate(
        self, inputs: Mapping[str, Tensor], plan: Plans, max_new_tokens: int = 64, stop_at_eos: bool = True
    ) -> list[list[int]]:
        """Greedy continuation of each row, without the end-of-text token at which it stops.

        Blocks that a plan drops run neither on the prompt nor on new tokens, and have no cache.
        """
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {max_new_tokens}: give 0 or more")
        lengths = prompt_lengths(inputs["input_ids"])
        rows = list(range(len(lengths)))
        out: list[list[int]] = [[] for _ in rows]
        if not max_new_tokens or not rows:
            return out
        top_k = per_row(_checked(plan, lengths), len(lengths))
        x_BTD = self.embed(inputs)
        if len(rows) == 1:
            prefilled = self.single_row.prefill(x_BTD[:, : lengths[0]], top_k[0])
            return [self.single_row.decode(prefilled, max_new_tokens, stop_at_eos)[0]]
        prefilled = self.language.prefill(x_BTD, lengths, rows, top_k, experts=self.experts)
        tokens = self.language.next_logits(prefilled.last).argmax(-1).tolist()
        batch: DecodeBatch | None = None
        for step in range(max_new_tokens):
            going = [i for i, token in enumerate(tokens) if not (stop_at_eos and token == self.config.eos_token_id)]
            for i in going:
                out[rows[i]].append(tokens[i])
            if not going or step == max_new_tokens - 1:
                break
            rows = [rows[i] for i in going]
            if batch is None:
                batch = DecodeBatch(self.language, [(prefilled, rows)])
            elif len(going) < len(tokens):
                batch.keep(going)
            tokens = batch.step([tokens[i] for i in going], self.experts).argmax(-1).tolist()
        return out

    @torch.inference_mode()
    def probe(self, inputs: Mapping[str, Tensor], token: Tensor) -> Tensor:
        """The latency token `token` (B, D) after blocks 1..5: states (B, 5, D), from one pass over the prompt.

        It comes last, at the position after the prompt, attends to the prompt and itself, and changes nothing else.
        """
        lengths = prompt_lengths(inputs["input_ids"])
        prefix = self.language.run_prefix(self.embed(inputs), lengths, experts=self.experts)
        tokens_BLD = token.to(self.device, self.dtype).unsqueeze(1)
        return self.language.read_latency_tokens(tokens_BLD, prefix, self.experts).squeeze(2)

    def published_state_dict(self) -> dict[str, Tensor]:
        """Weights under the published checkpoint's keys, bit-equal to those loaded."""
        return published_state_dict(self.config, dict(self.named_parameters()))

    def save_pretrained(
        self, folder: str | Path, max_shard_size: int = SHARD_BYTES, dtype: torch.dtype | None = None
    ) -> None:
        """Write `config.json` and safetensors in the published layout, in shards of at most `max_shard_size` bytes."""
        if max_shard_size < 1:
            raise UserError(f"max_shard_size is {max_shard_size}: give a number of bytes above 0")
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_weights(target, self.config, dict(self.named_parameters()), max_shard_size, dtype)
        text = json.dumps(self.config.to_published(), indent=1, sort_keys=True)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        """As in torch; listed here for its type."""
        return super().named_parameters(*args, **kwargs)  # type: ignore[arg-type]


def prompt_lengths(input_ids: Tensor) -> list[int]:
    """True lengths of prompts (B, T) right-padded with -1.

    Raises:
        UserError: an empty prompt, or padding before a token.
    """
    if input_ids.dim() != 2:
        raise UserError(f"input_ids has shape {tuple(input_ids.shape)}: give (batch, tokens)")
    used = input_ids >= 0
    lengths: list[int] = used.sum(1).tolist()
    if lengths and min(lengths) < 1:
        raise UserError(f"prompt {lengths.index(0)} of the batch is empty: give at least one token")
    if min(lengths, default=0) < input_ids.shape[1] and bool((used[:, 1:] & ~used[:, :-1]).any()):
        raise UserError("input_ids has padding (-1) before a token: pad on the right")
    return lengths


def _checked(plan: Plans, lengths: Sequence[int]) -> Plans:
    if not isinstance(plan, ExecutionPlan) and len(plan) != len(lengths):
        raise UserError(f"{len(plan)} plans for a batch of {len(lengths)}: give one plan, or one per row")
    return plan


def _deviation(name: str, parameter: Tensor, config: MolmoEConfig) -> float:
    """Deviation of fresh weights. Parameters are (outputs, inputs), stacked down projections (E, inputs, outputs)."""
    if name == "language.wte":
        return 1.0
    if name.endswith(("embedding", "pad_embed")):
        return 0.02
    fan_in = parameter.shape[-2] if name.endswith("down") else parameter.shape[-1]
    added = name.endswith(("attn_out", "down", "out.weight", "w2.weight"))
    blocks = config.n_layers if name.startswith("language") else config.vision.layers
    return float(fan_in**-0.5 * ((2 * blocks) ** -0.5 if added else 1.0))
