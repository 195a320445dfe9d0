"""Records to samples: checked, scanned, and divided so that no image is in two splits."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from envs.data.catalog import OWN, DataSet
from envs.data.files import stamp_of
from envs.data.image_index import Cell, Scan, TableImage, scan_images
from envs.data.questions import RowError, has_answers, questions
from envs.data.readers import files_of, hub_splits, read_hub, read_path
from envs.data.record import Record
from envs.data.sample import FileImage, ImageRef, Sample, content_id
from envs.errors import UserError

OnInvalidRow = Literal["refuse", "skip"]
SPLITS: Final = ("train", "validation", "test")
HELD_OUT: Final = 10
"""One image in this many is held out if a source has no validation or test split of its own."""

_LOGGED_ROWS: Final = 10
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


def read_source(source: Source, on_invalid_row: OnInvalidRow) -> dict[str, tuple[Sample, ...]]:
    """All samples of a source, divided into train, validation and test.

    Raises:
        UserError: nothing readable, an invalid row under `refuse`, or nothing left.
    """
    files = files_of(source.path, source.entry)[1] if source.path else ()
    return _read(source, on_invalid_row, tuple(map(stamp_of, files)))


@lru_cache(maxsize=8)
def _read(source: Source, on_invalid_row: OnInvalidRow, _stamps: tuple[str, ...]) -> dict[str, tuple[Sample, ...]]:
    """As `read_source`; cached until a file, and with it one of the stamps, changes."""
    by_split = _samples(source, on_invalid_row)
    if not by_split:
        raise UserError(f"{source.name} has no usable row: give at least three images")
    return divide(by_split, source.name, published=source.entry is not OWN)


def _records(source: Source) -> Iterable[Record]:
    if source.path is not None:
        yield from read_path(source.path, source.entry)
        return
    splits = hub_splits(source.repo, source.revision) if source.repo else source.entry.hub
    for split, place in splits.items():
        yield from read_hub(place, split, source.entry, source.revision)


def _samples(source: Source, on_invalid_row: OnInvalidRow) -> dict[str, list[Sample]]:
    """Samples by the split that the source gives them; "train" without one."""
    records = list(_records(source))
    if source.entry.images_only:
        records = [record for record in records if record.image is not None or record.error]
    # Published test splits often come without answers: such a split counts as absent.
    answered = {record.split for record in records if record.error or has_answers(record.fields)}
    if answered:
        records = [record for record in records if record.split in answered]
    scans = scan_images(source.name, {r.image for r in records if r.image is not None and not r.error})
    by_split: dict[str, list[Sample]] = defaultdict(list)
    skipped = 0
    for record in records:
        try:
            by_split[record.split or "train"] += _row(record, scans, source.entry)
        except RowError as error:
            reason = f"{source.name}: {record.place}: {error}"
            if on_invalid_row == "refuse":
                raise UserError(f"{reason}; fix or remove the row, or let such rows be skipped") from None
            skipped += 1
            if skipped <= _LOGGED_ROWS:
                _log.warning("%s; row skipped", reason)
    if skipped:
        _log.warning("%s: %d of %d rows skipped as broken", source.name, skipped, len(records))
    samples = [sample for part in by_split.values() for sample in part]
    metrics = Counter(sample.metric.partition(":")[0] for sample in samples)
    scored = ", ".join(f"{count} by {metric}" for metric, count in metrics.most_common())
    pictured = sum(sample.image is not None for sample in samples)
    _log.info("%s: %d questions, %d with an image; scored: %s", source.name, len(samples), pictured, scored)
    return {split: part for split, part in by_split.items() if part}


def _row(record: Record, scans: Mapping[Cell | Path, Scan], entry: DataSet) -> list[Sample]:
    if record.error:
        raise RowError(record.error)
    asked = list(questions(record.fields, entry))
    image: ImageRef | None = None
    if record.image is not None:
        scan = scans[record.image]
        if scan.error:
            raise RowError(scan.error)
        size = (scan.width, scan.height)
        if isinstance(record.image, Cell):
            image = TableImage(record.image, record.place, scan.digest, size)
        else:
            image = FileImage(str(record.image), scan.digest, size)
    elif entry is not OWN:
        raise RowError("no image")
    digest = image.digest if image else None
    return [
        Sample(content_id(digest, q.question, q.answers), image, q.question, q.answers, q.metric, q.style, q.family)
        for q in asked
    ]


def divide(by_split: dict[str, list[Sample]], name: str, *, published: bool) -> dict[str, tuple[Sample, ...]]:
    """Samples by split, no image in two of them; validation and test are held out if missing.

    A public set is reported on its validation split if it has no test split, so that becomes the test split. A user's
    own splits keep their names. The division depends on the images alone.

    Raises:
        UserError: too few images to fill three splits.
    """
    parts = {split: by_split.get(split, []) for split in SPLITS}
    pool_name = next(split for split in SPLITS if parts[split])
    pool, parts[pool_name] = parts[pool_name], []
    if published and not parts["test"]:
        parts["test"], parts["validation"] = parts["validation"], []
    given = {_key(sample) for part in parts.values() for sample in part}
    held = _hold_out({_key(sample) for sample in pool} - given, [s for s in ("test", "validation") if not parts[s]])
    for sample in pool:
        parts[held.get(_key(sample), "train")].append(sample)
    divided = keep_apart(parts)
    empty = [split for split, samples in divided.items() if not samples]
    if empty:
        raise UserError(
            f"{name} leaves no {' or '.join(empty)} samples: give at least three different images, in splits that do "
            "not share them all"
        )
    return divided


def _key(sample: Sample) -> str:
    """What two splits must not share: the image, or without one the question."""
    return sample.image.digest if sample.image else f"text:{sample.question}"


def _hold_out(keys: set[str], splits: Sequence[str]) -> dict[str, str]:
    """Which images go to which of the splits to be filled; the rest are for training."""
    share = max(1, round(len(keys) / HELD_OUT))
    return {key: splits[i // share] for i, key in enumerate(sorted(keys)[: share * len(splits)])}


def keep_apart(parts: Mapping[str, Iterable[Sample]]) -> dict[str, tuple[Sample, ...]]:
    """No image in two splits: test keeps it before validation, validation before train. Duplicates are left out."""
    taken: set[str] = set()
    divided: dict[str, tuple[Sample, ...]] = {}
    for split in reversed(SPLITS):
        kept = [sample for sample in parts[split] if _key(sample) not in taken]
        divided[split] = unique(kept)
        taken |= {_key(sample) for sample in kept}
    return {split: divided[split] for split in SPLITS}


def unique(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Samples in order, the first of each id."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.id, sample)
    return tuple(first.values())
