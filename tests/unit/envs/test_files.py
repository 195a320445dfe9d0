"""Files and folders are replaced completely or not at all; manifests find every change."""

from pathlib import Path

import pytest

from envs.files import atomic_file, atomic_folder, atomic_write, integrity_error, remove_partial, write_manifest


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write(target, "old")
    with pytest.raises(OSError, match="full"):
        _write_and_fail(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    atomic_write(target, b"new")
    assert target.read_bytes() == b"new"


def test_a_folder_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with atomic_folder(target) as temporary:
        (temporary / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as temporary:
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_folder(target) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_remains_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.partial-1").mkdir()
    (tmp_path / ".b.partial-2").touch()
    (tmp_path / "kept").touch()
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "sub" / "b").write_bytes(b"changed"), "sub/b is corrupt"),
        (lambda folder: (folder / "a").unlink(), "a is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "not complete"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is corrupt"),
        (lambda folder: (folder / "manifest.json").write_text("3"), "is corrupt"),
    ],
)
def test_every_change_is_found(tmp_path: Path, change, words) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "sub" / "b").write_bytes(b"b")
    write_manifest(tmp_path)
    assert integrity_error(tmp_path) is None
    change(tmp_path)
    assert words in str(integrity_error(tmp_path))


def _write_and_fail(target: Path) -> None:
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        raise OSError("full")
