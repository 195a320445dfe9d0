"""Files of a data folder: which belong to it, the split in their name, and paths that rows name."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from envs.errors import UserError
from envs.processing.images import excerpt

_FOREIGN: Final = ("__MACOSX", "__pycache__")
_RUN_FILES: Final = {"config.yaml", "run.json"}
"""A folder that contains these is a run's, and its JSON Lines are metrics, not data."""

_SPLIT_WORD: Final = re.compile(
    r"(?P<train>train(?:ing|val)?)|(?P<validation>(?:mini)?val(?:id(?:ation)?)?|dev|eval(?:uation)?)"
    r"|(?P<test>test(?:ing|dev|std)?|held?out)"
)


def walk_files(folder: Path) -> Iterator[Path]:
    """Files below a folder in a fixed order, links followed.

    Left out: hidden files and folders (`._x.jsonl`, `.ipynb_checkpoints`), archive leftovers, and run folders.
    """
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered or _RUN_FILES.issubset(names):  # a link to a folder above would never end
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _FOREIGN)
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def split_of(name: str) -> str | None:
    """The split in a file's or folder's name: that of its last split word; None without.

    Numbers after a word do not count (`val2014`, `test1`), nor does the case (`myTest`).
    """
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    joined = re.sub(r"test[\W_]+(dev|std)(?![a-z])", r"test\1", separated.lower())
    found = [_SPLIT_WORD.fullmatch(word.rstrip("0123456789")) for word in re.findall(r"[a-z0-9]+", joined)]
    return next((match.lastgroup for match in reversed(found) if match), None)


def file_split(file: Path, folder: Path) -> str | None:
    """Split by the file's own name, else by the folders it is in."""
    relative = file.relative_to(folder)
    return split_of(relative.stem) or split_of("/".join(relative.parts[:-1]))


def stamp_of(path: Path) -> str:
    """A text that changes whenever the file's content may have, even if size and modification time stay the same."""
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"


def inside(folder: Path, name: Any) -> Path:
    """The file a row names, which must exist below the folder as the path is written.

    Links in the folder are followed wherever they lead, as snapshots of the hub need.

    Raises:
        UserError: not a path, outside the folder, or no such file.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"image is {excerpt(name)}: give a path from the data file's folder")
    path = folder / name
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise UserError(f"image {excerpt(name)} is outside {folder}: keep images inside the data's folder")
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name too long for this file system, or half a character
        found = False
    if not found:
        raise UserError(f"no image {excerpt(name)} in {folder}: give a path from the data file's folder")
    return path
