"""Atomic writes of files and folders, and checksums that prove integrity."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

MANIFEST: Final = "manifest.json"
PARTIAL: Final = ".partial-"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_path(path: str | Path, length: int = 100) -> str:
    """A path for a message: cut after `length` characters if it is long."""
    return str(path) if len(str(path)) <= length + 20 else f"{str(path)[:length]}..."


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path next to `target`: renamed to it when the block ends, removed when the block raises."""
    temporary = _temporary(target)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace a file: readers see the old content or the new one, even after a crash."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, as `atomic_write` does."""
    atomic_write(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`: renamed to it when the block ends, removed when the block raises.

    A folder at `target` is replaced: moved out of the way before the rename, removed after it.
    """
    temporary, old = _temporary(target), _temporary(target, ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.replace(old)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove unfinished files of killed processes from `folder`; only for the one process that writes there."""
    for path in folder.glob(f".*{PARTIAL}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_manifest(folder: Path) -> None:
    """Record the checksum of every file below `folder`; written last, so a folder without it is incomplete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    digests = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    write_json(folder / MANIFEST, digests)


def integrity_error(folder: Path) -> str | None:
    """What is wrong with a folder according to its manifest; None if all files are intact."""
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


def _temporary(target: Path, kind: str = "") -> Path:
    return target.with_name(f".{target.name}{kind}{PARTIAL}{os.getpid()}")


def size_text(count: float) -> str:
    """Bytes in the largest decimal unit that leaves a number of at least 1, as in "28.9 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
