"""The only file of this package that uses private names of Ray; a contract test checks that they still exist.

Ray has no public way to ask which files of a working directory it would send.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ray._private.runtime_env import packaging

PRIVATE_NAMES: Final = (
    (packaging, "_dir_travel", "to know which files a job sends"),
    (packaging, "_get_excludes", "to honour the excludes of a runtime environment"),
)
"""(owner, name, what for) of every name used here that Ray does not promise to keep."""


def sent_files(folder: Path, excludes: Sequence[str]) -> list[tuple[str, int]]:
    """Files that Ray would send of `folder`, relative to it, and their bytes; ignore files are honoured."""
    root, files = folder.absolute(), []

    def note(path: Path) -> None:
        if path.is_file() and not path.is_symlink():
            files.append((path.relative_to(root).as_posix(), path.stat().st_size))

    quiet = logging.getLogger("ray_ctrl.upload")
    quiet.setLevel(logging.WARNING)
    patterns = [packaging._get_excludes(root, list(excludes))] if excludes else []
    packaging._dir_travel(root, patterns, note, include_gitignore=True, logger=quiet)
    return files
