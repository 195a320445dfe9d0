"""One row of a data file, before its fields are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.data.image_index import Cell


@dataclass(frozen=True)
class Record:
    """One row of a data file.

    Args:
        place: file and row, for messages.
        split: the split the source gives it; None without one.
        fields: everything but the image; empty if the row could not be read.
        image: where the image is stored; None without one.
        error: what is wrong with the row; empty if nothing.
    """

    place: str
    split: str | None
    fields: Mapping[str, Any]
    image: Cell | Path | None = None
    error: str = ""
