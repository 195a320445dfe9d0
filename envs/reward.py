"""The one objective: accuracy - multiplier x cost(latency, budget). Pure, vectorized functions.

What an environment returns is what GRPO, PPO and Tune maximize and what checkpoints are chosen by. Only the multiplier
differs: constant for validation, evaluation and `fixed` mode; one per budget bin, moved by
`policies.grpo.lagrangian`, in `lagrangian` mode.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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
