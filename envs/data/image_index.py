"""What is learnt about every image of a set once: its digest, its size, whether it can be read.

Each image is read and decoded (JPEGs at an eighth of their size), so a truncated one is found when
the set is opened and not in the middle of training. Results are kept in the cache of `datasets`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from envs.data.sample import ImageRef
from envs.errors import UserError
from envs.files import atomic_write
from envs.processing.images import open_image, oriented_size, read_image


@dataclass(frozen=True)
class Table:
    """Rows that `datasets` keeps in Arrow files on this machine; small to pickle."""

    files: tuple[str, ...]

    def image_bytes(self, row: int, column: str) -> bytes | str | None:
        """The stored content of an image cell: its bytes, or the path it names instead."""
        cell = _open_table(self)[row : row + 1][column].to_pylist()[0]
        if isinstance(cell, list):
            cell = cell[0] if len(cell) == 1 else None
        if isinstance(cell, Mapping):
            cell = cell.get("bytes") or cell.get("path")
        return cell if isinstance(cell, bytes | str) and cell else None


@lru_cache(maxsize=64)
def _open_table(table: Table) -> Any:
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(file) for file in table.files]
    return concatenate_datasets(parts).with_format("arrow")


@dataclass(frozen=True)
class TableImage(ImageRef):
    """An image stored in a table's row."""

    table: Table
    row: int
    column: str
    place: str
    digest: str
    size_wh: tuple[int, int]

    def load(self) -> Image.Image:
        content = self.table.image_bytes(self.row, self.column)
        if not isinstance(content, bytes):
            raise UserError(f"the image at {self.place} is gone: its cached table has changed")
        return open_image(content, f"the image at {self.place}")

    @property
    def size(self) -> tuple[int, int]:
        return self.size_wh


@dataclass(frozen=True)
class Scan:
    """What a scan found: digest and size, or what is wrong."""

    digest: str = ""
    width: int = 0
    height: int = 0
    error: str = ""


def scan_bytes(content: bytes) -> Scan:
    """Scans one encoded image."""
    try:
        width, height = read_image(content, "the image", _decoded_size)
    except UserError as error:
        return Scan(error=error.message)
    return Scan(hashlib.sha256(content).hexdigest(), width, height)


def _decoded_size(image: Image.Image) -> tuple[int, int]:
    size = oriented_size(image)
    image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()
    return size


def scan_file(path: Path) -> Scan:
    """Scans one image file."""
    try:
        return scan_bytes(path.read_bytes())
    except OSError as error:
        return Scan(error=f"image {path} cannot be read: {error.strerror or error}")


def scan_all(name: str, stamps: Sequence[str], scan: Callable[[int], Scan], cache_key: str) -> list[Scan]:
    """Scans many images side by side, taking what an earlier run has found from the cache.

    Args:
        name: shown with the progress bar.
        stamps: one text per image that changes when its content does.
        scan: scans image number i.
        cache_key: names the cache file.
    """
    path = cache_folder() / f"{hashlib.sha256(os.fsencode(cache_key)).hexdigest()[:32]}.json"
    known = _read_cache(path)
    missing = [i for i, stamp in enumerate(stamps) if stamp not in known]
    if missing:
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            found = tqdm(
                pool.map(scan, missing),
                total=len(missing),
                desc=f"reading images of {name}",
                delay=3,
                leave=False,
                disable=None,  # nothing where no terminal shows it
            )
            known.update(zip((stamps[i] for i in missing), found, strict=True))
        _write_cache(path, {stamp: known[stamp] for stamp in stamps})
    return [known[stamp] for stamp in stamps]


def cache_folder() -> Path:
    """Where tables and what was learnt about images are kept between runs."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "ray-ctrl-scans"


def _read_cache(path: Path) -> dict[str, Scan]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {stamp: Scan(*values) for stamp, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # a cache that is absent or damaged is made anew


def _write_cache(path: Path, scans: Mapping[str, Scan]) -> None:
    content = {stamp: [s.digest, s.width, s.height, s.error] for stamp, s in scans.items()}
    with suppress(OSError):  # a cache that cannot be kept only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(content))
