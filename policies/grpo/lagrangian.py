"""The price of overrunning the budget, one per budget bin, moved until violations meet a target."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from envs.errors import UserError

FloatArray = npt.NDArray[np.float64]
FLOOR: Final = 0.01
"""Lowest price, so that a rise can begin, and lowest rate that an excess is measured against."""


def overrun_cost(latency_ms: npt.ArrayLike, budget_ms: npt.ArrayLike) -> FloatArray:
    """What the price is paid for, (B,): 0 within budget, else 1 plus the relative overrun, at most 2.

    The 1 is the violation itself, whose rate the prices steer. The overrun on top never matters where the
    budget can be met, but where no knobs meet it, it still makes the faster ones better; without it such
    budgets teach the controller to ignore budgets.
    """
    overrun = np.asarray(latency_ms, dtype=np.float64) / np.asarray(budget_ms, dtype=np.float64) - 1.0
    return np.where(overrun > 0.0, 1.0 + np.minimum(overrun, 1.0), 0.0)


@dataclass(frozen=True)
class PriceSettings:
    """How prices move.

    Attributes:
        edges: inner edges, rising, in log(budget / reference latency); k edges make k + 1 bins, open at both ends.
        target: violation rate every bin should meet, 0 to 1.
        step: largest change of a price's logarithm per update.
        initial: price at the start.
        maximum: highest price.
        memory: weight of the past in the running violation rate, 0 (none) to below 1.
        utilisation: return for the whole budget used, 0 or more. A tie-breaker: of plans that answered the samples seen
            equally well it prefers the dearer one in time, which on unseen samples answers no worse.
    """

    edges: tuple[float, ...] = (-2.0, -1.5, -1.0, -0.5, 0.0)
    target: float = 0.05
    step: float = 0.1
    initial: float = 0.5
    maximum: float = 5.0
    memory: float = 0.8
    utilisation: float = 0.0

    def __post_init__(self) -> None:
        edges = tuple(float(edge) for edge in self.edges)
        object.__setattr__(self, "edges", edges)
        if not np.isfinite(edges).all() or any(low >= high for low, high in pairwise(edges)):
            raise UserError(f"price bin edges {edges} are not allowed: give finite, rising log ratios")
        allowed = {
            "target": 0.0 <= self.target <= 1.0,
            "step": 0.0 <= self.step < np.inf,
            "initial": 0.0 <= self.initial <= self.maximum,
            "maximum": 0.0 <= self.maximum < np.inf,
            "memory": 0.0 <= self.memory < 1.0,
            "utilisation": 0.0 <= self.utilisation < np.inf,
        }
        for name, fine in allowed.items():
            if not fine:
                raise UserError(
                    f"price {name} {getattr(self, name)!r} is not allowed: target in [0, 1], step >= 0, "
                    "0 <= initial <= maximum, memory in [0, 1), utilisation >= 0"
                )

    @property
    def bins(self) -> int:
        return len(self.edges) + 1


@dataclass(frozen=True)
class Prices:
    """Prices and running violation rates, one per bin (NaN: no rollout of that bin seen yet). Immutable."""

    settings: PriceSettings
    values: FloatArray = field(default_factory=lambda: np.empty(0))
    rates: FloatArray = field(default_factory=lambda: np.empty(0))

    @classmethod
    def start(cls, settings: PriceSettings) -> "Prices":
        return cls(settings, np.full(settings.bins, settings.initial), np.full(settings.bins, np.nan))

    def bin_of(self, log_ratio: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Bin (B,) of each log(budget / reference latency) (B,)."""
        return np.searchsorted(self.settings.edges, np.asarray(log_ratio, dtype=np.float64), side="right")

    def of(self, log_ratio: npt.ArrayLike) -> FloatArray:
        """Current price (B,) for each log ratio (B,)."""
        return self.values[self.bin_of(log_ratio)]

    def returns(
        self,
        accuracy: npt.ArrayLike,
        latency_ms: npt.ArrayLike,
        budget_ms: npt.ArrayLike,
        log_ratio: npt.ArrayLike,
    ) -> FloatArray:
        """What is maximised, (B,): accuracy, less the price of overrunning, plus the bonus for the budget used."""
        used = np.minimum(np.asarray(latency_ms, np.float64) / np.asarray(budget_ms, np.float64), 1.0)
        cost = self.of(log_ratio) * overrun_cost(latency_ms, budget_ms)
        return np.asarray(accuracy, np.float64) - cost + self.settings.utilisation * used

    def updated(self, log_ratio: npt.ArrayLike, violation: npt.ArrayLike) -> "Prices":
        """Prices after one iteration's rollouts: up where the running violation rate is above target, else down.

        Dual ascent on the Lagrangian of "maximise accuracy, violation rate <= target" (Tessler et al. 2019), in the
        logarithm of the price and by the excess relative to the target, at most `step`. A bin that nobody overruns
        gives up its price as fast as one that is overrun twice too often raises it: were the fall slower, dear plans
        would have died out of the policy before they become affordable. The rate is smoothed over iterations, the
        price kept within [`FLOOR`, maximum]. Bins without rollouts stay as they are.

        Args:
            log_ratio: (B,) of every rollout.
            violation: (B,) 1 where latency > budget, else 0.
        """
        bins = self.bin_of(log_ratio)
        count = np.bincount(bins, minlength=self.settings.bins)
        total = np.bincount(bins, weights=np.asarray(violation, dtype=np.float64), minlength=self.settings.bins)
        seen = count > 0
        fresh = np.divide(total, count, out=np.zeros_like(total), where=seen)
        past = np.where(np.isnan(self.rates), fresh, self.rates)
        memory = self.settings.memory
        rates = np.where(seen, memory * past + (1.0 - memory) * fresh, self.rates)
        target = max(self.settings.target, FLOOR)
        moved = self.values * np.exp(self.settings.step * np.clip((rates - self.settings.target) / target, -1.0, 1.0))
        values = np.where(seen, np.clip(moved, min(FLOOR, self.settings.maximum), self.settings.maximum), self.values)
        return Prices(self.settings, values, rates)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"edges": list(self.settings.edges), "values": self.values.tolist(), "rates": self.rates.tolist()}

    def restored(self, state: Mapping[str, Any]) -> "Prices":
        """These settings with the prices of a checkpoint.

        Raises:
            UserError: the checkpoint has other bins.
        """
        if list(state["edges"]) != list(self.settings.edges):
            raise UserError(
                f"checkpoint has price bins at {state['edges']}, the configuration at {list(self.settings.edges)}: "
                "resume with the configuration of the run"
            )
        return Prices(self.settings, np.array(state["values"], float), np.array(state["rates"], float))
