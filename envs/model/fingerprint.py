"""The fingerprint of a model's weights, cached next to large weight files: hashing 14 GB takes 10 s at every start."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from envs.files import write_json
from envs.model.checkpoint import weight_files
from envs.model.config import AdaptiveMolmoEConfig

CACHE_FILE: Final = ".fingerprints.json"
MIN_CACHED_BYTES: Final = 2**28
"""Smaller weights are hashed within a fifth of a second."""


def fingerprint(config: AdaptiveMolmoEConfig, parameters: Mapping[str, Tensor]) -> str:
    """sha256 over the config and every parameter's name, dtype, shape and content."""
    digest = hashlib.sha256(json.dumps(config.to_published(), sort_keys=True).encode())
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FingerprintCache(NamedTuple):
    """Fingerprints computed before for the weight files of one folder; `key` changes when one of the files does."""

    path: Path
    key: str

    @classmethod
    def open(
        cls, folder: Path, config: AdaptiveMolmoEConfig, parameters: Mapping[str, Tensor]
    ) -> "FingerprintCache | None":
        """The cache of a model just loaded from `folder`; None for small weights.

        A file is identified by its size, modification and change times, and header.
        """
        files = weight_files(folder)
        if sum(path.stat().st_size for path in files) < MIN_CACHED_BYTES:
            return None
        digest = hashlib.sha256(json.dumps(config.to_published(), sort_keys=True).encode())
        for name, parameter in sorted(parameters.items()):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        for path in files:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}".encode())
            with path.open("rb") as file:
                digest.update(file.read(int.from_bytes(file.read(8), "little")))
        return cls(folder / CACHE_FILE, digest.hexdigest())

    def read(self) -> str | None:
        """The fingerprint, if it was computed before."""
        found = self._entries().get(self.key)
        return found if isinstance(found, str) else None

    def write(self, value: str) -> None:
        """Keep the fingerprint; does nothing in a folder that cannot be written."""
        with suppress(OSError):
            write_json(self.path, {**self._entries(), self.key: value})

    def _entries(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}
