"""Block importance: one score per block, deciding which blocks go first."""

import json
from pathlib import Path
from typing import Final

from envs.errors import UserError
from envs.knobs import MODEL_BLOCKS

IMPORTANCE_FILE: Final = "importance.json"
PUBLISHED_IMPORTANCE: Final = (
    0.56, 0.08, 0.004, 0.03, 0.001, 0.08, 0.04, 0.05, 0.07, 0.06, 0.003, 0.04, 0.06, 0.002, 0.06, 0.06,
)  # fmt: skip
"""Measured for the published model by the research this project builds on."""


def read_importance(path_or_id: str | Path) -> tuple[float, ...]:
    """Scores of a model's 16 blocks: from `importance.json` beside its weights, else the published ones.

    Args:
        path_or_id: a model folder, a file with scores, "embedded", or a hub id (whose scores are the published ones).

    Raises:
        UserError: a file that does not hold 16 finite numbers under "importance".
    """
    if str(path_or_id) == "embedded":
        from envs.model.embedded import folder

        path_or_id = folder()
    path = Path(path_or_id).expanduser()
    file = path if path.is_file() else path / IMPORTANCE_FILE
    if not file.is_file():
        return PUBLISHED_IMPORTANCE
    try:
        scores = tuple(float(score) for score in json.loads(file.read_text(encoding="utf-8"))["importance"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'cannot read block importance from {file} ({error!r}): it needs {{"importance": [...]}}'
        ) from None
    if len(scores) != MODEL_BLOCKS or any(score != score or abs(score) == float("inf") for score in scores):
        raise UserError(f"{file} holds {len(scores)} scores: give {MODEL_BLOCKS} finite numbers, one per block")
    return scores
