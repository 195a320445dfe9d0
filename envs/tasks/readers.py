"""Files and hub data sets to records: fields, where the image is, and the place to name in errors.

Layouts: a data set on the Hugging Face hub, parquet files, the original JSON files beside their
images, or a user's own JSON Lines. Paths named in data files must stay inside their folder.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from envs.errors import UserError, first_line
from envs.tasks.rows import FIELDS
from envs.tasks.scan import Table
from envs.tasks.table import OWN, DataSet, HubSplit

IMAGE_ENDINGS: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_STORED: Final = object()
_BATCH: Final = 1000
_IMAGE_COLUMNS: Final = ("image", "images", "img")
_SPLIT_WORDS: Final = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "val2014": "validation",
    "val2017": "validation",
    "test": "test",
    "testing": "test",
}
_PUBLISHED: Final = {"train": "train", "validation": "val", "test": "test"}
_COCO_FOLDERS: Final = {"train": "train2014", "validation": "val2014", "test": "test2015"}


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


def read_path(path: Path, entry: DataSet) -> Iterator[Record]:
    """Records of a file or folder in any of the local layouts.

    Args:
        path: a parquet, JSON Lines or JSON file, or a folder of one of these.
        entry: the set it is a copy of, whose original JSON layout is expected; `OWN` for none.

    Raises:
        UserError: nothing there that can be read.
    """
    layout, files = files_of(path, entry)
    folder = path if path.is_dir() else path.parent
    if layout == "parquet":
        for file in files:
            yield from _read_parquet(file, folder, entry)
    elif layout == "jsonl":
        for file in files:
            yield from _read_json_lines(file, folder)
    else:
        yield from _read_original(files, folder, entry)


def files_of(path: Path, entry: DataSet) -> tuple[str, tuple[Path, ...]]:
    """The layout at a path (`parquet`, `jsonl` or `json`) and its files in a fixed order.

    Raises:
        UserError: nothing there that can be read.
    """
    if not path.exists():
        raise UserError(f"no data at {path}: give a folder or file of parquet, JSON Lines or JSON")
    if path.is_file():
        layout = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "json"}.get(path.suffix)
        if layout is None:
            raise UserError(f"cannot read {path}: give a .parquet, .jsonl or .json file, or a folder")
        if layout == "json" and entry is OWN:
            raise UserError(_which_set(path))
        return layout, (path,)
    for layout in ("parquet", "jsonl"):
        files = tuple(sorted(p for p in path.rglob(f"*.{layout}") if p.is_file()))
        if files:
            return layout, files
    if entry is OWN:
        raise UserError(_which_set(path))
    globs = entry.files.values()
    files = tuple(sorted({file for glob in globs for file in path.rglob(glob) if file.is_file()}))
    if not files:
        expected = ", ".join(dict.fromkeys(globs))
        raise UserError(f"no parquet, JSON Lines or original files of {entry.name} below {path}: expected {expected}")
    return "json", files


def _which_set(path: Path) -> str:
    return f"no parquet or JSON Lines at {path}: for the original JSON of a public set say which, such as textvqa=PATH"


def read_hub(source: HubSplit, split: str | None, entry: DataSet, revision: str | None = None) -> Iterator[Record]:
    """Records of one split on the hub, downloaded by `datasets` on first use.

    Raises:
        UserError: the set cannot be fetched.
    """
    from datasets import load_dataset

    try:
        with _bars_on_terminals():
            rows = load_dataset(source.repo, source.config, split=source.split, revision=revision)
    except Exception as error:  # HTTP, cache, schema and naming errors share no base class
        reason = first_line(error)
        raise UserError(
            f"cannot fetch {source}: {reason}; check the name and the network, or give a local folder as name=PATH"
        ) from None
    yield from _read_table(rows, str(source), split, None, f"{source}:{rows._fingerprint}", entry)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Progress bars of `datasets` where someone watches; in a log they would only be noise."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    change = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


def hub_splits(repo: str, revision: str | None = None) -> dict[str, HubSplit]:
    """The train, validation and test splits a hub data set has."""
    from datasets import get_dataset_split_names

    try:
        names = get_dataset_split_names(repo, revision=revision)
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"{repo} is no local path, and no data set of that name was found on the hub: {reason}"
        ) from None
    found = {split_of(name): HubSplit(repo, name) for name in names if split_of(name)}
    return {split: source for split, source in found.items() if split}


def split_of(name: str) -> str | None:
    """The split a file's or folder's name speaks of: the last split word in it; None without."""
    words = [_SPLIT_WORDS[w] for w in re.findall(r"[a-z0-9]+", name.lower()) if w in _SPLIT_WORDS]
    return words[-1] if words else None


def _file_split(file: Path, folder: Path) -> str | None:
    """Split by the file's own name, else by the folders between."""
    relative = file.relative_to(folder)
    return split_of(relative.stem) or split_of("/".join(relative.parts[:-1]))


def _read_parquet(file: Path, folder: Path, entry: DataSet) -> Iterator[Record]:
    from datasets import Dataset

    try:
        with _bars_on_terminals():
            rows = Dataset.from_parquet(str(file), keep_in_memory=False)
    except Exception as error:  # Arrow and datasets raise many kinds for a damaged file
        reason = first_line(error.__cause__ or error)
        raise UserError(f"cannot read {file}: {reason}; give a whole parquet file") from None
    stat = file.stat()
    key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    place = str(file.relative_to(folder))
    yield from _read_table(rows, place, _file_split(file, folder), file.parent, key, entry)


def _read_table(
    rows: Any, name: str, split: str | None, folder: Path | None, key: str, entry: DataSet
) -> Iterator[Record]:
    """Records of a `datasets` table; images stay where they are, unused columns are not read."""
    column = next((c for c in _IMAGE_COLUMNS if c in rows.column_names), None)
    table = Table(tuple(cached["filename"] for cached in rows.cache_files))
    wanted = [c for c in rows.column_names if c in FIELDS or c in entry.family]
    text = rows.select_columns(wanted).with_format("arrow") if wanted else None
    images = rows.select_columns([column]).with_format("arrow") if column else None
    for start in range(0, len(rows), _BATCH):
        stop = min(start + _BATCH, len(rows))
        fields = text[start:stop].to_pylist() if text is not None else [{}] * (stop - start)
        cells = _cells(images[start:stop][column]) if images is not None else [None] * len(fields)
        for row, one, cell in zip(range(start, stop), fields, cells, strict=True):
            record = Record(f"{name}, row {row}", split, one)
            if cell is _STORED:
                assert column is not None
                yield replace(record, image=Cell(table, row, column, f"{key}:{row}"))
            elif cell is None:
                yield record
            else:
                yield _named_image(record, folder, cell)


def _cells(column: Any) -> list[Any]:
    """What each image cell holds: `_STORED` bytes, a path, or None for nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [_STORED if valid else None for valid in column.is_valid().to_pylist()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.list_value_length(column).to_pylist()
        return [_STORED if n == 1 else (f"{n} images" if n else None) for n in lengths]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        stored = pc.struct_field(column, "bytes").is_valid().to_pylist() if "bytes" in names else []
        paths = pc.struct_field(column, "path").to_pylist() if "path" in names else []
        pairs = zip_longest(stored, paths)
        return [_STORED if bytes_there else path for bytes_there, path in pairs]
    return column.to_pylist()


def _named_image(record: Record, folder: Path | None, name: Any) -> Record:
    """The record with the file its image cell names; hub sets have no folder to look in."""
    try:
        if folder is None:
            raise UserError(f"image is {name!r}, which is not stored in the row")
        return replace(record, image=inside(folder, name))
    except UserError as error:
        return replace(record, error=error.message)


def _read_json_lines(file: Path, folder: Path) -> Iterator[Record]:
    name, split = str(file.relative_to(folder)), _file_split(file, folder)
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Record(place, split, {}, error=f"not JSON: {error}")
            continue
        if not isinstance(fields, dict):
            kind = type(fields).__name__
            yield Record(place, split, {}, error=f"a {kind}, not an object with question and answers")
            continue
        yield _own_record(place, split, fields, file.parent)


def _own_record(place: str, split: str | None, fields: dict[str, Any], folder: Path) -> Record:
    """A record of a user's file: the image is a path from the file's folder, or null."""
    own = fields.get("split")
    if own is not None and (not isinstance(own, str) or split_of(own) is None):
        error = f"split is {own!r}: give train, validation or test"
        return Record(place, split, fields, error=error)
    split = split_of(own) if own else split
    image = fields.get("image")
    if image is None:
        return Record(place, split, fields)
    try:
        return Record(place, split, fields, inside(folder, image))
    except UserError as error:
        return Record(place, split, fields, error=error.message)


def inside(folder: Path, name: Any) -> Path:
    """The file a data file names, which must exist inside its folder, links followed.

    Raises:
        UserError: not a path, outside the folder, or no such file.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"image is {name!r}: give a path from the data file's folder")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"image {name!r} is outside {folder}: keep images inside the data's folder")
    try:
        found = path.is_file()
    except OSError:  # a name too long for this file system
        found = False
    if not found:
        raise UserError(f"no image {name!r} in {folder}")
    return path


class _ImageIndex:
    """Image files below a folder, found by the end of their path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_name: dict[str, list[str]] = {}
        for place, _, names in os.walk(folder):
            for name in names:
                if name.lower().endswith(IMAGE_ENDINGS):
                    relative = os.path.relpath(os.path.join(place, name), folder)
                    self.by_name.setdefault(name, []).append(Path(relative).as_posix())

    def find(self, name: str) -> Path:
        """The file whose path ends in `name`, else the only one of that file name."""
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            return inside(self.folder, name)
        known = self.by_name.get(parts[-1], [])
        ending = [path for path in known if f"/{path}".endswith(f"/{Path(name).as_posix()}")]
        for found in (ending, known):
            if len(found) == 1 or name in found:
                return inside(self.folder, name if name in found else found[0])
        if known:
            raise UserError(f"image {name!r} could be any of {', '.join(sorted(known)[:3])}")
        raise UserError(f"no image {name!r} below {self.folder}")


def _read_original(files: Iterable[Path], folder: Path, entry: DataSet) -> Iterator[Record]:
    """Records of a public set's own JSON files; images are looked for below the folder."""
    index = _ImageIndex(folder)
    for file in files:
        split = _original_split(file, entry)
        name = str(file.relative_to(folder))
        content = _load_json(file)
        for key, fields in _records(content, file):
            place = f"{name}, record {key}"
            if not isinstance(fields, dict):
                yield Record(place, split, {}, error=f"a {type(fields).__name__}, not an object")
                continue
            own = split or split_of(str(fields.get("split", "")))
            try:
                yield Record(place, own, fields, _original_image(fields, key, own, entry, index))
            except UserError as error:
                yield Record(place, own, fields, error=error.message)


def _original_split(file: Path, entry: DataSet) -> str | None:
    for split, glob in entry.files.items():
        if split and file.match(glob):
            return split
    return None


def _original_image(
    fields: Mapping[str, Any], key: str, split: str | None, entry: DataSet, index: _ImageIndex
) -> Path | None:
    """Where a record's image is; None where the record has none."""
    if entry.images_only and not fields.get("image"):
        return None
    values = {
        **fields,
        "key": key,
        "split": _PUBLISHED.get(split or "", ""),
        "coco": _COCO_FOLDERS.get(split or "", ""),
    }
    try:
        name = entry.image.format_map(values)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"the image's name {entry.image} cannot be made: {reason}") from None
    return index.find(name)


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {file}: {reason}; give the file as published") from None


def _records(content: Any, file: Path) -> Iterator[tuple[str, Any]]:
    """The records of an original file, in whichever of the published shapes."""
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        answers = _annotations(file)
        for key, fields in enumerate(content["questions"]):
            known = answers.get(fields.get("question_id")) if isinstance(fields, dict) else None
            yield str(key), {**known, **fields} if known else fields
    elif isinstance(content, dict) and isinstance(content.get("data"), list):
        yield from ((str(key), fields) for key, fields in enumerate(content["data"]))
    elif isinstance(content, list):
        yield from ((str(key), fields) for key, fields in enumerate(content))
    elif isinstance(content, dict):
        yield from content.items()
    else:
        raise UserError(f"{file} holds a {type(content).__name__}: give the file as published")


def _annotations(file: Path) -> dict[Any, dict[str, Any]]:
    """Answers to the questions of a VQA file, from the annotations beside it."""
    name = file.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    beside = file.with_name(name)
    if not beside.is_file():
        raise UserError(f"no {name} beside {file}: the answers to its questions are missing")
    content = _load_json(beside)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{beside} has no list of annotations: give the file as published")
    return {annotation.get("question_id"): annotation for annotation in annotations if isinstance(annotation, dict)}
