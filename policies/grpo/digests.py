"""Checksums of what processes and checkpoints hold, to compare them without sending it around."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def digest(tree: Any) -> str:
    """Checksum of all arrays and tensors in nested mappings and lists, with where they are; the rest is left out."""
    found = hashlib.sha256()
    for place, array in _arrays(tree, ""):
        found.update(f"{place} {array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _arrays(tree: Any, place: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    if isinstance(tree, torch.Tensor):
        yield place, tree.detach().cpu().numpy()
    elif isinstance(tree, np.ndarray | np.generic):
        yield place, np.asarray(tree)
    elif isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from _arrays(tree[key], f"{place}/{key}")
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        for index, value in enumerate(tree):
            yield from _arrays(value, f"{place}/{index}")
