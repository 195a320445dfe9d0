"""Latency budgets: drawn for training, held out for evaluation, binned for penalty multipliers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from envs.errors import UserError
from envs.knobs import ExecutionPlan, KnobSpace
from envs.latency.clock import Clock, MeasuringClock, is_measuring

if TYPE_CHECKING:
    from envs.contracts import Engine

Array = npt.NDArray[np.float64]
BAND_SHARE: Final = 0.15
"""Width of one held-out band as a share of the logarithmic range: wide enough that interpolation is tested."""
MAX_BANDS: Final = 5
"""More bands of that width would touch."""
_OUTSIDE: Final = 1.15
"""Factor between the ends of the training range and the held-out budgets outside it."""
_RANGE_SAMPLES: Final = 16
"""Samples run to find the median answer length, or both latencies under a measuring clock."""


def check_budget(budget_ms: float) -> float:
    """`budget_ms` as a float.

    Raises:
        UserError: not a finite number above 0.
    """
    try:
        budget = float(budget_ms)
    except (TypeError, ValueError):
        raise UserError(f"budget {budget_ms!r} is not a number: give milliseconds above 0") from None
    if not (math.isfinite(budget) and budget > 0):
        raise UserError(f"a budget of {budget} ms is not allowed: give a finite number of milliseconds above 0")
    return budget


@dataclass(frozen=True)
class BudgetDistribution:
    """Training budgets, log-uniform over `low_ms` to `high_ms` without the held-out bands.

    Attributes:
        low_ms, high_ms: ends of the training range.
        bands: held-out intervals inside the range, ms, rising and disjoint.
        bins: number of penalty bins, equal in log budget.

    Raises:
        UserError: an unusable range, band or number of bins.
    """

    low_ms: float
    high_ms: float
    bands: tuple[tuple[float, float], ...] = ()
    bins: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", tuple((float(low), float(high)) for low, high in self.bands))
        if check_budget(self.low_ms) >= check_budget(self.high_ms):
            raise UserError(
                f"budget range {self.low_ms} to {self.high_ms} ms is empty or inverted: give the smaller end first"
            )
        inside = [check_budget(edge) for band in self.bands for edge in band]
        edges = [self.low_ms, *inside, self.high_ms]
        if any(a >= b for a, b in pairwise(inside)) or sorted(edges) != edges:
            raise UserError(
                f"held-out bands {self.bands} are not allowed: give rising intervals that do not touch, within "
                f"{self.low_ms} to {self.high_ms} ms"
            )
        if self._widths.sum() <= 0:
            raise UserError(f"held-out bands {self.bands} cover the entire range: leave budgets to train on")
        if self.bins < 1:
            raise UserError(f"{self.bins} penalty bins are not allowed: give 1 or more")

    @classmethod
    def over(cls, low_ms: float, high_ms: float, bands: int = 3, bins: int = 8) -> "BudgetDistribution":
        """The range with `bands` evenly spaced held-out bands, each 15 % of the logarithmic range wide.

        Raises:
            UserError: an unusable range, or a number of bands outside 0 to 5.
        """
        if not 0 <= bands <= MAX_BANDS:
            raise UserError(f"{bands} held-out bands are not allowed: give 0 to {MAX_BANDS}")
        plain = cls(low_ms, high_ms, (), bins)
        middles = [(i + 1) / (bands + 1) for i in range(bands)]
        edges = [
            [low_ms * math.exp((m + side) * plain._log_width) for side in (-0.5 * BAND_SHARE, 0.5 * BAND_SHARE)]
            for m in middles
        ]
        return cls(low_ms, high_ms, tuple((low, high) for low, high in edges), bins)

    @classmethod
    def restored(cls, stored: Any) -> "BudgetDistribution":
        """The distribution from its fields as stored in JSON; a UserError if they do not form one."""
        try:
            return cls(**stored)
        except (TypeError, ValueError) as error:
            raise UserError(f"budgets {stored!r} cannot be read ({error})") from None

    def at(self, share: npt.ArrayLike) -> Array:
        """Quantile function of the training budgets: share in [0, 1) of the mass outside the bands -> ms."""
        mass = np.asarray(share, dtype=np.float64) * self._widths.sum()
        ends = np.cumsum(self._widths)
        piece = np.minimum(np.searchsorted(ends, mass, side="right"), len(ends) - 1)
        offset = mass - (ends[piece] - self._widths[piece])
        budgets = np.exp(self._starts[piece] + offset)
        # exp may overshoot an edge by rounding.
        return np.clip(budgets, np.exp(self._starts[piece]), np.exp(self._starts[piece] + self._widths[piece]))

    def evenly(self, count: int) -> list[float]:
        """`count` training budgets in the middles of equal shares of the mass, rising, ms."""
        return [float(ms) for ms in self.at((np.arange(count) + 0.5) / count)]

    def held_out(self, points: int = 1) -> tuple[float, ...]:
        """Budgets never trained on, rising, ms: one below the range, `points` evenly in every band, one above."""
        shares = [(point + 0.5) / points for point in range(points)]
        inside = (low ** (1 - share) * high**share for low, high in self.bands for share in shares)
        return (self.low_ms / _OUTSIDE, *inside, self.high_ms * _OUTSIDE)

    def nearest(self, budget_ms: float, scale: float = 1.0) -> float:
        """`budget_ms` clamped to the training range: the controller does not extrapolate reliably.

        Args:
            scale: factor on the range: latency of the serving device relative to the training device.
        """
        return min(max(budget_ms, self.low_ms * scale), self.high_ms * scale)

    def bin_index(self, budget_ms: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Penalty bin 0 to bins - 1 of each budget; budgets outside the range belong to the outermost bins."""
        share = (np.log(np.asarray(budget_ms, dtype=np.float64)) - math.log(self.low_ms)) / self._log_width
        return np.clip(np.floor(share * self.bins), 0, self.bins - 1).astype(np.int64)

    @property
    def _log_width(self) -> float:
        return math.log(self.high_ms) - math.log(self.low_ms)

    @cached_property
    def _edges(self) -> Array:
        """Log edges of the training intervals, (intervals, 2)."""
        cuts = [edge for band in self.bands for edge in band]
        return np.log([self.low_ms, *cuts, self.high_ms]).reshape(-1, 2)

    @cached_property
    def _starts(self) -> Array:
        return np.ascontiguousarray(self._edges[:, 0])

    @cached_property
    def _widths(self) -> Array:
        return np.asarray(self._edges[:, 1] - self._edges[:, 0])


def budget_range(
    engine: "Engine",
    clock: Clock | MeasuringClock,
    space: KnobSpace,
    samples: Sequence[Any],
    new_tokens: int | None = None,
) -> tuple[float, float]:
    """The device's range over training samples, ms: p95 of the cheapest plan to p95 of the full plan.

    At the lower end some plan meets the budget for 95 % of requests, at the upper end the full plan does.

    Args:
        clock: a measuring clock runs up to 16 samples under both plans.
        new_tokens: answer length assumed for all; None takes the median of 16 samples under the full plan.

    Raises:
        UserError: no samples.
    """
    if not samples:
        raise UserError("a budget range needs training samples: the task has none")
    full = space.plan(space.full)
    plans = (space.plan(space.cheapest), full)
    subset = samples[:: max(1, len(samples) // _RANGE_SAMPLES)][:_RANGE_SAMPLES]
    if is_measuring(clock):
        for plan in plans:  # warm up, untimed
            clock.measure(subset[0], plan)
        times = [[clock.measure(sample, plan)[1].total for sample in subset] for plan in plans]
    else:
        length = _median_length(engine, subset, full) if new_tokens is None else new_tokens
        times = [[clock.latency(engine.shape(s, plan.tier), plan, length).total for s in samples] for plan in plans]
    low, high = (float(np.quantile(row, 0.95)) for row in times)
    return low, high


def _median_length(engine: "Engine", samples: Sequence[Any], plan: ExecutionPlan) -> int:
    """Median answer length, tokens, at least 1."""
    outcomes = engine.outcomes(samples, [plan] * len(samples))
    return max(1, round(float(np.median([outcome.n_tokens for outcome in outcomes]))))
