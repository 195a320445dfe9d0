"""Caches bounded in bytes or entries, the least recently used dropped first; prefixes kept between the two stages."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from envs.engine.keys import PromptKey
from envs.model.prefill import Prefix


def keep(cache: LRUCache[Any, Any], key: Any, value: Any) -> None:
    """Put a value into a bounded cache; one that is larger than the bound is not kept."""
    with suppress(ValueError):
        cache[key] = value


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()


def split_prefix(prefix: Prefix) -> list[Prefix]:
    """One prefix per prompt, each cut to its own length and independent of the batch it came from."""

    def cut(row: int, length: int) -> Prefix:
        return prefix.mapped(lambda part: part[row : row + 1, :length].clone(), (length,))

    return [cut(row, length) for row, length in enumerate(prefix.lengths)]


def join_prefixes(parts: Sequence[Prefix]) -> Prefix:
    """Several one-prompt prefixes as a batch, right-padded with zeros."""
    if len(parts) == 1:
        return parts[0]
    return Prefix(
        tuple(pad_rows([part.hidden[i] for part in parts]) for i in range(len(parts[0].hidden))),
        tuple(pad_rows([part.keys[i] for part in parts]) for i in range(parts[0].depth)),
        tuple(pad_rows([part.values[i] for part in parts]) for i in range(parts[0].depth)),
        tuple(length for part in parts for length in part.lengths),
    )


def pad_rows(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (1, T_i, ...) as one (B, T, ...), zeros on the right."""
    longest = max(row.shape[1] for row in rows)
    if all(row.shape[1] == longest for row in rows):
        return torch.cat(tuple(rows))
    out = rows[0].new_zeros(len(rows), longest, *rows[0].shape[2:])
    for place, row in enumerate(rows):
        out[place, : row.shape[1]] = row[0]
    return out


PrefixCache = LRUCache[PromptKey, Prefix]
"""Prefixes by prompt, the least recently used dropped first."""


def prefix_cache(limit: int) -> PrefixCache:
    """An empty cache bounded in bytes."""
    return LRUCache(limit, lambda prefix: sum(map(tensor_bytes, (*prefix.hidden, *prefix.keys, *prefix.values))))
