"""Samples: the embedded scenes, public visual question answering sets, or a user's own files.

`envs.data.task_spec` has the grammar of task names, docs/data.md everything a user needs.
"""

from collections.abc import Sequence
from typing import Final

from envs.data.build import SPLITS, OnInvalidRow
from envs.data.catalog import DATA_SETS
from envs.data.sample import FileImage, ImageRef, Sample, content_id
from envs.data.task_spec import load_mix, parse_tasks
from envs.errors import UserError

FRESH: Final = 400
"""Fresh samples drawn without a limit."""

__all__ = ["SPLITS", "FileImage", "ImageRef", "Sample", "check_task", "content_id", "list_tasks", "load_task"]


def list_tasks() -> tuple[str, ...]:
    """Names that `load_task` knows without a path: the scenes and the public sets."""
    return ("scenes", *(entry.name for entry in DATA_SETS))


def check_task(name_or_path: str) -> None:
    """Refuse a task that `load_task` would not know; reads no data.

    Raises:
        UserError: an unknown set, a path that does not exist.
    """
    parse_tasks(name_or_path)


def load_task(
    name_or_path: str,
    split: str,
    limit: int | None = None,
    seed: int = 0,
    *,
    on_invalid_row: OnInvalidRow = "refuse",
    fresh: int | None = None,
) -> Sequence[Sample]:
    """Samples of one split of a task.

    The three splits are finite and share no image. Training images never occur in validation or test, whatever the
    files say.

    Args:
        name_or_path: `scenes`, a public set (`textvqa`), a local copy (`textvqa=PATH`), the path of a user's own data,
            a hub id (`owner/name`), or a mix (`2*textvqa + okvqa=PATH`).
        split: `train`, `validation` or `test`.
        limit: at most this many samples; None for all.
        seed: which samples a limit picks, and the order of a mix.
        on_invalid_row: `refuse` stops at the first row that cannot be used, `skip` logs such rows and leaves them out.
        fresh: seed of new scenes that replace the test split (`envs.data.scenes.fresh_scenes`); None takes the split.

    Raises:
        UserError: an unknown task, split or policy, unreadable data, or an invalid row under `refuse`.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not allowed: choose one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} samples is not allowed: give 1 or more, or leave it out for all")
    if on_invalid_row not in ("refuse", "skip"):
        raise UserError(f"on_invalid_row {on_invalid_row!r} is not allowed: choose refuse or skip")
    if name_or_path.strip() == "scenes":
        from envs.data.scenes import fresh_scenes, load

        if fresh is not None and split == "test":
            return fresh_scenes(fresh, FRESH if limit is None else limit)
        return load(split, limit, seed)
    if fresh is not None and split == "test":
        raise UserError(f"task {name_or_path!r} has no fresh samples: only scenes are drawn anew; leave out --fresh")
    return load_mix(parse_tasks(name_or_path), split, limit, seed, on_invalid_row)
