"""The numbers of one iteration, as one flat dict of floats."""

from typing import Any, Final

import numpy as np
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import LEARNER_RESULTS

from policies.distribution import HEADS
from policies.grpo.advantages import GroupAdvantages
from policies.grpo.lagrangian import PenaltyMultipliers
from policies.grpo.runner import Rollouts

LEARNER_KEYS: Final = (
    "loss",
    "loss_policy",
    "kl_old",
    "kl_reference",
    "clip_low_share",
    "clip_high_share",
    "ratio_cut_share",
    "grad_norm",
    *(f"entropy_{head}" for head in HEADS),
)


def rollout_metrics(
    rollouts: Rollouts, groups: GroupAdvantages, multipliers: PenaltyMultipliers | None
) -> dict[str, float]:
    """Means over this iteration's sampled rollouts: reward, outcome, knobs, feasibility; and the multipliers."""
    infos = rollouts.infos
    row = {
        "rollouts": float(len(rollouts)),
        "groups": float(groups.equal.size),
        "groups_equal_share": groups.equal_share,
        "reward_mean": float(rollouts.rewards.mean()),
        "violation_rate": float((infos["latency_ms"] > infos["budget_ms"]).mean()),
    }
    for key in ("accuracy", "latency_ms", "budget_ms", "feasible", *HEADS):
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
