"""Where samples come from: the embedded scenes, public visual question answering sets, or a user's
own files.

What a task may be called is described in `envs.data.task_spec` and `docs/data.md`.
"""

from collections.abc import Sequence
from typing import Literal

from envs.data.sample import FileImage, ImageRef, Sample, content_id
from envs.errors import UserError

__all__ = ["SPLITS", "FileImage", "ImageRef", "Sample", "check_task", "content_id", "list_tasks", "load_task"]

SPLITS = ("train", "validation", "test")


def list_tasks() -> tuple[str, ...]:
    """Names that `load_task` knows without a path: the scenes and the public sets."""
    from envs.data.catalog import DATA_SETS

    return ("scenes", *(entry.name for entry in DATA_SETS))


def check_task(name_or_path: str) -> None:
    """Refuses a task that `load_task` would not know; reads no data.

    Raises:
        UserError: an unknown set, a path that does not exist.
    """
    from envs.data.task_spec import parse_tasks

    parse_tasks(name_or_path)


def load_task(
    name_or_path: str,
    split: str,
    limit: int | None = None,
    seed: int = 0,
    *,
    on_broken: Literal["refuse", "skip"] = "refuse",
) -> Sequence[Sample]:
    """Samples of one split of a task.

    The three splits are finite and share no image. Training images never occur in validation or
    test, whatever the files say.

    Args:
        name_or_path: `scenes`, a public set (`textvqa`), a local copy (`textvqa=PATH`), the path of
            a user's own data, a hub id (`owner/name`), or a mix (`2*textvqa + okvqa=PATH`). The
            grammar is in `envs.data.task_spec`.
        split: `train`, `validation` or `test`.
        limit: at most this many samples; None for all.
        seed: which samples a limit picks, and the order of a mix.
        on_broken: what to do with rows that cannot be used: `refuse` names the first and stops,
            `skip` logs and leaves them out.

    Raises:
        UserError: an unknown task, split or policy, unreadable data, or a broken row under
            `refuse`.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not allowed: choose one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} samples is not allowed: give 1 or more, or leave it out for all")
    if on_broken not in ("refuse", "skip"):
        raise UserError(f"on_broken {on_broken!r} is not allowed: choose refuse or skip")
    if name_or_path.strip() == "scenes":
        from envs.data.scenes import load

        return load(split, limit, seed)
    from envs.data.task_spec import load_mix, parse_tasks

    return load_mix(parse_tasks(name_or_path), split, limit, seed, on_broken)
