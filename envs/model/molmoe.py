"""AdaptiveMolmoE: a MolmoE that runs any execution plan, and a model of transformers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model.checkpoint import INDEX, WEIGHTS, mismatches, read_headers, resolve_folder, weight_files
from envs.model.config import AdaptiveMolmoEConfig
from envs.model.conversion import CONVERTED, conversions, is_packed
from envs.model.decode import DecodeBatch
from envs.model.device import resolve_device, resolve_dtype
from envs.model.execution_tree import per_row
from envs.model.fingerprint import FingerprintCache, fingerprint
from envs.model.language import Language
from envs.model.single_row import SingleRow
from envs.model.vision import VisionBackbone

Plans = ExecutionPlan | Sequence[ExecutionPlan]
FULL_PLAN = ExecutionPlan()
SHARD_BYTES = 5 * 10**9


class AdaptiveMolmoEForConditionalGeneration(PreTrainedModel):
    """The model: `vision` turns crops into image tokens, `language` reads them and the prompt under a plan.

    Inputs are a mapping, batch first, with the published names: `input_ids` (B, T) right-padded with -1 and, with
    images, `images` (B, crops, patches, pixels), `image_masks` (B, crops, patches) and `image_input_idx` (B, crops,
    tokens a crop; negative where the crop or token is not used). Plans are one `ExecutionPlan`, or one per row.

    `experts` names the mixture-of-experts kernel used where a call does not: "auto", "dense" or "grouped".
    """

    config_class = AdaptiveMolmoEConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: AdaptiveMolmoEConfig) -> None:
        super().__init__(config)
        self.vision = VisionBackbone(config)
        self.language = Language(config)
        self.experts = "auto"
        self._fingerprint: tuple[object, str] | None = None
        self._single_row: SingleRow | None = None
        self._loaded: object = None
        self._cache: FingerprintCache | None = None
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        revision: str | None = None,
        blank_crops: str | None = None,
        *,
        config: AdaptiveMolmoEConfig | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "AdaptiveMolmoEForConditionalGeneration":
        """Read a checkpoint in the published layout: a folder, a hub id, or "embedded". In eval mode, frozen.

        Args:
            device: where weights are read to, tensor by tensor.
            dtype: of the weights, or its name.
            blank_crops: which crops count as empty, see `AdaptiveMolmoEConfig`; as the checkpoint says if None.
            config: as the checkpoint says if None.
            device_map: transformers' name for `device`; a map must name a single device.
            kwargs: what transformers' Auto classes add, such as `token`; nothing that would run remote code.

        Raises:
            UserError: nothing there, or files that are corrupt or do not fit each other.
        """
        _check_options(kwargs)
        folder = resolve_folder(path_or_id, revision, options=kwargs)
        config = AdaptiveMolmoEConfig.from_pretrained(folder) if config is None else config
        config = replace(config) if blank_crops is None else replace(config, blank_crops=blank_crops)
        tensors, problems = read_headers(folder)
        packed = is_packed(tensors)
        if problems := problems or mismatches(published_shapes(config, packed), tensors):  # before memory is taken
            raise UserError(f"weights in {folder} do not fit its config.json; {'; '.join(problems)}")
        target = resolve_device(device if device_map is None else _single_device(device_map))
        model = on_meta(config).to(resolve_dtype(dtype, target))
        model._read(folder, target, packed)
        parameters = dict(model.named_parameters())
        model._loaded, model._cache = model._state(), FingerprintCache.open(folder, config, parameters)
        return model.eval().requires_grad_(False)

    def _read(self, folder: Path, device: torch.device, packed: bool) -> None:
        """transformers' own loader: shards are mapped, tensors converted one parameter at a time."""
        plan = LoadStateDictConfig(device_map={"": device}, dtype=self.dtype, weight_mapping=conversions(packed))
        with _no_progress_bar():
            found, _ = self._load_pretrained_model(self, None, [str(file) for file in weight_files(folder)], plan)
        for name, parameter in self.named_parameters():
            # A tensor that was only renamed is still the file's own memory, which changes when the file does.
            if device.type == "cpu" and not any(part in name for part in CONVERTED):
                parameter.data = parameter.data.clone()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what converting took: the engine plans with what the device has free
        # Saved as published, however it was stored.
        self._weight_conversions = conversions()
        if errors := [*found.conversion_errors.values(), *found.mismatched_keys, *found.missing_keys]:
            raise UserError(f"weights in {folder} were not read: {errors[0]}; fetch the checkpoint again")

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

    def embed(self, inputs: Mapping[str, Tensor], image_features: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D): words, plus image tokens added at `image_input_idx` (negative indices are dropped).

        `image_features` are those of `vision`, computed here from `images` where not given.
        """
        x_BTD = self.language.embed(inputs["input_ids"].to(self.device))
        if image_features is None and inputs.get("images") is not None:
            image_features = self.vision(inputs["images"], inputs.get("image_masks"))
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

    def forward(self, inputs: Mapping[str, Tensor] | None = None, plan: Plans = FULL_PLAN, **named: Tensor) -> Tensor:
        """Logits (B, T, vocabulary); those at padded positions mean nothing. Inputs are a mapping, or named."""
        inputs = named if inputs is None else inputs
        lengths = prompt_lengths(inputs["input_ids"])
        hidden = self.language(self.embed(inputs), plans=_checked(plan, lengths), lengths=lengths, experts=self.experts)
        return self.language.logits(hidden)

    @torch.inference_mode()
    def generate(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        plan: Plans = FULL_PLAN,
        max_new_tokens: int = 64,
        stop_at_eos: bool = True,
        **named: Tensor,
    ) -> list[list[int]]:
        """Greedy continuation of each row, without the end-of-text token at which it stops.

        Blocks that a plan drops run neither on the prompt nor on new tokens, and have no cache.
        """
        inputs = named if inputs is None else inputs
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
        found: dict[str, Tensor] = revert_weight_conversion(self, dict(self.state_dict()))
        return found

    def save_pretrained(
        self, save_directory: str | Path, max_shard_size: int | str = SHARD_BYTES, **kwargs: Any
    ) -> None:
        """Write `config.json` and safetensors in the published layout, in shards of at most `max_shard_size` bytes.

        Weights from an earlier save are removed; `kwargs` are transformers'.
        """
        with _no_progress_bar():
            super().save_pretrained(save_directory, max_shard_size=max_shard_size, **kwargs)
        single, index = (Path(save_directory) / name for name in (WEIGHTS, INDEX))
        if single.exists() and index.exists():
            min(single, index, key=lambda path: path.stat().st_mtime_ns).unlink()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights are read, or made by `initialise`."""


AdaptiveMolmoE = AdaptiveMolmoEForConditionalGeneration
"""The short name."""

register_checkpoint_conversion_mapping(AdaptiveMolmoEForConditionalGeneration.__name__, conversions())
AutoConfig.register(AdaptiveMolmoEConfig.model_type, AdaptiveMolmoEConfig)
for auto_class in (AutoModel, AutoModelForImageTextToText):
    auto_class.register(AdaptiveMolmoEConfig, AdaptiveMolmoEForConditionalGeneration)


def on_meta(config: AdaptiveMolmoEConfig) -> AdaptiveMolmoEForConditionalGeneration:
    """A model of names and shapes alone, without memory for weights."""
    with torch.device("meta"):
        return AdaptiveMolmoEForConditionalGeneration(config)


def published_shapes(config: AdaptiveMolmoEConfig, packed: bool = False) -> dict[str, tuple[int, ...]]:
    """Every key of the published layout, with its tensor's shape; `packed` as in `conversions`."""
    model = on_meta(config)
    model._weight_conversions = conversions(packed)
    return {key: tuple(tensor.shape) for key, tensor in model.published_state_dict().items()}


def _check_options(kwargs: Mapping[str, Any]) -> None:
    """Refuses what transformers would take and this package does not do; False and None are what it does."""
    refused = ("quantization_config", "gguf_file", "state_dict", "variant", "subfolder", "key_mapping")
    given = [key for key in (*refused, "trust_remote_code") if kwargs.get(key)]
    if given or kwargs.get("use_safetensors") is False:
        name = given[0] if given else "use_safetensors=False"
        raise UserError(f"{name} is not allowed: published safetensors are read by this package's code; leave it out")


def _single_device(device_map: Any) -> str | torch.device:
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(devices) != 1:
        raise UserError(f"device_map names {len(devices)} devices: the model runs on one; give its name")
    device = devices.pop()
    return torch.device("cuda", device) if isinstance(device, int) else device


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()


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
