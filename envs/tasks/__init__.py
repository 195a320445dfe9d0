"""Where samples come from.

The embedded scenes, public visual question answering sets, or a user's own files.
"""

from collections.abc import Sequence

from envs.errors import UserError
from envs.tasks.sample import FileImage, ImageRef, Sample, content_id

__all__ = ["SPLITS", "FileImage", "ImageRef", "Sample", "content_id", "list_tasks", "load_task"]

SPLITS = ("train", "validation", "test")


def list_tasks() -> tuple[str, ...]:
    """Names that `load_task` knows without a path."""
    return ("scenes",)


def load_task(
    name_or_path: str, split: str, limit: int | None = None, seed: int = 0
) -> Sequence[Sample]:
    """Samples of one split of a task.

    Args:
        name_or_path: `scenes` for the embedded world.
        split: `train`, `validation` or `test`.
        limit: at most this many samples; None for all.
        seed: which samples a limit picks.

    Raises:
        UserError: an unknown task or split.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not allowed: choose one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UserError(
            f"a limit of {limit} samples is not allowed: give 1 or more, or leave it out for all"
        )
    if name_or_path == "scenes":
        from envs.tasks.scenes import load

        return load(split, limit, seed)
    raise UserError(f"unknown task {name_or_path!r}: choose one of {', '.join(list_tasks())}")
