"""Files of a data folder: which belong to it, the split in their name, and paths that rows name."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any, Final

from envs.errors import UserError
from envs.processing.images import excerpt

_FOREIGN: Final = ("__MACOSX", "__pycache__")
_RUN_FILES: Final = {"config.yaml", "run.json"}
"""A folder that contains these is a run's, and its JSON Lines are metrics, not data."""

_SPLIT_WORD: Final = re.compile(
    r"(?:mini|sub)?(?:(?P<train>train(?:ing|val)?)|(?P<validation>val(?:id(?:ation)?)?|dev(?:el(?:opment)?)?|eval(?:uation)?)"
    r"|(?P<test>(?:dev|train|val)?test(?:ing|dev|std|challenge|[abc])?|h[eo]ldout))(?:s|set|split|data|mini)?"
)
_TWO_WORDS: Final = (("test", "dev|std"), ("h[eo]ld", "out"))
"""A split word and what may follow it as a word of its own: `test-dev`, `held_out`."""


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

    Numbers do not count (`val2014`, `test1`, `test4k`), nor does the case (`myTest`).
    """
    joined = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
    for first, second in _TWO_WORDS:
        joined = re.sub(rf"(?<![a-z])({first})[\W_]*({second})(?![a-z])", r"\1\2", joined)
    found = [_SPLIT_WORD.fullmatch(word) for word in re.findall(r"[a-z]+", joined)]
    return next((match.lastgroup for match in reversed(found) if match), None)


def file_split(file: Path, folder: Path) -> str | None:
    """Split by the file's own name, else by the folders it is in."""
    relative = file.relative_to(folder)
    return split_of(relative.stem) or split_of("/".join(relative.parts[:-1]))


def stamp_of(path: Path) -> str:
    """A text that changes whenever the file's content may have, even if size and modification time stay the same.

    Raises:
        UserError: a link that leads nowhere, or no regular file, such as a pipe.
    """
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise UserError(f"cannot read {path}: it is no regular file; remove it")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; restore it, or remove it") from None
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
