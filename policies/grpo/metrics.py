"""The numbers of one iteration, as one flat dict of floats."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MAX,
    EPISODE_LEN_MEAN,
    EPISODE_LEN_MIN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    LEARNER_RESULTS,
)
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from envs.knobs import KNOBS
from policies.grpo.env_runner import Rollouts
from policies.grpo.lagrangian import PenaltyMultipliers
from policies.grpo.objective import GroupAdvantages

LEARNER_KEYS: Final = (
    "loss",
    "loss_policy",
    "kl_old",
    "kl_reference",
    "clip_low_share",
    "clip_high_share",
    "dual_clip_share",
    "grad_norm",
    *(f"entropy_{head}" for head in KNOBS),
)


def rollout_metrics(
    rollouts: Rollouts, groups: GroupAdvantages, multipliers: PenaltyMultipliers | None
) -> dict[str, float]:
    """Means over this iteration's sampled rollouts: reward, outcome, knobs, feasible share; and the multipliers."""
    infos = rollouts.infos
    row = {
        "rollouts": float(len(rollouts)),
        "groups": float(groups.uniform.size),
        "groups_uniform_share": groups.uniform_share,
        "reward_mean": float(rollouts.rewards.mean()),
        "violation_rate": float((infos["latency_ms"] > infos["budget_ms"]).mean()),
    }
    for key in ("accuracy", "latency_ms", "budget_ms", "feasible", *KNOBS):
        if key in infos:
            row[f"{key}_mean"] = float(np.mean(infos[key], dtype=np.float64))
    if multipliers is not None:
        row |= {f"penalty_{index}": float(value) for index, value in enumerate(multipliers.values)}
        seen = [(index, float(rate)) for index, rate in enumerate(multipliers.rates) if not np.isnan(rate)]
        row |= {f"penalty_{index}_violation_rate": rate for index, rate in seen}
    return row


def learner_metrics(logger: Any) -> dict[str, float]:
    """Loss terms and diagnostics, averaged over this iteration's minibatches."""
    row = {}
    for key in LEARNER_KEYS:
        value = float(logger.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, key), default=np.nan))
        if not np.isnan(value):
            row[key] = value
    return row


def episode_metrics(returns: npt.NDArray[np.float64], steps: int) -> dict[str, float]:
    """RLlib's usual numbers of finished episodes, all of which took `steps` steps; under its usual keys."""
    return {
        EPISODE_RETURN_MEAN: float(returns.mean()),
        EPISODE_RETURN_MIN: float(returns.min()),
        EPISODE_RETURN_MAX: float(returns.max()),
        EPISODE_LEN_MEAN: float(steps),
        EPISODE_LEN_MIN: float(steps),
        EPISODE_LEN_MAX: float(steps),
    }


def as_runner_results(numbers: dict[str, float]) -> Any:
    """Numbers as an env runner sends them: what RLlib's `MetricsLogger.aggregate` takes."""
    sender = MetricsLogger(root=False)
    for key, value in numbers.items():
        sender.log_value(key, value, window=1)
    return sender.reduce()
