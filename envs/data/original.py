"""The original JSON files of public sets, in any of the published layouts, and the images they name."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from envs.data.catalog import DataSet
from envs.data.files import inside, split_of, walk_files
from envs.data.record import Record
from envs.errors import UserError
from envs.processing.images import IMAGE_ENDINGS, excerpt

_PUBLISHED: Final = {"train": "train", "validation": "val", "test": "test"}
_COCO_FOLDERS: Final = {"train": "train2014", "validation": "val2014", "test": "test2015"}


class _ImageFinder:
    """Finds image files below a folder, links followed, by the end of their path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_name: dict[str, list[str]] = {}
        for path in walk_files(folder):
            if path.name.lower().endswith(IMAGE_ENDINGS):
                self.by_name.setdefault(path.name, []).append(path.relative_to(folder).as_posix())

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
            raise UserError(f"image {excerpt(name)} could be any of {', '.join(sorted(known)[:3])}")
        raise UserError(f"no image {excerpt(name)} below {self.folder}")


def read_original(files: Iterable[Path], folder: Path, entry: DataSet) -> Iterator[Record]:
    """Records of a public set's own JSON files; their images are below the folder."""
    images = _ImageFinder(folder)
    for file in files:
        split = next((split for split, glob in entry.files.items() if split and file.match(glob)), None)
        name = str(file.relative_to(folder))
        content = _load_json(file)
        for key, fields in _records(content, file):
            place = f"{name}, record {key}"
            if not isinstance(fields, dict):
                yield Record(place, split, {}, error=f"a {type(fields).__name__}, not an object")
                continue
            own = split or split_of(str(fields.get("split", "")))
            try:
                yield Record(place, own, fields, _original_image(fields, key, own, entry, images))
            except UserError as error:
                yield Record(place, own, fields, error=error.message)


def _original_image(
    fields: Mapping[str, Any], key: str, split: str | None, entry: DataSet, images: _ImageFinder
) -> Path | None:
    """The file of a record's image; None if the record has none."""
    if entry.images_only and not fields.get("image"):
        return None
    folders = {"split": _PUBLISHED.get(split or "", ""), "coco": _COCO_FOLDERS.get(split or "", "")}
    try:
        name = entry.image.format_map({**fields, **folders, "key": key})
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"the image's name {entry.image} cannot be made: {reason}") from None
    return images.find(name)


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {file}: {reason}; give the file as published") from None


def _records(content: Any, file: Path) -> Iterator[tuple[str, Any]]:
    """The records of an original file in any of the published layouts."""
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        answers = _annotations(file)
        for key, fields in enumerate(content["questions"]):
            known = answers.get(fields.get("question_id")) if isinstance(fields, dict) else None
            yield str(key), {**known, **fields} if known else fields
        return
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, dict | list):
        raise UserError(f"{file} contains a {type(content).__name__}: give the file as published")
    yield from content.items() if isinstance(content, dict) else ((str(k), row) for k, row in enumerate(content))


def _annotations(file: Path) -> dict[Any, dict[str, Any]]:
    """Answers to the questions of a VQA file, from the annotations next to it."""
    name = file.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    next_to = file.with_name(name)
    if not next_to.is_file():
        raise UserError(f"no {name} next to {file}: the answers to its questions are missing")
    content = _load_json(next_to)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{next_to} has no list of annotations: give the file as published")
    return {annotation.get("question_id"): annotation for annotation in annotations if isinstance(annotation, dict)}
