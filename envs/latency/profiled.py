"""A clock read off a profile table: small stage models, interpolated over tokens, blocks and
experts.

Every stage is a sum of non-negative costs of things that a request has more or less of (crops, positions, blocks,
experts, answer tokens), so the clock rises in each of them and stays sensible between and beyond what was measured.
"""

from collections.abc import Sequence
from functools import cached_property
from operator import mul
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.latency.clock import FULL_PLAN, REFERENCE_NEW_TOKENS
from envs.latency.profile_table import Cell, Identity, ProfileTable
from envs.latency.record import STAGES, LatencyRecord, RequestShape

Array = npt.NDArray[np.float64]
FEWEST_CELLS: Final = 8
_FLOOR: Final = 0.05
"""A stage below this share of its request is fitted as if it were that large: its relative error
does not matter."""


class ProfiledClock:
    """Latency interpolated from a table measured on this device.

    Args:
        table: measured cells.
        identity: what this process runs on; None trusts the table as it is (planning for another device).

    Raises:
        UserError: the table was measured on something else, or has fewer than 8 cells.
    """

    name: Final = "profiled"
    deterministic: Final = True

    def __init__(self, table: ProfileTable, identity: Identity | None = None) -> None:
        if identity is not None:
            table.check(identity)
        if len(table.cells) < FEWEST_CELLS:
            advice = f"measure {FEWEST_CELLS} or more with `ray-ctrl profile`"
            raise UserError(f"the profile table has {len(table.cells)} cells: {advice}")
        self.table = table
        self._costs = {stage: _fit(stage, table.cells) for stage in STAGES}

    @classmethod
    def for_engine(cls, table: ProfileTable, engine: Any) -> "ProfiledClock":
        """The clock of `table`, refused where `engine` runs on something else."""
        return cls(table, Identity.of(engine))

    @cached_property
    def reference_ms(self) -> float:
        """Latency of the full plan on the reference request, ms."""
        return self.latency(self.table.reference, FULL_PLAN, REFERENCE_NEW_TOKENS).total

    def latency(self, shape: RequestShape, plan: ExecutionPlan, new_tokens: int) -> LatencyRecord:
        """Median stage times of one request at batch 1, ms."""
        if new_tokens < 0:
            raise UserError(f"{new_tokens!r} new tokens are not allowed: give 0 or more")
        rows = quantities(shape, plan, new_tokens)
        return LatencyRecord(*(sum(map(mul, rows[stage], self._costs[stage])) for stage in STAGES))

    @property
    def costs(self) -> dict[str, tuple[float, ...]]:
        """Costs of each stage, ms, of the things that `quantities` counts."""
        return dict(self._costs)

    def quantile(self, share: float) -> float:
        """Quantile of measured over predicted latency in the table: noise of the device and misfit of the clock."""
        return float(np.quantile(self._ratios, share))

    @cached_property
    def median_error(self) -> float:
        """Median absolute relative error on the table's own cells: how well the stage models fit."""
        errors = [abs(self._predict(c) / float(np.median(c.totals_ms)) - 1.0) for c in self.table.cells]
        return float(np.median(errors))

    @cached_property
    def _ratios(self) -> Array:
        return np.array([ms / self._predict(cell) for cell in self.table.cells for ms in cell.totals_ms])

    def _predict(self, cell: Cell) -> float:
        return self.latency(cell.shape, cell.plan, cell.new_tokens).total


def quantities(shape: RequestShape, plan: ExecutionPlan, new_tokens: int) -> dict[str, tuple[float, ...]]:
    """What each stage has to do, in units near 1: one vector of costed things per stage.

    The last block of the prompt pass runs for the last position alone, beyond its keys and values.
    """
    thousands, first, top_k = shape.prompt_tokens / 1000, plan.insertion, plan.top_k / 8
    blocks = len(plan.blocks)
    whole = max(blocks - first - 1, 0)
    context = (shape.prompt_tokens + new_tokens / 2) / 1000
    image, crops = float(shape.crops > 0), shape.crops / 10
    return {
        "processor": (1.0, image, crops, shape.pixels / 1e6, thousands),
        "vision": (image, crops, crops**2),
        "prefix": (1.0, thousands, first, first * thousands, first * thousands**2),
        "suffix": (
            1.0,
            thousands,
            whole,
            whole * top_k,
            whole * thousands,
            whole * thousands * top_k,
            whole * thousands**2,
        ),
        "decode": (
            new_tokens,
            new_tokens * blocks,
            new_tokens * (first + (blocks - first) * top_k),
            new_tokens * blocks * context,
        ),
        "controller": (1.0,),
    }


def _fit(stage: str, cells: Sequence[Cell]) -> tuple[float, ...]:
    """Non-negative costs of one stage that minimise the squared relative error over the cells."""
    rows = np.array([quantities(cell.shape, cell.plan, cell.new_tokens)[stage] for cell in cells])
    times = np.array([getattr(cell.median, stage) for cell in cells])
    if stage == "controller":
        return (float(np.median(times)),)
    floor = np.array([_FLOOR * cell.median.total for cell in cells])
    scale = 1.0 / np.maximum(times, floor)
    # Here, as scipy takes time to load and whoever only runs the model needs none of it.
    from scipy.optimize import nnls

    costs, _ = nnls(rows * scale[:, None], times * scale)
    return tuple(map(float, costs))
