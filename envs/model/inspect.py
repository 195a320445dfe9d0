"""What a checkpoint is and needs, from its config and the headers of its weight files alone.

Nothing is loaded: a safetensors file begins with a table of its tensors, and that is all that is
read of it, also on the hub.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from envs.errors import UserError, first_line
from envs.knobs import BLOCK_COUNTS, INSERTIONS, TIER_CROPS, TOP_KS, KnobSpace
from envs.model.checkpoint import resolve_folder, slots, weight_files
from envs.model.config import MolmoEConfig
from envs.model.block_importance import read_importance
from envs.model.inspect import (
    DTYPE_BYTES,
    longest_prompt,
    needed_bytes,
    parameter_counts,
    request_memory,
)

_DTYPES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1}
_LONGEST_HEADER: Final = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file's header describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.parameters * _DTYPES.get(self.dtype, 1)


@dataclass(frozen=True)
class Device:
    """Memory of a device in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Need:
    """What a device must hold to run the model in a dtype, one request at a time."""

    device: Device
    dtype: str
    bytes: int

    @property
    def fits(self) -> bool:
        """Whether the device has that much free."""
        return self.bytes <= self.device.free


@dataclass(frozen=True)
class ModelSummary:
    """A checkpoint, before any load.

    Args:
        source: as given.
        config: its shape.
        tensors: headers by published key.
        problems: what would stop a load, one line each; empty where nothing would.
        importance: one score per block, deciding which go first.
        tokens: longest prompt per tier, question of 64 tokens included.
        needs: per device and dtype.
    """

    source: str
    config: MolmoEConfig
    tensors: Mapping[str, TensorHeader]
    problems: tuple[str, ...]
    importance: tuple[float, ...]
    tokens: Mapping[str, int]
    needs: tuple[Need, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.parameters for tensor in self.tensors.values())

    @property
    def bytes_per_dtype(self) -> dict[str, int]:
        """Bytes in the files, by dtype."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.bytes
        return found

    @property
    def files(self) -> dict[str, int]:
        """Bytes of tensors, by file."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            found[tensor.file] = found.get(tensor.file, 0) + tensor.bytes
        return found


def inspect_model(
    path_or_id: str | Path, revision: str | None = None, devices: Sequence[Device] | None = None
) -> ModelSummary:
    """Sizes, knobs and memory of a model folder, hub id or `embedded`, read from headers alone.

    Args:
        path_or_id: what `AdaptiveMolmoE.from_pretrained` takes.
        revision: of a hub id.
        devices: whose memory to compare with; those of this machine by default.

    Raises:
        UserError: no such model, or a config or header that cannot be read. Weights that do not fit
            the config are no error here but `problems`.
    """
    folder = resolve_folder(path_or_id, revision, ("*.json",))
    config = MolmoEConfig.from_pretrained(folder)
    tensors, problems = _headers(str(path_or_id), folder, revision)
    tokens = {tier: longest_prompt(config, tier) for tier in TIER_CROPS}
    here = _devices() if devices is None else devices
    return ModelSummary(
        source=str(path_or_id),
        config=config,
        tensors=tensors,
        problems=(*problems, *_misfits(config, tensors)),
        importance=read_importance(folder),
        tokens=tokens,
        needs=tuple(
            Need(device, dtype, needed_bytes(config, dtype, device.name.startswith("cuda")))
            for device in here
            for dtype in DTYPE_BYTES
        ),
    )


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The table of tensors at the start of a safetensors file.

    Raises:
        UserError: not a safetensors file, or one cut short.
    """

    def damaged(why: str) -> UserError:
        return UserError(f"{path} is not a whole safetensors file: {why}; fetch it again")

    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise damaged(f"it has {len(start)} bytes")
            (length,) = struct.unpack("<Q", start)
            if length > _LONGEST_HEADER:
                raise damaged(f"its header claims {length:,} bytes")
            header = json.loads(file.read(length))
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise damaged("its header is no JSON") from None
    try:
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        tensors = {
            key: TensorHeader(path.name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for key, entry in entries.items()
        }
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise damaged("its header does not list tensors") from None
    if size != 8 + length + end:
        raise damaged(f"it has {size:,} bytes and should have {8 + length + end:,}")
    return tensors


def _headers(source: str, folder: Path, revision: str | None) -> tuple[dict[str, TensorHeader], tuple[str, ...]]:
    """Headers of all weight files, and what is wrong with those that cannot be read."""
    if source != "embedded" and not Path(source).expanduser().is_dir():
        return _hub_headers(source, revision), ()
    tensors: dict[str, TensorHeader] = {}
    problems = []
    for path in weight_files(folder):
        try:
            tensors.update(read_header(path))
        except UserError as error:
            problems.append(error.message)
    return tensors, tuple(problems)


def _hub_headers(source: str, revision: str | None) -> dict[str, TensorHeader]:
    from huggingface_hub import HfApi

    try:
        found = HfApi().get_safetensors_metadata(source, revision=revision)
    except Exception as error:  # HTTP, format and naming errors share no base class
        reason = first_line(error)
        raise UserError(f"cannot read the weights' headers of {source} on the hub: {reason}") from None
    return {
        key: TensorHeader(name, str(tensor.dtype), tuple(tensor.shape))
        for name, file in found.files_metadata.items()
        for key, tensor in file.tensors.items()
    }


def _misfits(config: MolmoEConfig, tensors: Mapping[str, TensorHeader]) -> list[str]:
    """Keys that are missing, unexpected or misshapen, some of each named."""
    wanted = {key: slot.shape for key, slot in slots(config).items()}
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted and tensors[key].parameters]
    misshapen = [
        f"{key} {list(tensors[key].shape)}, not {list(shape)}"
        for key, shape in wanted.items()
        if key in tensors and tensors[key].shape != shape
    ]
    return [
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for what, keys in (
            ("keys missing", missing),
            ("unexpected keys", unexpected),
            ("tensors of another shape", misshapen),
        )
        if keys
    ]


def _devices() -> list[Device]:
    """This machine's memory, and that of its CUDA devices."""
    found = [Device("cpu", *_main_memory())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            found.append(Device(f"cuda:{index} ({name})", total, free))
    return found


def _main_memory() -> tuple[int, int]:
    """Total and available bytes of main memory, within a container's limit where there is one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
        total, free = table["MemTotal"], table["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return _memory_by_sysconf()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, limit), max(0, min(free, limit - used))


def _memory_by_sysconf() -> tuple[int, int]:
    """Main memory where there is no /proc, such as on macOS: free is unknown, total is taken."""
    import os

    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        total = 0
    return total, total


def describe(summary: ModelSummary) -> str:
    """A page of plain text about a model, for the terminal."""
    config, vision = summary.config, summary.config.vision
    counts = parameter_counts(config)
    space = KnobSpace(summary.importance)
    order = sorted(range(1, config.n_layers), key=lambda b: (summary.importance[b], -b))
    files = summary.files
    lines = [
        f"model       {summary.source}",
        f"language    {config.n_layers} blocks of width {config.d_model}, {config.n_heads} heads, "
        f"{config.n_experts} experts of {config.expert_hidden}, "
        f"{config.embedding_size + config.additional_vocab_size:,} words",
        f"vision      {vision.layers} layers of width {vision.width}, crops of {vision.crop_size}x"
        f"{vision.crop_size}, patches of {vision.patch_size}, {vision.tokens} tokens a crop",
        f"weights     {sum(files.values()):,} bytes in {len(files)} file(s), "
        + ", ".join(f"{dtype} {_size(n)}" for dtype, n in summary.bytes_per_dtype.items()),
        f"parameters  {summary.parameters:,} (by formula {sum(counts.values()):,}: "
        + ", ".join(f"{part} {count:,}" for part, count in counts.items())
        + ")",
        f"knobs       {len(space.all)} settings, {len(space.distinct)} distinct executions: tiers "
        f"{', '.join(TIER_CROPS)}; insertion {INSERTIONS[0]}-{INSERTIONS[-1]}; top-k {TOP_KS[0]}-"
        f"{TOP_KS[-1]}; blocks {BLOCK_COUNTS[0]}-{BLOCK_COUNTS[-1]}",
        f"dropped     blocks {', '.join(map(str, order[:4]))} first",
        "prompt      at most " + ", ".join(f"{count} tokens ({tier})" for tier, count in summary.tokens.items()),
    ]
    for dtype in DTYPE_BYTES:
        request = request_memory(config, dtype)
        lines.append(
            f"memory      {dtype}: weights {_size(sum(counts.values()) * DTYPE_BYTES[dtype])}, a "
            "request "
            f"{_size(request.cache)} of cache and about {_size(request.activations)} of activations"
        )
    for need in summary.needs:
        verdict = "fits" if need.fits else "does not fit"
        lines.append(
            f"device      {need.device.name}: {need.dtype} needs {_size(need.bytes)}, "
            f"{_size(need.device.free)} of {_size(need.device.total)} free: {verdict}"
        )
    lines.extend(f"problem     {problem}" for problem in summary.problems)
    return "\n".join(lines)


def _size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
