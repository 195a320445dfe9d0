"""Files and hub data sets to records: fields, the image's location, and the row's place for messages.

Layouts: a data set on the Hugging Face hub, parquet files, the original JSON files of a public set, or JSON Lines.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from envs.data.catalog import OWN, DataSet, HubSplit
from envs.data.files import file_split, inside, split_of, stamp_of, walk_files
from envs.data.image_index import Cell, Table, cache_folder
from envs.data.original import read_original
from envs.data.questions import image_names, is_read, plain_fields, unread_image
from envs.data.record import Record
from envs.errors import UserError, first_line
from envs.files import atomic_file, size_text
from envs.processing.images import excerpt

_STORED: Final = b"stored in the row"
_BATCH: Final = 1000
_log = logging.getLogger(__name__)
_ROWS: Final = (".parquet", ".jsonl")
"""Endings of files of rows."""


def read_path(path: Path, entry: DataSet) -> Iterator[Record]:
    """Records of a file or folder in any of the local layouts.

    Args:
        path: a parquet, JSON Lines or JSON file, or a folder of one of these.
        entry: the set it is a copy of, whose original JSON layout is expected; `OWN` for none.

    Raises:
        UserError: nothing there that can be read.
    """
    original, files = files_of(path, entry)
    folder = path if path.is_dir() else path.parent
    if original:
        yield from read_original(files, folder, entry)
        return
    for file in files:
        yield from _read_parquet(file, folder, entry) if file.suffix == ".parquet" else _read_json_lines(file, folder)


def files_of(path: Path, entry: DataSet) -> tuple[bool, tuple[Path, ...]]:
    """Whether the data at a path are a public set's original JSON, and its files in a fixed order.

    Raises:
        UserError: nothing there that can be read.
    """
    if not path.exists():
        raise UserError(f"no data at {path}: give a folder or file of parquet, JSON Lines or JSON")
    which = f"no parquet or JSON Lines at {path}: for the original JSON of a public set say which, as in textvqa=PATH"
    if path.is_file():
        if path.suffix not in (*_ROWS, ".json"):
            raise UserError(f"cannot read {path}: give a .parquet, .jsonl or .json file, or a folder")
        if path.suffix == ".json" and entry is OWN:
            raise UserError(which)
        return path.suffix == ".json", (path,)
    below = tuple(walk_files(path))
    # A public set is one or the other; a user's folder may have both.
    for suffixes in (_ROWS,) if entry is OWN else ((suffix,) for suffix in _ROWS):
        files = tuple(sorted(file for file in below if file.suffix in suffixes))
        if files:
            return False, files
    if entry is OWN:
        raise UserError(which)
    files = tuple(sorted(file for file in below if any(file.match(glob) for glob in entry.files.values())))
    if not files:
        expected = ", ".join(dict.fromkeys(entry.files.values()))
        raise UserError(f"no parquet, JSON Lines or original files of {entry.name} below {path}: expected {expected}")
    return True, files


def read_hub(source: HubSplit, split: str | None, entry: DataSet, revision: str | None = None) -> Iterator[Record]:
    """Records of one split on the hub, downloaded by `datasets` on first use.

    Raises:
        UserError: the set cannot be fetched.
    """
    from datasets import load_dataset_builder

    try:
        with _bars_on_terminals():
            builder = load_dataset_builder(source.repo, revision=revision)
            if builder.info.download_size and not Path(builder.cache_dir).exists():
                _log.warning("%s: fetching %s from the hub", source.repo, size_text(builder.info.download_size))
            builder.download_and_prepare()
            rows = builder.as_dataset(split=source.split)
    except Exception as error:  # HTTP, cache, schema and naming errors share no base class
        raise UserError(
            f"cannot fetch {source}: {first_line(error)}; check the name and the network, or give a local folder as "
            "name=PATH"
        ) from None
    yield from _read_table(rows, str(source), split, None, f"{source}:{rows._fingerprint}", entry)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Progress bars of `datasets` on a terminal only; in a log they would be noise."""
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
        raise UserError(
            f"{repo} is no local path, and no data set of that name was found on the hub: {first_line(error)}"
        ) from None
    found = {split_of(name): HubSplit(repo, name) for name in names}
    return {split: source for split, source in found.items() if split}


def _read_parquet(file: Path, folder: Path, entry: DataSet) -> Iterator[Record]:
    from datasets import Dataset

    stamp = stamp_of(file)
    try:
        rows = Dataset.from_file(str(_as_arrow(file, stamp)))
    except Exception as error:  # Arrow and datasets raise many kinds for a damaged file
        raise UserError(f"cannot read {file}: {first_line(error)}; give a complete parquet file") from None
    yield from _read_table(rows, str(file.relative_to(folder)), file_split(file, folder), file.parent, stamp, entry)


def _as_arrow(file: Path, stamp: str) -> Path:
    """The parquet file as an Arrow file in the cache, whose rows can be read one by one.

    `datasets` itself would read `[`, `*` and `::` in a path as patterns and chains of protocols.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = cache_folder() / f"{hashlib.sha256(os.fsencode(stamp)).hexdigest()[:32]}.arrow"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as unfinished, pq.ParquetFile(file) as source:
        schema = source.schema_arrow
        for i, field in enumerate(schema):
            if pa.types.is_dictionary(field.type):  # categories, as pandas writes them
                schema = schema.set(i, field.with_type(field.type.value_type))
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in source.iter_batches(_BATCH):
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))
    return target


def _read_table(
    rows: Any, name: str, split: str | None, folder: Path | None, key: str, entry: DataSet
) -> Iterator[Record]:
    """Records of a `datasets` table; images stay in it, unused columns are not read."""
    columns = image_names(rows.column_names)
    table = Table(tuple(cached["filename"] for cached in rows.cache_files))
    arrow = rows.with_format("arrow")
    others = [c for c in rows.column_names if c not in columns]
    wanted = [c for c in others if is_read(c) or c in entry.family]
    unread = [c for c in others if c not in wanted] if entry is OWN else []
    for start in range(0, len(rows), _BATCH):
        stop = min(start + _BATCH, len(rows))
        fields = _values(arrow.select_columns(wanted)[start:stop]) if wanted else [{} for _ in range(start, stop)]
        images = {c: _cells(arrow.select_columns([c])[start:stop][c]) for c in columns}
        for i, one in enumerate(fields):
            record = Record(f"{name}, row {start + i}", split, plain_fields(one))
            column = next((c for c in columns if images[c][i] is not None), "")
            if column and images[column][i] is _STORED:
                record = replace(record, image=Cell(table, start + i, column, f"{key}:{start + i}:{column}"))
            elif column:
                record = _named_image(record, folder, images[column][i])
            elif unread:
                images |= {c: _cells(arrow.select_columns([c])[start:stop][c]) for c in unread if c not in images}
                record = replace(record, error=unread_image({c: images[c][i] for c in unread}))
            yield _own_split(record) if entry is OWN else record


def _values(table: Any) -> list[dict[str, Any]]:
    """Rows as Python values; 32-bit numbers as they are written (3.3, not 3.299999952316284)."""
    narrow = {field.name: field.type for field in table.schema if "float" in str(field.type)}
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        row.update({name: _shortest(row[name], kind) for name, kind in narrow.items()})
    return rows


def _shortest(value: Any, kind: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    if isinstance(value, float) and (pa.types.is_float32(kind) or pa.types.is_float16(kind)):
        return float(str(np.float32(value) if pa.types.is_float32(kind) else np.float16(value)))
    if isinstance(value, list):
        return [_shortest(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    return value


def _cells(column: Any) -> list[Any]:
    """The content of each image cell: `_STORED` for bytes, a path, None, or what is none of these."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if any(is_bytes(kind) for is_bytes in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        return [_STORED if valid else None for valid in column.is_valid().to_pylist()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.list_value_length(column).to_pylist()
        firsts = iter(_cells(pc.list_flatten(column)) if not pa.types.is_integer(kind.value_type) else [])
        cells = [[next(firsts, None) for _ in range(n or 0)] for n in lengths]
        return [(cell[0] if len(cell) == 1 else cell) if cell else None for cell in cells]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        inner = {name: _cells(pc.struct_field(column, name)) for name in names}
        rows = [{name: cells[i] for name, cells in inner.items()} for i in range(len(column))]
        if not {"bytes", "path"}.isdisjoint(names):  # an image as `datasets` writes it
            return [row.get("bytes") or row.get("path") for row in rows]
        return [row if valid else None for row, valid in zip(rows, column.is_valid().to_pylist(), strict=True)]
    return [value if value != "" else None for value in column.to_pylist()]


def _named_image(record: Record, folder: Path | None, name: Any) -> Record:
    """The record with the file that its image cell names; a hub set has no folder."""
    try:
        if isinstance(name, list) and len(name) > 1:
            raise UserError(f"the row has {len(name)} images: give one")
        if folder is None:
            raise UserError(f"image is {excerpt(name)}, which is not stored in the row")
        return replace(record, image=inside(folder, name))
    except UserError as error:
        return replace(record, error=error.message)


def _own_split(record: Record) -> Record:
    """The record with its own split, if it names one."""
    own = record.fields.get("split")
    if own is None or record.error:
        return record
    if not isinstance(own, str) or split_of(own) is None:
        return replace(record, error=f"split is {excerpt(own)}: give train, validation or test")
    return replace(record, split=split_of(own))


def _read_json_lines(file: Path, folder: Path) -> Iterator[Record]:
    name, split = str(file.relative_to(folder)), file_split(file, folder)
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = Record(f"{name}, line {number}", split, {})
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield replace(record, error=f"not JSON: {error}")
            continue
        if isinstance(fields, dict):
            yield _own_split(_own_image(replace(record, fields=plain_fields(fields)), fields, file.parent))
        else:
            yield replace(record, error=f"a {type(fields).__name__}, not an object with question and answers")


def _own_image(record: Record, fields: Mapping[str, Any], folder: Path) -> Record:
    """The record with the image that the fields name as they are written, which may be null."""
    name = next((fields[key] for key in image_names(fields) if fields[key] not in (None, "", [])), None)
    if name is None:
        return replace(record, error=unread_image(fields))
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if isinstance(name, Mapping):  # an image as `datasets` writes it
        name = name.get("path") or name
    return _named_image(record, folder, name)
