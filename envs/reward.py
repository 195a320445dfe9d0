"""The one objective: accuracy - multiplier x cost(latency, budget). Pure, vectorized functions.

GRPO, PPO and Tune maximize it, and checkpoints are chosen by it. The multiplier is constant in validation, evaluation
and mode `fixed`; in mode `lagrangian`, `policies.grpo.lagrangian` updates one multiplier per budget bin.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def violation_cost(latency_ms: npt.ArrayLike, budget_ms: npt.ArrayLike) -> Array:
    """Cost of a violation (B,): 0 within budget, else 1 plus the relative excess, at most 2.

    The excess makes faster plans better if no plan meets the budget.
    """
    excess = np.asarray(latency_ms, np.float64) / np.asarray(budget_ms, np.float64) - 1.0
    return np.where(excess > 0.0, 1.0 + np.minimum(excess, 1.0), 0.0)


def reward(
    accuracy: npt.ArrayLike,
    latency_ms: npt.ArrayLike,
    budget_ms: npt.ArrayLike,
    multiplier: npt.ArrayLike,
    budget_use_bonus: float,
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
