"""Block importance: one score per block, deciding which blocks go first. Their meaning, file and
comparison; `envs.engine.measure_block_importance` measures them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from envs.errors import UserError
from envs.knobs import MAX_DROPPED, MODEL_BLOCKS, drop_order
from envs.model.config import AdaptiveMolmoEConfig

IMPORTANCE_FILE: Final = "importance.json"
PUBLISHED_IMPORTANCE: Final = (
    0.56, 0.08, 0.004, 0.03, 0.001, 0.08, 0.04, 0.05, 0.07, 0.06, 0.003, 0.04, 0.06, 0.002, 0.06, 0.06,
)  # fmt: skip
"""Measured for the published model by the research this project builds on."""

_PUBLISHED_SHAPE: Final = (2048, 64, 1024, 23)
MEASURES: Final = {
    "cross_entropy": "rise in mean cross entropy of reference answers, nats a token, when the block alone is left out",
    "accuracy": "drop in mean accuracy of greedy answers when the block alone is left out",
}


@dataclass(frozen=True)
class Importance:
    """Scores of the 16 blocks, measured.

    Attributes:
        scores: higher is more important. Block 0 is never left out; its score only has to be the largest.
        errors: standard error of each score over samples, 0 for block 0.
        by: a name of `MEASURES`.
        full: the measure itself under the full plan.
    """

    scores: tuple[float, ...]
    errors: tuple[float, ...]
    by: str
    full: float
    samples: int
    tier: str

    def to_dict(self, origin: Mapping[str, Any]) -> dict[str, Any]:
        """The content of an importance file; `origin` says which model and task, by what."""
        return {
            "importance": [round(score, 6) for score in self.scores],
            "standard_error": [round(error, 6) for error in self.errors],
            "by": self.by,
            "metric": f"{MEASURES[self.by]}, {self.tier} tier, top-k 8; block 0 is fixed",
            "full_plan": self.full,
            "samples": self.samples,
            **origin,
        }


def read_importance(path_or_id: str | Path, file: str | Path | None = None) -> tuple[float, ...]:
    """Scores of a model's 16 blocks: from `file`, else from the file next to its weights, else the published ones.

    Args:
        path_or_id: a model folder with or without `importance.json`, "embedded", or a hub id.
        file: a file of scores to use instead.

    Raises:
        UserError: `file` is not there, or a file does not contain 16 finite numbers under "importance".
    """
    if file is not None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(
                f"no file of block importance at {path}: measure one with `ray-ctrl importance --out {path}`"
            )
        return read_scores(path)
    path = importance_path(path_or_id)
    return read_scores(path) if path.is_file() else PUBLISHED_IMPORTANCE


def importance_path(path_or_id: str | Path) -> Path:
    """The importance file next to a model's weights. For a hub id, a path that does not exist."""
    if str(path_or_id) == "embedded":
        from envs.embedded import folder

        path_or_id = folder()
    return Path(path_or_id).expanduser() / IMPORTANCE_FILE


def write_importance(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an importance file, a new one.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
    except FileExistsError:
        raise UserError(f"{path} exists already: choose another file with --out, or remove it first") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another file with --out") from None


def removal_order(scores: Sequence[float]) -> tuple[int, ...]:
    """Blocks 1 to 15 in the order in which they are left out."""
    return drop_order(scores, insertion=1)


def dropped_first(scores: Sequence[float]) -> str:
    """Indices of the blocks that the fewest blocks leave out, in order, for a message."""
    return ", ".join(map(str, removal_order(scores)[:MAX_DROPPED]))


def rank_correlation(scores: Sequence[float], others: Sequence[float]) -> float:
    """Spearman's rank correlation of two sets of scores over blocks 1 to 15; NaN if one of them is constant."""
    from scipy.stats import spearmanr

    if any(len(set(row[1:])) == 1 for row in (scores, others)):
        return math.nan
    return float(spearmanr(scores[1:], others[1:]).statistic)


def is_published_shape(config: AdaptiveMolmoEConfig) -> bool:
    """Whether a model has the shape of MolmoE-1B, for which scores are published."""
    return (config.d_model, config.n_experts, config.expert_hidden, config.vision.layers) == _PUBLISHED_SHAPE


def read_scores(file: Path) -> tuple[float, ...]:
    """The scores in an importance file.

    Raises:
        UserError: it does not contain 16 finite numbers under "importance".
    """
    try:
        scores = tuple(float(score) for score in json.loads(file.read_text(encoding="utf-8"))["importance"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'cannot read block importance from {file} ({error!r}): it needs {{"importance": [...]}}'
        ) from None
    if len(scores) != MODEL_BLOCKS or not all(math.isfinite(score) for score in scores):
        raise UserError(f"{file} contains {len(scores)} scores: give {MODEL_BLOCKS} finite numbers, one per block")
    return scores
