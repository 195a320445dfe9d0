"""How one answer under one budget is judged: pure, vectorised functions of what happened.

All penalties act on the overrun relative to the budget, latency / budget - 1, so they mean the same on every device.
"""

import math
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from envs.errors import UserError
from envs.knobs import MODEL_BLOCKS, TIER_CROPS, TOP_KS, ExecutionPlan

Array = npt.NDArray[np.float64]
TERMS: Final = ("accuracy", "latency", "overrun", "efficiency", "complexity")


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward's terms; every weight is 0 or more, penalties are subtracted.

    Attributes:
        accuracy: weight of the answer's accuracy (0 to 1).
        latency: weight of the smooth latency penalty, sigmoid(overrun / temperature): one half at the budget.
        temperature: width of that sigmoid in units of overrun, above 0.
        overrun: weight of the squared overrun beyond the budget.
        efficiency: weight of the share of the budget left unused, given for right answers within budget.
        complexity: weight of the share of the full plan's computation that was chosen (0 to 1).

    Raises:
        UserError: a weight that is negative or not finite, or a temperature that is not above 0.
    """

    accuracy: float = 1.0
    latency: float = 0.5
    temperature: float = 0.05
    overrun: float = 1.0
    efficiency: float = 0.0
    complexity: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0) or (field.name == "temperature" and value == 0):
                allowed = "above 0" if field.name == "temperature" else "0 or more"
                raise UserError(f"reward {field.name} of {value!r} is not allowed: give a finite number, {allowed}")


@dataclass(frozen=True)
class Reward:
    """Rewards of B rollouts: `total` (B,) and its signed, weighted `terms`, each (B,), which add up to it."""

    total: Array
    terms: dict[str, Array]


def reward(
    config: RewardConfig,
    accuracy_B: npt.ArrayLike,
    latency_ms_B: npt.ArrayLike,
    budget_ms_B: npt.ArrayLike,
    share_B: npt.ArrayLike,
) -> Reward:
    """The reward at fixed weights.

    Args:
        accuracy_B: 0 to 1.
        latency_ms_B: latency of each request.
        budget_ms_B: its budget, above 0.
        share_B: share of the full plan's computation, from `plan_share`.
    """
    accuracy = np.asarray(accuracy_B, dtype=np.float64)
    overrun = np.asarray(latency_ms_B, dtype=np.float64) / np.asarray(budget_ms_B, dtype=np.float64) - 1.0
    terms = {
        "accuracy": config.accuracy * accuracy,
        "latency": -config.latency * _sigmoid(overrun / config.temperature),
        "overrun": -config.overrun * np.maximum(overrun, 0.0) ** 2,
        # Past the budget nothing is left unused, so the clamp also withholds the bonus from late
        # answers.
        "efficiency": config.efficiency * accuracy * np.maximum(-overrun, 0.0),
        "complexity": -config.complexity * np.asarray(share_B, dtype=np.float64),
    }
    total = np.sum([terms[name] for name in TERMS], axis=0)
    return Reward(np.asarray(total, dtype=np.float64), terms)


def plan_share(plan: ExecutionPlan) -> float:
    """Computation of `plan` as a share of the full plan's, 0 to 1: views encoded times experts run, over all blocks."""
    views = (TIER_CROPS[plan.tier] + 1) / (max(TIER_CROPS.values()) + 1)
    return views * sum(plan.top_k_per_block) / (MODEL_BLOCKS * max(TOP_KS))


def _sigmoid(x: Array) -> Array:
    """Logistic function without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), dtype=np.float64)
