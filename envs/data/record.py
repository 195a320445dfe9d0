"""One row of a data file, before its fields are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.data.image_index import Table


@dataclass(frozen=True)
class Cell:
    """An image stored in a table's row."""

    table: Table
    row: int
    column: str
    stamp: str


@dataclass(frozen=True)
class Record:
    """One row of a data file.

    Args:
        place: file and row, to name in errors.
        split: the split the source gives it; None where it gives none.
        fields: everything but the image; empty where the row could not be read.
        image: where the image is; None where the row has none.
        error: what is wrong with the row; empty if nothing.
    """

    place: str
    split: str | None
    fields: Mapping[str, Any]
    image: Cell | Path | None = None
    error: str = ""
