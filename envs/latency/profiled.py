"""Latency predicted from a profile by one linear model per stage.

A stage is a sum of non-negative costs per crop, position, block, expert and answer token, so the prediction is monotone
in each and extrapolates.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from operator import add, mul
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.latency.clock import FULL_PLAN, REFERENCE_NEW_TOKENS
from envs.latency.latency_profile import Cell, Identity, LatencyProfile
from envs.latency.record import STAGES, LatencyRecord, RequestShape

if TYPE_CHECKING:
    from envs.contracts import Engine

FEWEST_CELLS: Final = 8
_FLOOR: Final = 0.05
"""Stages below this share of their request count as this share in the fit's relative error."""


class ProfiledClock:
    """Latency interpolated from a profile of this device.

    Args:
        identity: of this process; None accepts a profile of any device.

    Raises:
        UserError: the profile has another identity or fewer than 8 cells.
    """

    name: Final = "profiled"

    def __init__(self, profile: LatencyProfile, identity: Identity | None = None) -> None:
        if identity is not None:
            profile.check(identity)
        if len(profile.cells) < FEWEST_CELLS:
            raise UserError(
                f"the profile has {len(profile.cells)} cells: measure {FEWEST_CELLS} or more with `ray-ctrl profile`"
            )
        self.profile = profile
        self._costs = {stage: _fit(stage, profile.cells) for stage in STAGES}

    @classmethod
    def for_engine(cls, profile: LatencyProfile, engine: "Engine") -> "ProfiledClock":
        """The source of `profile`, refused if `engine` has another identity."""
        return cls(profile, Identity.of(engine))

    @cached_property
    def reference_ms(self) -> float:
        """Latency of the full plan on the reference request, ms."""
        return self.latency(self.profile.reference, FULL_PLAN, REFERENCE_NEW_TOKENS).total

    def latency(self, shape: RequestShape, plan: ExecutionPlan, new_tokens: int) -> LatencyRecord:
        """Median stage times of one request at batch 1, ms."""
        if new_tokens < 0:
            raise UserError(f"{new_tokens!r} new tokens are not allowed: give 0 or more")
        return LatencyRecord(*stage_ms(self._costs, shape, plan.insertion, plan.top_k, len(plan.blocks), new_tokens))

    @property
    def costs(self) -> dict[str, tuple[float, ...]]:
        """Cost, ms, of each quantity of each stage (see `quantities`)."""
        return dict(self._costs)

    def quantile(self, share: float) -> float:
        """Quantile of measured over predicted latency in the profile: noise of the device and misfit of the model."""
        ratios = [ms / self._predict(cell) for cell in self.profile.cells for ms in cell.totals_ms]
        return float(np.quantile(ratios, share))

    @cached_property
    def repeat_ratios(self) -> tuple[float, ...]:
        """Latency of every repeat over the median of its cell, rising: noise of the device alone."""
        return tuple(sorted(float(ms / np.median(c.totals_ms)) for c in self.profile.cells for ms in c.totals_ms))

    @cached_property
    def median_error(self) -> float:
        """Median absolute relative error on the profile's own cells."""
        errors = [abs(self._predict(c) / float(np.median(c.totals_ms)) - 1.0) for c in self.profile.cells]
        return float(np.median(errors))

    def _predict(self, cell: Cell) -> float:
        return self.latency(cell.shape, cell.plan, cell.new_tokens).total


def stage_ms(
    costs: Mapping[str, Sequence[float]], shape: Any, insertion: Any, top_k: Any, blocks: Any, new_tokens: int
) -> list[Any]:
    """Milliseconds of each stage: numbers, or arrays if sizes and knobs are arrays that broadcast together."""
    rows = quantities(shape, insertion, top_k, blocks, new_tokens)
    # Not sum(): since Python 3.12 its last bit differs from that of arrays, and numbers must not depend on either.
    return [reduce(add, map(mul, rows[stage], costs[stage])) for stage in STAGES]


def quantities(shape: Any, insertion: Any, top_k: Any, blocks: Any, new_tokens: int) -> dict[str, tuple[Any, ...]]:
    """Regressors of each stage's latency, scaled to about 1.

    The last block of the prompt pass runs for the last position alone, apart from its keys and values.

    Args:
        shape: a `RequestShape`, or arrays under its names.
        insertion, top_k, blocks: of the plan, `blocks` the number of those it keeps.
    """
    thousands, first, top_k = shape.prompt_tokens / 1000, insertion, top_k / 8
    full = (blocks - first - 1) * (blocks > first)  # suffix blocks that run for all positions
    context = (shape.prompt_tokens + new_tokens / 2) / 1000
    image, crops = (shape.crops > 0) * 1.0, shape.crops / 10
    return {
        "processor": (1.0, image, crops, shape.pixels / 1e6, thousands),
        "vision": (image, crops, crops**2),
        "prefix": (1.0, thousands, first, first * thousands, first * thousands**2),
        "suffix": (1.0, thousands, *(full * x for x in (1.0, top_k, thousands, thousands * top_k, thousands**2))),
        "decode": tuple(new_tokens * x for x in (1, blocks, first + (blocks - first) * top_k, blocks * context)),
        "controller": (1.0,),
    }


def _fit(stage: str, cells: Sequence[Cell]) -> tuple[float, ...]:
    """Non-negative costs of one stage with the least squared relative error over the cells."""
    knobs = [(cell.plan.insertion, cell.plan.top_k, len(cell.plan.blocks)) for cell in cells]
    rows = np.array([quantities(c.shape, *k, c.new_tokens)[stage] for c, k in zip(cells, knobs, strict=True)])
    times = np.array([getattr(cell.median, stage) for cell in cells])
    if stage == "controller":
        return (float(np.median(times)),)
    floor = np.array([_FLOOR * cell.median.total for cell in cells])
    scale = 1.0 / np.maximum(times, floor)
    # Imported here, as scipy is slow to load and only fits need it.
    from scipy.optimize import nnls

    costs, _ = nnls(rows * scale[:, None], times * scale)
    return tuple(map(float, costs))
