"""Files that readers see completely or not at all, and checksums that prove it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

MANIFEST: Final = "manifest.json"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace a file: readers see the old content or the new one, even after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, renamed to it when the block ends and removed when the block raises.

    A folder at `target` is replaced: moved out of the way before the rename, removed after it.
    """
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.replace(old)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Record the checksum of every file below `folder`; written last, so a folder without it is incomplete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    digests = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    atomic_write(folder / MANIFEST, json.dumps(digests, indent=2) + "\n")


def integrity_error(folder: Path) -> str | None:
    """What is wrong with a folder according to its manifest; None when every file is as it was written."""
    try:
        digests = json.loads((folder / MANIFEST).read_text("utf-8"))
        items = list(dict(digests).items())
    except OSError as error:
        return f"it is not complete ({MANIFEST}: {error.strerror})"
    except (ValueError, TypeError):
        return f"its {MANIFEST} is corrupt"
    for name, expected in items:
        if not (folder / name).is_file():
            return f"file {name} is missing"
        if sha256_file(folder / name) != expected:
            return f"file {name} is corrupt"
    return None
