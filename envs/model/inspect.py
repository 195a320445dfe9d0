"""What a checkpoint contains and needs, from its config and the headers of its weight files alone, also on the hub."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch

from envs.errors import UserError, first_line
from envs.files import size_text
from envs.knobs import BLOCK_COUNTS, INSERTIONS, TIER_CROPS, TOP_KS, KnobSpace
from envs.model.block_importance import dropped_first, read_importance
from envs.model.checkpoint import TensorHeader, mismatches, read_headers, resolve_folder
from envs.model.config import AdaptiveMolmoEConfig
from envs.model.conversion import is_packed
from envs.model.device import main_memory
from envs.model.molmoe import on_meta, published_shapes

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2}
_FILE_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
_QUESTION_TOKENS = _ANSWER_TOKENS = 64
_CUDA_CONTEXT: Final = 600 * 2**20
_PARTS: Final = {
    "language.wte": "words",
    "language.lm_head": "words",
    "language.ln_f": "final norm",
    "vision.encoder": "image encoder",
    "vision": "connector",
}


class Device(NamedTuple):
    """Memory of a device in bytes."""

    name: str
    total: int
    free: int


class Need(NamedTuple):
    """Bytes that running the model in a dtype takes on a device, one request at a time."""

    device: Device
    dtype: str
    bytes: int

    @property
    def fits(self) -> bool:
        """Whether the device has that much free."""
        return self.bytes <= self.device.free


class RequestMemory(NamedTuple):
    """Bytes of one request at the largest image and longest answer: keys and values, and an upper bound of the rest."""

    cache: int
    activations: int


@dataclass(frozen=True)
class ModelSummary:
    """A checkpoint before any load.

    Args:
        tensors: headers by published key.
        problems: what would prevent a load, one line each.
        importance: one score per block; blocks with the lowest are dropped first.
        needs: per device and dtype.
    """

    source: str
    config: AdaptiveMolmoEConfig
    tensors: Mapping[str, TensorHeader]
    problems: tuple[str, ...]
    importance: tuple[float, ...]
    needs: tuple[Need, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def bytes_by(self, field: str) -> dict[str, int]:
        """Bytes of tensors by `dtype` or by `file`."""
        found: Counter[str] = Counter()
        for tensor in self.tensors.values():
            found[getattr(tensor, field)] += math.prod(tensor.shape) * _FILE_BYTES.get(tensor.dtype, 1)
        return dict(found)


def inspect_model(
    path_or_id: str | Path, revision: str | None = None, devices: Sequence[Device] | None = None
) -> ModelSummary:
    """Sizes, knobs and memory of a model folder, hub id or `embedded`, read from headers alone.

    Args:
        path_or_id: as in `AdaptiveMolmoE.from_pretrained`.
        devices: whose memory to compare with; None for those of this machine.

    Raises:
        UserError: no such model, or a config that is not supported. Weights that cannot be loaded are no error here
            but `problems`.
    """
    folder = resolve_folder(path_or_id, revision, ("*.json",))
    config = AdaptiveMolmoEConfig.from_pretrained(folder)
    on_hub = str(path_or_id) != "embedded" and not Path(path_or_id).expanduser().is_dir()
    tensors, problems = _hub_headers(str(path_or_id), revision) if on_hub else read_headers(folder)
    return ModelSummary(
        source=str(path_or_id),
        config=config,
        tensors=tensors,
        problems=(*problems, *mismatches(published_shapes(config, is_packed(tensors)), tensors)),
        importance=read_importance(folder),
        needs=tuple(
            Need(device, dtype, needed_bytes(config, dtype, device.name.startswith("cuda")))
            for device in (_devices() if devices is None else devices)
            for dtype in DTYPE_BYTES
        ),
    )


def _hub_headers(source: str, revision: str | None) -> tuple[dict[str, TensorHeader], list[str]]:
    from huggingface_hub import HfApi

    try:
        found = HfApi().get_safetensors_metadata(source, revision=revision)
    except Exception as error:  # HTTP, format and naming errors share no base class
        reason = first_line(error)
        raise UserError(f"cannot read the weights' headers of {source} on the hub: {reason}") from None
    tensors = [
        (key, TensorHeader(name, str(tensor.dtype), tuple(tensor.shape)))
        for name, file in found.files_metadata.items()
        for key, tensor in file.tensors.items()
    ]
    count = Counter(key for key, _ in tensors)
    return dict(tensors), [f"{key} is stored twice: keep one of them" for key in count if count[key] > 1]


def parameter_counts(config: AdaptiveMolmoEConfig) -> dict[str, int]:
    """Parameters of each part of a model of this shape; docs/model.md has the formulas."""
    counts: Counter[str] = Counter()
    for name, parameter in on_meta(config).named_parameters():
        if name.startswith("language.blocks"):
            part = "experts" if name.endswith(("router", "gate_up", "down")) else "attention"
        else:
            part = next(part for prefix, part in _PARTS.items() if name.startswith(prefix))
        counts[part] += parameter.numel()
    return dict(counts)


def longest_prompt(config: AdaptiveMolmoEConfig, tier: str) -> int:
    """Prompt tokens of the largest tiling of a tier with a question of 64 tokens."""
    tilings = [(rows, TIER_CROPS[tier] // rows) for rows in range(1, TIER_CROPS[tier] + 1)]
    return 1 + max(map(config.image_tokens, tilings)) + _QUESTION_TOKENS


def request_memory(config: AdaptiveMolmoEConfig, dtype: str) -> RequestMemory:
    """Memory of one request in addition to the weights, at the largest image and longest answer."""
    vision, size = config.vision, DTYPE_BYTES[dtype]
    tokens = longest_prompt(config, "high") + _ANSWER_TOKENS
    patches = (1 + TIER_CROPS["high"]) * (vision.patches + 1)
    encoder = patches * (6 * vision.width + 2 * vision.mlp_dim + 2 * vision.feature_dim) * size
    language = tokens * max(TOP_KS) * (3 * config.expert_hidden + 2 * config.d_model) * size
    logits = 4 * (config.embedding_size + config.additional_vocab_size)
    return RequestMemory(2 * config.n_layers * config.d_model * tokens * size, max(encoder, language) + logits)


def needed_bytes(config: AdaptiveMolmoEConfig, dtype: str, cuda: bool) -> int:
    """Device memory that answering one request at a time takes."""
    weights = sum(parameter_counts(config).values()) * DTYPE_BYTES[dtype]
    return weights + sum(request_memory(config, dtype)) + (_CUDA_CONTEXT if cuda else 0)


def _devices() -> list[Device]:
    """This machine's memory, and that of its CUDA devices."""
    found = [Device("cpu", *main_memory())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(Device(f"cuda:{index} ({torch.cuda.get_device_name(index)})", total, free))
    return found


def describe(summary: ModelSummary) -> str:
    """A page of plain text about a model, for the terminal."""
    config, vision = summary.config, summary.config.vision
    counts, space = parameter_counts(config), KnobSpace(summary.importance)
    files = summary.bytes_by("file")
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    lines = [
        f"model       {summary.source}",
        f"language    {config.n_layers} blocks of width {config.d_model}, {config.n_heads} heads, {config.n_experts} "
        f"experts of {config.expert_hidden}, {config.embedding_size + config.additional_vocab_size:,} words",
        f"vision      {vision.layers} layers of width {vision.width}, crops of {vision.crop_size}x{vision.crop_size}, "
        f"patches of {vision.patch_size}, {vision.tokens} tokens per crop",
        f"weights     {size_text(sum(files.values()))} in {len(files)} file(s): "
        + ", ".join(f"{dtype} {size_text(count)}" for dtype, count in summary.bytes_by("dtype").items()),
        f"parameters  {summary.parameters:,} (by the config {sum(counts.values()):,}: {parts})",
        f"knobs       {len(space.all)} combinations, {len(space.distinct)} distinct executions: tiers "
        f"{', '.join(TIER_CROPS)}; insertion {INSERTIONS[0]}-{INSERTIONS[-1]}; top-k {TOP_KS[0]}-{TOP_KS[-1]}; blocks "
        f"{BLOCK_COUNTS[0]}-{BLOCK_COUNTS[-1]}",
        f"dropped     blocks {dropped_first(summary.importance)} first",
        "prompt      at most " + ", ".join(f"{longest_prompt(config, t)} tokens ({t})" for t in TIER_CROPS),
    ]
    for dtype, size in DTYPE_BYTES.items():
        cache, activations = map(size_text, request_memory(config, dtype))
        lines.append(
            f"memory      {dtype}: weights {size_text(sum(counts.values()) * size)}, per request {cache} of cache and "
            f"at most {activations} of activations"
        )
    for device, dtype, needed in summary.needs:
        lines.append(
            f"device      {device.name}: {dtype} needs {size_text(needed)}, {size_text(device.free)} of "
            f"{size_text(device.total)} free: {'fits' if needed <= device.free else 'does not fit'}"
        )
    return "\n".join([*lines, *(f"problem     {problem}" for problem in summary.problems)])
