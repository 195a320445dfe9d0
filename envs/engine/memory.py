"""How much fits: bytes that one token of a row takes, and the token budget of a batch that follows."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from envs.knobs import MODEL_BLOCKS, TOP_KS
from envs.model.config import MolmoEConfig
from envs.model.language import MAX_INSERTION

# Shares of the free memory that batches and caches may take; the rest is left to others.
_BATCH_SHARE, _PREFIX_SHARE, _FEATURE_SHARE = 0.25, 0.125, 0.0625
# Beyond this a batch gains nothing on a CPU and its activations only leave the processor's caches.
_CPU_BATCH_TOKENS = 1 << 12
# Where the system does not tell.
_DEFAULT_FREE = 4 * 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bounds of an engine, in tokens and bytes.

    Attributes:
        batch_tokens: padded prompt tokens of one prefill.
        decode_tokens: padded cache slots (row x time) of rows that wait or decode, per block.
        prefix_bytes: kept prefixes.
        feature_bytes: kept image features.
    """

    batch_tokens: int
    decode_tokens: int
    prefix_bytes: int
    feature_bytes: int


def prefill_bytes(config: MolmoEConfig, itemsize: int) -> int:
    """Bytes that one padded prompt token of one row takes at most in prefill: all caches, one block's activations."""
    width, hidden, used = config.d_model, config.expert_hidden, max(TOP_KS)
    caches = 2 * MODEL_BLOCKS * width
    # Input, normed input, projections, rotated pairs in float32 (twice), attention output, and the experts' pairs.
    attention = 7 * width * itemsize + 4 * width * 4
    experts = used * (2 * width + 4 * hidden) * itemsize + used * 24 + config.n_experts * 8
    return caches * itemsize + attention + experts + 2 * width * itemsize


def decode_bytes(config: MolmoEConfig, itemsize: int) -> int:
    """Bytes that one cache slot of one row takes while rows decode, the copy made when the batch changes included."""
    return 2 * 2 * MODEL_BLOCKS * config.d_model * itemsize


def prefix_bytes(config: MolmoEConfig, itemsize: int) -> int:
    """Bytes that one prompt token takes in a kept prefix: hidden states, keys and values."""
    return (1 + 3 * MAX_INSERTION) * config.d_model * itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_DEFAULT_FREE]
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found = [int(text.split("MemAvailable:")[1].split()[0]) * 1024]
    # A container's own limit, where it has one.
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    return max(0, min(found))


def plan_memory(config: MolmoEConfig, dtype: torch.dtype, device: torch.device, batch_tokens: int | None) -> MemoryPlan:
    """Bounds from the free memory of the device, or from a given token budget.

    Args:
        batch_tokens: padded prompt tokens of a prefill; computed where None.
    """
    free = free_bytes(device)
    per_row = prefill_bytes(config, dtype.itemsize)
    slot = decode_bytes(config, dtype.itemsize)
    fits = int(free * _BATCH_SHARE) // (per_row + slot)
    if batch_tokens is None:
        batch_tokens = min(fits, _CPU_BATCH_TOKENS) if device.type == "cpu" else fits
    batch_tokens = max(1, batch_tokens)
    decode_tokens = max(batch_tokens, min(int(free * _BATCH_SHARE) // slot, 16 * batch_tokens))
    return MemoryPlan(batch_tokens, decode_tokens, int(free * _PREFIX_SHARE), int(free * _FEATURE_SHARE))
