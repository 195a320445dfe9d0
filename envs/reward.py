"""The one objective: accuracy - multiplier x cost(latency, budget). Pure, vectorized functions.

What an environment returns is what GRPO, PPO and Tune maximize and what checkpoints are chosen by. Only the multiplier
differs: constant for validation, evaluation and `fixed` mode; one per budget bin, moved by
`policies.grpo.lagrangian`, in `lagrangian` mode.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from envs.errors import UserError

Array = npt.NDArray[np.float64]
MODES: Final = ("fixed", "lagrangian")


@dataclass(frozen=True)
class RewardSettings:
    """What a rollout is worth, and how penalty multipliers move.

    Attributes:
        mode: `fixed`: the multiplier is `penalty` throughout; `lagrangian`: one per budget bin, adapted in training.
        penalty: constant multiplier; also scores validation and evaluation in both modes, so that iterations compare.
        penalty_init: multiplier of every bin at the start.
        penalty_lr: largest change of a multiplier's logarithm per iteration.
        penalty_max: largest multiplier.
        penalty_smoothing: weight of the past in the running violation rate, 0 to below 1.
        max_violation_rate: violation rate that every bin should stay below, 0 to 1.
        budget_use_bonus: reward for the share of the budget used; 0 is off.

    Raises:
        UserError: a value outside its range.
    """

    mode: Literal["fixed", "lagrangian"] = "fixed"
    penalty: float = 1.3
    penalty_init: float = 0.5
    penalty_lr: float = 0.1
    penalty_max: float = 5.0
    penalty_smoothing: float = 0.8
    max_violation_rate: float = 0.04
    budget_use_bonus: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"reward mode {self.mode!r} is not known: choose one of {', '.join(MODES)}")
        for name in ("penalty", "penalty_init", "penalty_lr", "penalty_max", "budget_use_bonus"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"reward {name} of {value!r} is not allowed: give a finite number, 0 or more")
        if not 0.0 <= self.penalty_smoothing < 1.0:
            raise UserError(f"reward penalty_smoothing of {self.penalty_smoothing!r} is not allowed: 0 to below 1")
        if not 0.0 <= self.max_violation_rate <= 1.0:
            raise UserError(f"reward max_violation_rate of {self.max_violation_rate!r} is not allowed: give 0 to 1")


def violation_cost(latency_ms: npt.ArrayLike, budget_ms: npt.ArrayLike) -> Array:
    """What the multiplier multiplies, (B,): 0 within budget, else 1 plus the relative excess, at most 2.

    The 1 is the violation itself. The excess on top still makes faster plans better where none meets the budget.
    """
    excess = np.asarray(latency_ms, np.float64) / np.asarray(budget_ms, np.float64) - 1.0
    return np.where(excess > 0.0, 1.0 + np.minimum(excess, 1.0), 0.0)


def reward(
    accuracy: npt.ArrayLike,
    latency_ms: npt.ArrayLike,
    budget_ms: npt.ArrayLike,
    multiplier: npt.ArrayLike,
    budget_use_bonus: float = 0.0,
) -> Array:
    """Reward (B,) of B rollouts.

    Args:
        accuracy: 0 to 1.
        latency_ms, budget_ms: of each request, ms, the budget above 0.
        multiplier: penalty multiplier of each request's budget bin, or one for all.
        budget_use_bonus: added in proportion to the share of the budget used.
    """
    used = np.minimum(np.asarray(latency_ms, np.float64) / np.asarray(budget_ms, np.float64), 1.0)
    penalty = np.asarray(multiplier, np.float64) * violation_cost(latency_ms, budget_ms)
    return np.asarray(np.asarray(accuracy, np.float64) - penalty + budget_use_bonus * used, np.float64)
