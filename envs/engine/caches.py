"""Caches bounded in bytes or entries; the least recently used goes first."""

from contextlib import suppress
from typing import Any

from cachetools import LRUCache
from torch import Tensor


def keep(cache: LRUCache[Any, Any], key: Any, value: Any) -> None:
    """Put a value into a bounded cache; one that is larger than the bound is not kept."""
    with suppress(ValueError):
        cache[key] = value


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()
