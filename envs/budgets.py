"""Latency budgets: drawn for training, held out for evaluation, binned for penalty multipliers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from envs.errors import UserError
from envs.knobs import ExecutionPlan, KnobSpace
from envs.latency.clock import Clock, MeasuringClock, is_measuring

Array = npt.NDArray[np.float64]
_BAND_SHARE: Final = 0.08
"""Width of one held-out band as a share of the logarithmic range."""
_BEYOND: Final = 1.15
"""Held-out budgets beyond the ends lie this factor outside the range."""
_LOOKED_AT: Final = 16
"""Samples run to find the usual answer length, or both latencies under a measured clock."""


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
    """Training budgets, log-uniform over `low_ms` to `high_ms` with the held-out bands cut out.

    Attributes:
        low_ms, high_ms: ends of the training range.
        bands: held-out intervals inside the range, ms, rising and apart.
        bins: number of penalty bins, equal in log budget.

    Raises:
        UserError: an end that is zero, negative or not finite, an empty or inverted range, a band outside the range
            or overlapping another, bands that leave nothing to train on, or fewer than 1 bin.
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
        edges = [
            self.low_ms,
            *(check_budget(edge) for band in self.bands for edge in band),
            self.high_ms,
        ]
        inside = edges[1:-1]
        if any(a >= b for a, b in pairwise(inside)) or sorted(edges) != edges:
            raise UserError(
                f"held-out bands {self.bands} are not allowed: give rising intervals that do not touch, within "
                f"{self.low_ms} to {self.high_ms} ms"
            )
        if self._widths.sum() <= 0:
            raise UserError(f"held-out bands {self.bands} cover the whole range: leave budgets to train on")
        if self.bins < 1:
            raise UserError(f"{self.bins} penalty bins are not allowed: give 1 or more")

    @classmethod
    def over(cls, low_ms: float, high_ms: float, bands: int = 3, bins: int = 8) -> "BudgetDistribution":
        """The range with `bands` evenly spaced held-out bands, each 8 % of its logarithm wide (fewer where many).

        Raises:
            UserError: an unusable range or a negative number of bands.
        """
        if bands < 0:
            raise UserError(f"{bands} held-out bands are not allowed: give 0 or more")
        plain = cls(low_ms, high_ms, (), bins)
        width = min(_BAND_SHARE, 0.5 / max(bands, 1))
        middles = [(i + 1) / (bands + 1) for i in range(bands)]
        cut = tuple((plain._at_share(m - width / 2), plain._at_share(m + width / 2)) for m in middles)
        return cls(low_ms, high_ms, cut, bins)

    @classmethod
    def restored(cls, stored: Any) -> "BudgetDistribution":
        """The distribution whose fields `stored` holds, as JSON keeps them.

        Raises:
            UserError: fields missing or foreign, or an unusable range.
        """
        try:
            return cls(**stored)
        except (TypeError, ValueError) as error:
            raise UserError(f"budgets {stored!r} cannot be read ({error})") from None

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        """`n` training budgets, ms."""
        return self.at(rng.random(n))

    def at(self, share: npt.ArrayLike) -> Array:
        """Quantile function of the training budgets: share in [0, 1) of the mass outside the bands -> ms."""
        mass = np.asarray(share, dtype=np.float64) * self._widths.sum()
        ends = np.cumsum(self._widths)
        piece = np.minimum(np.searchsorted(ends, mass, side="right"), len(ends) - 1)
        offset = mass - (ends[piece] - self._widths[piece])
        budgets = np.exp(self._starts[piece] + offset)
        # Rounding in exp may step over an edge by a last bit.
        return np.clip(budgets, np.exp(self._starts[piece]), np.exp(self._starts[piece] + self._widths[piece]))

    def held_out(self) -> tuple[float, ...]:
        """Budgets never trained on, rising, ms: one below the range, the middle of every band, one above."""
        middles = (math.sqrt(low * high) for low, high in self.bands)
        return (self.low_ms / _BEYOND, *middles, self.high_ms * _BEYOND)

    def nearest(self, budget_ms: float, scale: float = 1.0) -> float:
        """The budget of the training range nearest to `budget_ms`, which is what a trained controller is shown.

        The controller does not extrapolate reliably, so budgets are clamped to the training range.

        Args:
            scale: of the range, for a device that takes so many times as long as the one trained for.
        """
        return min(max(budget_ms, self.low_ms * scale), self.high_ms * scale)

    def bin_index(self, budget_ms: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Price bin 0 to bins - 1 of each budget; budgets beyond the range belong to the outermost bins."""
        share = (np.log(np.asarray(budget_ms, dtype=np.float64)) - math.log(self.low_ms)) / self._log_width
        return np.clip(np.floor(share * self.bins), 0, self.bins - 1).astype(np.int64)

    @property
    def _log_width(self) -> float:
        return math.log(self.high_ms) - math.log(self.low_ms)

    def _at_share(self, share: float) -> float:
        return float(self.low_ms * math.exp(share * self._log_width))

    @cached_property
    def _edges(self) -> Array:
        """Log edges of the intervals trained on, (pieces, 2)."""
        cuts = [edge for band in self.bands for edge in band]
        return np.log([self.low_ms, *cuts, self.high_ms]).reshape(-1, 2)

    @cached_property
    def _starts(self) -> Array:
        return np.ascontiguousarray(self._edges[:, 0])

    @cached_property
    def _widths(self) -> Array:
        return np.asarray(self._edges[:, 1] - self._edges[:, 0])


def budget_range(
    engine: Any,
    clock: Clock | MeasuringClock,
    space: KnobSpace,
    samples: Sequence[Any],
    new_tokens: int | None = None,
) -> tuple[float, float]:
    """The device's range over training samples, ms: p95 of the cheapest plan to p95 of the most expensive.

    At the lower end 95 % of requests can be served at all, at the upper end 95 % of them in full, by the latency that
    rollouts are judged by: a spread on top, large in a table measured on a busy device, would put every plan in time.

    Args:
        engine: gives a sample's sizes, and runs 16 samples for the usual answer length.
        clock: profiled or roofline; a measured clock runs up to 16 samples under both plans.
        space: whose cheapest and full knobs count.
        samples: training samples.
        new_tokens: answer length assumed for all; None takes the median of those 16 under the full plan.

    Raises:
        UserError: no samples.
    """
    if not samples:
        raise UserError("a budget range needs training samples: the task has none")
    cheapest, full = space.plan(space.cheapest), space.plan(space.full)
    spread = samples[:: max(1, len(samples) // _LOOKED_AT)][:_LOOKED_AT]
    if is_measuring(clock):
        for plan in (cheapest, full):  # untimed: a first request finds nothing warm
            clock.measure(spread[0], plan)
        times = [[clock.measure(s, plan)[1].total for s in spread] for plan in (cheapest, full)]
    else:
        length = _usual_length(engine, spread, full) if new_tokens is None else new_tokens
        plans = (cheapest, full)
        times = [[clock.latency(engine.shape(s, plan.tier), plan, length).total for s in samples] for plan in plans]
    low, high = (float(np.quantile(row, 0.95)) for row in times)
    return low, high


def _usual_length(engine: Any, samples: Sequence[Any], plan: ExecutionPlan) -> int:
    """Median answer length, tokens; one at least."""
    outcomes = engine.outcomes(samples, [plan] * len(samples))
    return max(1, round(float(np.median([outcome.n_tokens for outcome in outcomes]))))
