"""Penalty multipliers, one per budget bin, moved until the policy that ships meets a violation rate. Pure numpy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from envs.errors import UserError

FloatArray = npt.NDArray[np.float64]
FLOOR: Final = 0.01
"""Lowest multiplier, so that a rise can begin, and lowest rate that an excess is measured against."""
FEWEST: Final = 4.0
"""Effective number of contexts below which a bin's rate is too noisy to move its multiplier."""


@dataclass(frozen=True)
class LagrangianSettings:
    """How multipliers move.

    Attributes:
        bins: number of budget bins, as the environment numbers them in `budget_bin`.
        max_violation_rate: rate every bin should stay below, 0 to 1.
        lr: largest change of a multiplier's logarithm per update.
        init: multiplier at the start.
        maximum: largest multiplier.
        smoothing: weight of the past in the running violation rate, 0 (none) to below 1.
    """

    bins: int
    max_violation_rate: float
    lr: float
    init: float
    maximum: float
    smoothing: float

    def __post_init__(self) -> None:
        allowed = {
            "bins": self.bins >= 1,
            "max_violation_rate": 0.0 <= self.max_violation_rate <= 1.0,
            "lr": 0.0 <= self.lr < np.inf,
            "init": 0.0 <= self.init <= self.maximum,
            "maximum": 0.0 <= self.maximum < np.inf,
            "smoothing": 0.0 <= self.smoothing < 1.0,
        }
        for name, fine in allowed.items():
            if not fine:
                raise UserError(
                    f"penalty {name} {getattr(self, name)!r} is not allowed: bins >= 1, max_violation_rate in [0, 1], "
                    "lr >= 0, 0 <= init <= maximum, smoothing in [0, 1)"
                )


def greedy_violation_rates(
    bins: npt.ArrayLike,
    violation: npt.ArrayLike,
    greedy: npt.ArrayLike,
    log_prob: npt.ArrayLike,
    avoidable: npt.ArrayLike,
    count: int,
) -> tuple[FloatArray, FloatArray]:
    """Violation rate per bin of the argmax policy, estimated from samples of the stochastic one.

    A rollout whose decisions were both the most likely ones shows what the argmax policy does in its context. Weighting
    it by one over its probability makes up for contexts in which that was sampled rarely, so the rate is consistent
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
        Rates (count,), NaN where nothing was seen, and effective sample sizes (count,) (Kish 1965).
    """
    weights = np.exp(-np.asarray(log_prob, np.float64)) * np.asarray(greedy, bool) * np.asarray(avoidable, bool)
    index = np.asarray(bins, np.int64)
    late = np.asarray(violation, np.float64)
    total, squares, bad = (
        np.bincount(index, values, minlength=count) for values in (weights, weights**2, weights * late)
    )
    seen = total > 0
    rates = np.divide(bad, total, out=np.full(count, np.nan), where=seen)
    return rates, np.divide(total**2, squares, out=np.zeros(count), where=seen)


@dataclass(frozen=True)
class PenaltyMultipliers:
    """Multipliers and running violation rates, one per bin (NaN: nothing seen yet). Immutable."""

    settings: LagrangianSettings
    values: FloatArray = field(default_factory=lambda: np.empty(0))
    rates: FloatArray = field(default_factory=lambda: np.empty(0))

    @classmethod
    def start(cls, settings: LagrangianSettings) -> "PenaltyMultipliers":
        return cls(settings, np.full(settings.bins, settings.init), np.full(settings.bins, np.nan))

    def updated(self, rates: FloatArray, effective: FloatArray) -> "PenaltyMultipliers":
        """Multipliers after one iteration: up where the running violation rate is above the allowed one, else down.

        Dual ascent on the Lagrangian of "maximize accuracy, violation rate <= target" (Tessler et al. 2019), in the
        logarithm of the multiplier and by the excess relative to the target, at most `lr` either way.

        Args:
            rates: (bins,) this iteration's, as `greedy_violation_rates` gives them.
            effective: (bins,) effective sample sizes; bins with fewer than 4 stay as they are.
        """
        s = self.settings
        seen = effective >= FEWEST
        past = np.where(np.isnan(self.rates), rates, self.rates)
        running = np.where(seen, s.smoothing * past + (1.0 - s.smoothing) * rates, self.rates)
        excess = (running - s.max_violation_rate) / max(s.max_violation_rate, FLOOR)
        moved = self.values * np.exp(s.lr * np.clip(excess, -1.0, 1.0))
        bounded = np.clip(moved, min(FLOOR, s.maximum), s.maximum)
        return PenaltyMultipliers(s, np.where(seen, bounded, self.values), running)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"values": self.values.tolist(), "rates": self.rates.tolist()}

    def restored(self, state: Mapping[str, Any]) -> "PenaltyMultipliers":
        """These settings with the multipliers of a checkpoint.

        Raises:
            UserError: the checkpoint has another number of bins.
        """
        if len(state["values"]) != self.settings.bins:
            raise UserError(
                f"checkpoint has {len(state['values'])} penalty bins, the configuration {self.settings.bins}: resume "
                "with the configuration of the run"
            )
        return PenaltyMultipliers(self.settings, np.array(state["values"], float), np.array(state["rates"], float))
