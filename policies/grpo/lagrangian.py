"""Penalty multipliers, one per budget bin, moved until the policy that ships meets a violation rate. Pure numpy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from envs.errors import UserError

FloatArray = npt.NDArray[np.float64]
FLOOR: Final = 0.01
"""Lowest multiplier, so that a rise can begin, and lowest rate that an excess is measured against."""
MIN_EFFECTIVE: Final = 4.0
"""Effective number of rollouts below which a bin's rate is too noisy to move its multiplier."""


class LagrangianSettings(Protocol):
    """How multipliers move: the fields of `envs.config.RewardSettings` that are read here."""

    penalty_init: float
    penalty_lr: float
    penalty_max: float
    penalty_smoothing: float
    max_violation_rate: float


def greedy_violation_sums(
    bins: npt.ArrayLike,
    violation: npt.ArrayLike,
    greedy: npt.ArrayLike,
    log_prob: npt.ArrayLike,
    avoidable: npt.ArrayLike,
    count: int,
) -> FloatArray:
    """What the violation rate of the argmax policy is estimated from, by samples of the stochastic one.

    A rollout whose decisions were both the most likely ones shows what the argmax policy does in its context. Weighting
    it by one over its probability corrects for contexts in which that was sampled rarely, so the rate is consistent
    however much entropy the sampling policy has, and costs no further run of the model (self-normalized importance
    sampling towards the argmax policy).

    Args:
        bins: (N,) budget bin of each rollout.
        violation: (N,) 1 where latency > budget.
        greedy: (N,) whether every decision was the policy's most likely one.
        log_prob: (N,) log-probability of all its decisions together.
        avoidable: (N,) whether any plan could have met the budget; the others are left out.
        count: number of bins.

    Returns:
        (3, count): sums of the weights, of their squares, and of the weights of violations.
    """
    weights = np.exp(-np.asarray(log_prob, np.float64)) * np.asarray(greedy, bool) * np.asarray(avoidable, bool)
    index, violated = np.asarray(bins, np.int64), np.asarray(violation, np.float64)
    return np.stack([np.bincount(index, part, count) for part in (weights, weights**2, weights * violated)])


@dataclass(frozen=True)
class PenaltyMultipliers:
    """Multipliers (bins,), and the sums (3, bins) behind their violation rates, pooled over iterations. Immutable."""

    settings: LagrangianSettings
    values: FloatArray
    sums: FloatArray

    @classmethod
    def start(cls, settings: LagrangianSettings, bins: int) -> "PenaltyMultipliers":
        first = min(settings.penalty_init, settings.penalty_max)
        return cls(settings, np.full(bins, first), np.zeros((3, bins)))

    @property
    def rates(self) -> FloatArray:
        """Violation rate of the argmax policy per bin, over the last iterations; NaN if nothing was seen."""
        total, _, violated = self.sums
        return np.divide(violated, total, out=np.full(len(total), np.nan), where=total > 0)

    @property
    def effective(self) -> FloatArray:
        """Effective number of rollouts behind each rate (Kish 1965)."""
        total, squares, _ = self.sums
        return np.divide(total**2, squares, out=np.zeros(len(total)), where=squares > 0)

    def updated(self, sums: FloatArray) -> "PenaltyMultipliers":
        """Multipliers after one iteration: up where the violation rate is above the allowed one, else down.

        Dual ascent on the Lagrangian of "maximize accuracy, violation rate <= target" (Tessler et al. 2019), in the
        logarithm of the multiplier and by the excess relative to the target, at most `penalty_lr` either way. The sums
        of past iterations count with weight `penalty_smoothing` to the power of their age: near a uniform policy an
        iteration alone has next to no greedy rollouts.

        Args:
            sums: (3, bins) of this iteration, from `greedy_violation_sums`; bins without a greedy rollout in it, or
                with fewer effective rollouts than `MIN_EFFECTIVE`, keep their multiplier.
        """
        s = self.settings
        decay = np.array([s.penalty_smoothing, s.penalty_smoothing**2, s.penalty_smoothing])[:, None]
        pooled = PenaltyMultipliers(s, self.values, decay * self.sums + sums)
        known = (sums[0] > 0) & (pooled.effective >= MIN_EFFECTIVE)
        excess = (pooled.rates - s.max_violation_rate) / max(s.max_violation_rate, FLOOR)
        moved = self.values * np.exp(s.penalty_lr * np.clip(excess, -1.0, 1.0))
        bounded = np.clip(moved, min(FLOOR, s.penalty_max), s.penalty_max)
        return PenaltyMultipliers(s, np.where(known, bounded, self.values), pooled.sums)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"values": self.values.tolist(), "sums": self.sums.tolist()}

    def restored(self, state: Mapping[str, Any]) -> "PenaltyMultipliers":
        """These settings with the multipliers of a checkpoint.

        Raises:
            UserError: the checkpoint has another number of bins.
        """
        if len(state["values"]) != len(self.values):
            raise UserError(
                f"checkpoint has {len(state['values'])} penalty bins, the configuration {len(self.values)}: resume "
                "with the configuration of the run"
            )
        return PenaltyMultipliers(self.settings, np.array(state["values"], float), np.array(state["sums"], float))
