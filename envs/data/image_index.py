"""Digest, size and validity of every image of a set, found once.

Each image is read and decoded (JPEGs at an eighth of their size), so a truncated one is found when the set is opened
and not in the middle of training. Results are kept in the cache of `datasets`.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from envs.data.files import stamp_of
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

    return concatenate_datasets([Dataset.from_file(file) for file in table.files]).with_format("arrow")


class Cell(NamedTuple):
    """An image stored in a table's row; `stamp` changes with the table's content."""

    table: Table
    row: int
    column: str
    stamp: str


@dataclass(frozen=True)
class TableImage(ImageRef):
    """An image stored in a table's row; `place` names the row in messages."""

    cell: Cell
    place: str
    digest: str
    size_wh: tuple[int, int]

    def load(self) -> Image.Image:
        content = self.cell.table.image_bytes(self.cell.row, self.cell.column)
        if not isinstance(content, bytes):
            raise UserError(f"the image at {self.place} is gone: its cached table has changed")
        return open_image(content, f"the image at {self.place}")

    @property
    def size(self) -> tuple[int, int]:
        return self.size_wh


class Scan(NamedTuple):
    """Digest and size of an image, or what is wrong with it."""

    digest: str = ""
    width: int = 0
    height: int = 0
    error: str = ""


def scan_images(name: str, images: Collection[Cell | Path]) -> dict[Cell | Path, Scan]:
    """Scans images in parallel, except those that an earlier run has scanned; `name` names set and cache file."""
    path = cache_folder() / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"
    stamps = {image: image.stamp if isinstance(image, Cell) else stamp_of(image) for image in images}
    known = _read_cache(path)
    missing = [image for image in images if stamps[image] not in known]
    if missing:
        console = Console(stderr=True)
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            found = track(
                pool.map(_scan, missing),
                f"reading images of {escape(name)}",
                total=len(missing),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            known.update(zip((stamps[image] for image in missing), found, strict=True))
        with suppress(OSError):  # a cache that cannot be kept only costs time
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps({stamp: known[stamp] for stamp in stamps.values()}))
    return {image: known[stamp] for image, stamp in stamps.items()}


def _scan(image: Cell | Path) -> Scan:
    try:
        content = image.read_bytes() if isinstance(image, Path) else image.table.image_bytes(image.row, image.column)
    except OSError as error:
        return Scan(error=f"image {image} cannot be read: {error.strerror or error}")
    if not isinstance(content, bytes):
        return Scan(error="the image cell contains no image")
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


def cache_folder() -> Path:
    """Where tables and scans are kept between runs."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "ray-ctrl-scans"


def _read_cache(path: Path) -> dict[str, Scan]:
    try:
        return {stamp: Scan(*values) for stamp, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent or damaged: written anew
