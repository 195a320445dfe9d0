"""Records to samples: checked, scanned, and divided so that no image is in two splits."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from envs.data.catalog import OWN, DataSet
from envs.data.files import stamp_of
from envs.data.image_index import Scan, TableImage, scan_all, scan_bytes, scan_file
from envs.data.questions import RowError, has_answers, questions
from envs.data.readers import files_of, hub_splits, read_hub, read_path
from envs.data.record import Cell, Record
from envs.data.sample import FileImage, ImageRef, Sample, content_id
from envs.errors import UserError

OnBroken = Literal["refuse", "skip"]
HELD_OUT: Final = 10
"""One image in this many is held out where a source has no validation or test split of its own."""

SPLIT_NAMES: Final = ("train", "validation", "test")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A data set and where to read it: a local path, a hub id, or, with neither, its hub copy."""

    entry: DataSet
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        return str(self.path or self.repo or self.entry.name)


@dataclass(frozen=True)
class _Row:
    """A sample and the source's split it stood in."""

    split: str | None
    sample: Sample


def read_source(source: Source, on_broken: OnBroken) -> dict[str, tuple[Sample, ...]]:
    """All samples of a source, divided into train, validation and test.

    Splits the source names are kept; where it has no validation or test split, a tenth of the
    images of the remaining ones is held out for each. The division depends on the images alone.

    Raises:
        UserError: nothing readable, a broken row under `refuse`, or nothing left.
    """
    return _read(source, on_broken, _stamp(source))


@lru_cache(maxsize=8)
def _read(source: Source, on_broken: OnBroken, stamp: tuple[str, ...]) -> dict[str, tuple[Sample, ...]]:
    del stamp  # part of the cache's key: changed files are read anew
    rows = _rows(source, on_broken)
    if not rows:
        raise UserError(f"{source.name} holds no usable row: give at least three images")
    return divide(rows, source.name, published=source.entry is not OWN)


def _stamp(source: Source) -> tuple[str, ...]:
    if source.path is None:
        return ()
    _, files = files_of(source.path, source.entry)
    return tuple(stamp_of(file) for file in files)


def _records(source: Source) -> Iterable[Record]:
    if source.path is not None:
        yield from read_path(source.path, source.entry)
        return
    splits = hub_splits(source.repo, source.revision) if source.repo else source.entry.hub
    for split, place in splits.items():
        yield from read_hub(place, split, source.entry, source.revision)


def _rows(source: Source, on_broken: OnBroken) -> list[_Row]:
    records = list(_records(source))
    if source.entry.images_only:
        records = [record for record in records if record.image is not None or record.error]
    # Published test splits often come without answers: such a split counts as absent.
    answered = {record.split for record in records if record.error or has_answers(record.fields)}
    if answered:
        records = [record for record in records if record.split in answered]
    images = _scan(records, source.name)
    broken = _Broken(source.name, on_broken)
    rows = []
    for record in records:
        try:
            rows.extend(_row(record, images, source.entry))
        except RowError as error:
            broken.report(record.place, str(error))
    broken.summary(len(records))
    metrics = Counter(row.sample.metric.partition(":")[0] for row in rows)
    pictured = sum(row.sample.image is not None for row in rows)
    scored = ", ".join(f"{count} by {metric}" for metric, count in metrics.most_common())
    _log.info("%s: %d questions, %d with an image; scored: %s", source.name, len(rows), pictured, scored)
    return rows


def _row(record: Record, images: dict[str, Scan], entry: DataSet) -> list[_Row]:
    if record.error:
        raise RowError(record.error)
    asked = list(questions(record.fields, entry))
    image = _image(record, images)
    if image is None and entry is not OWN:
        raise RowError("no image")
    digest = image.digest if image else None
    return [
        _Row(
            record.split,
            Sample(
                id=content_id(digest, one.question, one.answers),
                image=image,
                question=one.question,
                answers=one.answers,
                metric=one.metric,
                style=one.style,
                family=one.family,
            ),
        )
        for one in asked
    ]


def _image(record: Record, images: dict[str, Scan]) -> ImageRef | None:
    if record.image is None:
        return None
    scan = images[_image_key(record.image)]
    if scan.error:
        raise RowError(scan.error)
    size = (scan.width, scan.height)
    if isinstance(record.image, Cell):
        cell = record.image
        return TableImage(cell.table, cell.row, cell.column, record.place, scan.digest, size)
    return FileImage(str(record.image), scan.digest, size)


def _image_key(image: Cell | Path) -> str:
    return image.stamp if isinstance(image, Cell) else str(image)


def _scan(records: Sequence[Record], name: str) -> dict[str, Scan]:
    """Every image of the records once, by its key."""
    images = {_image_key(r.image): r.image for r in records if r.image is not None and not r.error}
    unique = list(images.values())
    stamps = [image.stamp if isinstance(image, Cell) else stamp_of(image) for image in unique]
    found = scan_all(name, stamps, lambda i: _scan_one(unique[i]), name)
    return dict(zip(images, found, strict=True))


def _scan_one(image: Cell | Path) -> Scan:
    if isinstance(image, Path):
        return scan_file(image)
    content = image.table.image_bytes(image.row, image.column)
    if not isinstance(content, bytes):
        return Scan(error="the image cell holds no image")
    return scan_bytes(content)


class _Broken:
    """Rows that cannot be used: the first is refused, or all are skipped and counted."""

    def __init__(self, name: str, on_broken: OnBroken) -> None:
        self.name, self.on_broken, self.count = name, on_broken, 0

    def report(self, place: str, reason: str) -> None:
        if self.on_broken == "refuse":
            raise UserError(f"{self.name}: {place}: {reason}; fix or remove the row, or let such rows be skipped")
        self.count += 1
        if self.count <= 10:
            _log.warning("%s: %s: %s; row skipped", self.name, place, reason)

    def summary(self, rows: int) -> None:
        if self.count:
            _log.warning("%s: %d of %d rows skipped as broken", self.name, self.count, rows)


def divide(rows: Sequence[_Row], name: str, *, published: bool) -> dict[str, tuple[Sample, ...]]:
    """Rows by split, no image in two of them; validation and test are held out where missing.

    The validation split of a published set without a test split is what its results are reported
    on, so it becomes the test split. A user's own splits keep their names.

    Raises:
        UserError: too few images to fill three splits.
    """
    by_split: dict[str, list[Sample]] = {}
    for row in rows:
        by_split.setdefault(row.split or "train", []).append(row.sample)
    pool = by_split.pop(next(split for split in SPLIT_NAMES if split in by_split))
    parts: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    parts["test"] = by_split.pop("test", [])
    if published and not parts["test"]:
        parts["test"] = by_split.pop("validation", [])
    parts["validation"] = by_split.pop("validation", [])
    given = {_key(sample) for part in parts.values() for sample in part}
    wanted = [split for split in ("test", "validation") if not parts[split]]
    held = _hold_out({_key(sample) for sample in pool} - given, wanted)
    for sample in pool:
        parts[held.get(_key(sample), "train")].append(sample)
    divided = keep_apart(parts)
    empty = [split for split, samples in divided.items() if not samples]
    if empty:
        raise UserError(
            f"{name} leaves no {' or '.join(empty)} samples: give at least three different images, "
            "in splits that do not share them all"
        )
    return divided


def _key(sample: Sample) -> str:
    """What two splits must not share: the image, or without one the question."""
    return sample.image.digest if sample.image else f"text:{sample.question}"


def _hold_out(keys: set[str], splits: Sequence[str]) -> dict[str, str]:
    """Which images go to which of the splits to be filled; the rest are for training."""
    share = max(1, round(len(keys) / HELD_OUT))
    held = sorted(keys)[: share * len(splits)]
    return {key: splits[i // share] for i, key in enumerate(held)}


def keep_apart(parts: dict[str, list[Sample]]) -> dict[str, tuple[Sample, ...]]:
    """No image in two splits: test keeps it before validation, validation before train.

    Samples that say the same as an earlier one are left out, so ids are unique.
    """
    taken: set[str] = set()
    divided: dict[str, tuple[Sample, ...]] = {}
    for split in ("test", "validation", "train"):
        kept = [sample for sample in parts[split] if _key(sample) not in taken]
        divided[split] = unique(kept)
        taken |= {_key(sample) for sample in kept}
    return {split: divided[split] for split in SPLIT_NAMES}


def unique(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Samples in order, the first of each id."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.id, sample)
    return tuple(first.values())
