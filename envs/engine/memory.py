"""How much fits: bytes that one token of a row takes, and the token budget of a batch that follows."""

from dataclasses import dataclass

import torch

from envs.knobs import MODEL_BLOCKS, TOP_KS
from envs.model.config import AdaptiveMolmoEConfig
from envs.model.device import main_memory

# Shares of the free memory that batches, prefixes and image features may take; the rest is left to others.
_SHARES = (0.25, 0.125, 0.0625)
# A process that has a card to itself need leave little.
_SHARES_ALONE = (0.5, 0.2, 0.1)
_ALONE = 0.95
# Beyond these a CPU gains nothing, and activations only leave its caches.
_CPU_BATCH_TOKENS, _CPU_CROPS = 1 << 12, 64
# Cache slots of decoding rows, in units of the prefill budget: many rows share the fixed cost of a step.
_DECODE_BATCHES = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Bounds of an engine.

    Attributes:
        batch_tokens: padded prompt tokens of one prefill.
        decode_tokens: padded cache slots (row x time) of rows that wait or decode, in each block.
        crops: image crops encoded in one pass.
        prefix_bytes: kept prefixes.
        feature_bytes: kept image features.
        working_bytes: most that encoding, prefill and decoding take together, without what is kept; a single prompt
            longer than `batch_tokens` may exceed it.
    """

    batch_tokens: int
    decode_tokens: int
    crops: int
    prefix_bytes: int
    feature_bytes: int
    working_bytes: int


def prefill_bytes(config: AdaptiveMolmoEConfig, itemsize: int) -> int:
    """Bytes that one padded prompt token of one row takes at most in prefill: all caches, one block's activations."""
    width, hidden, used = config.d_model, config.expert_hidden, max(TOP_KS)
    caches = 2 * MODEL_BLOCKS * width * itemsize
    # States in and out, normed input, projections, rotated pairs in float32, attention output; the experts' pairs.
    attention = 12 * width * itemsize + 6 * width * 4
    experts = used * (3 * width + 4 * hidden) * itemsize + used * 24 + config.n_experts * 12
    return caches + attention + experts


def decode_bytes(config: AdaptiveMolmoEConfig, itemsize: int) -> int:
    """Bytes that one cache slot of one row takes while rows decode, the copy made when the batch changes included."""
    return 2 * 2 * MODEL_BLOCKS * config.d_model * itemsize


def crop_bytes(config: AdaptiveMolmoEConfig, itemsize: int) -> int:
    """Bytes that one crop takes while images are encoded: pixels twice, one block's activations, features, pooling."""
    vision = config.vision
    tokens, inner = vision.patches + 1, vision.heads * vision.head_dim
    pixels = 2 * vision.patches * vision.pixels * 4
    block = tokens * (4 * vision.width + 5 * inner + 4 * vision.mlp_dim) * itemsize
    pooling = vision.patches * (6 * vision.feature_dim + 6 * inner) * itemsize
    return pixels + block + pooling + vision.tokens * 4 * config.d_model * itemsize


def owns_card(device: torch.device) -> bool:
    """Whether nothing else takes memory on a CUDA device: what is free or held by this process is nearly all of it."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return bool(free + torch.cuda.memory_reserved(device) >= _ALONE * total)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else main_memory()[1]


def plan_memory(
    config: AdaptiveMolmoEConfig, dtype: torch.dtype, device: torch.device, batch_tokens: int | None
) -> MemoryPlan:
    """Bounds from the free memory of the device, or from a given token budget.

    Args:
        batch_tokens: padded prompt tokens of a prefill; computed where None.
    """
    free, size, cpu = free_bytes(device), dtype.itemsize, device.type == "cpu"
    token, slot, crop = prefill_bytes(config, size), decode_bytes(config, size), crop_bytes(config, size)
    batch_share, prefix_share, feature_share = _SHARES_ALONE if owns_card(device) else _SHARES
    share = int(free * batch_share)
    if batch_tokens is None:
        fits = share // (token + _DECODE_BATCHES * slot)
        batch_tokens = max(1, min(fits, _CPU_BATCH_TOKENS) if cpu else fits)
    decode_tokens = max(batch_tokens, min(_DECODE_BATCHES * batch_tokens, share // slot))
    crops = max(1, min(batch_tokens * token // crop, _CPU_CROPS if cpu else batch_tokens))
    working = batch_tokens * token + decode_tokens * slot + crops * crop
    return MemoryPlan(batch_tokens, decode_tokens, crops, int(free * prefix_share), int(free * feature_share), working)
