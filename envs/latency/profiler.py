"""Measuring a device: real requests at batch 1, interleaved at random, into a profile table."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from envs.errors import UserError
from envs.knobs import (
    BLOCK_COUNTS,
    INSERTIONS,
    MODEL_BLOCKS,
    TIERS,
    TOP_KS,
    ExecutionPlan,
    block_options,
)
from envs.latency.clock import reference_shape
from envs.latency.profile_table import Cell, Identity, ProfileTable
from envs.latency.profiled import FEWEST_CELLS, ProfiledClock
from envs.latency.record import STAGES, LatencyRecord, RequestShape

Progress = Callable[[int, int], None]
_WARM_UP: Final = 2
GOOD_FIT: Final = 0.05
"""Median error of a fit that budgets can be made from."""
_MOST_TURNS: Final = 3
"""On a device that is busy with other things, medians need more repeats: up to three times as many are made."""


@dataclass(frozen=True)
class HoldOut:
    """A clock against measured requests that it was not fitted to.

    Attributes:
        errors: |predicted / measured - 1| of every request.
    """

    errors: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median absolute relative error."""
        return float(np.median(self.errors))

    @property
    def p95(self) -> float:
        """95th percentile of the absolute relative error."""
        return float(np.quantile(self.errors, 0.95))


def profile(
    engine: Any,
    samples: Sequence[Any],
    *,
    repeats: int = 5,
    per_tiling: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    controller: Any = None,
) -> ProfileTable:
    """Measure this device: for every tiling that `samples` have, requests under plans spread over
    the knobs.

    The passes over all cells are shuffled and interleaved, so that a device that warms up, throttles or is disturbed
    for a while does so for all cells alike.

    Args:
        engine: runs requests (`run_measured`).
        samples: what to measure with; more are better, `per_tiling` of them are used for each tiling.
        repeats: timed runs of each cell; up to three times as many where the clock does not fit within 5 % yet.
        per_tiling: cells for each tiling.
        seed: of plans and order.
        progress: called with (requests done, requests in all).
        controller: timed within the requests where given; else that stage counts as 0 ms.

    Raises:
        UserError: no samples, or fewer than 1 repeat or cell.
    """
    if not samples or repeats < 1 or per_tiling < 1:
        raise UserError(
            f"nothing to profile with {len(samples)} samples, {repeats} repeats and {per_tiling} cells per tiling: "
            f"give 1 or more of each"
        )
    rng = np.random.default_rng(seed)
    cells = _cells(engine, samples, per_tiling, rng)
    identity, reference = Identity.of(engine), reference_shape(engine.model.config)
    seen = _Records(len(cells))
    _warm_up(engine, cells, controller)
    for turn in range(1, _MOST_TURNS + 1):
        seen.run(engine, cells, repeats, rng, controller, _later(progress, turn))
        table = ProfileTable(identity, reference, seen.cells(engine, cells))
        if len(cells) < FEWEST_CELLS or ProfiledClock(table).median_error <= GOOD_FIT:
            break
    return table


def hold_out(
    clock: ProfiledClock,
    engine: Any,
    samples: Sequence[Any],
    *,
    requests: int = 48,
    repeats: int = 3,
    seed: int = 1,
    controller: Any = None,
) -> HoldOut:
    """Compare `clock` with requests measured now, the median of `repeats` runs each. Give samples not profiled.

    Args:
        controller: as it was for the profile; without one, its time is left out on both sides.
    """
    rng = np.random.default_rng(seed)
    cells = _cells(engine, samples, requests, rng)
    chosen = [cells[i] for i in rng.permutation(len(cells))[:requests]]
    errors = []
    for cell in _measure(engine, chosen, repeats, rng, controller):
        guess = clock.latency(cell.shape, cell.plan, cell.new_tokens)
        expected = guess.total - (guess.controller if controller is None else 0.0)
        errors.append(abs(expected / float(np.median(cell.totals_ms)) - 1.0))
    return HoldOut(tuple(errors))


_Request = tuple[Any, ExecutionPlan]


def _cells(engine: Any, samples: Sequence[Any], per_tiling: int, rng: np.random.Generator) -> list[_Request]:
    """Requests to measure: for every tiling `per_tiling` of them, samples taken in turn, plans
    spread over the knobs."""
    by_tiling: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
    for sample in samples:
        tilings: dict[Any, str] = {}
        for tier in TIERS:
            tilings.setdefault(engine.tiling(sample, tier), tier)
        for tiling, tier in tilings.items():
            by_tiling[tiling].append((sample, tier))
    requests = []
    for tiling in sorted(by_tiling, key=str):
        places = by_tiling[tiling]
        order = rng.permutation(len(places))
        for i, (insertion, top_k, blocks) in enumerate(_spread(per_tiling, rng)):
            sample, tier = places[order[i % len(order)]]
            requests.append((sample, _plan(tier, insertion, top_k, blocks, rng)))
    return requests


def _spread(count: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """(insertion, top-k, blocks) `count` times: both extremes, then every option of a knob about equally often."""
    extremes = [(1, max(TOP_KS), max(BLOCK_COUNTS)), (1, min(TOP_KS), min(BLOCK_COUNTS))]
    insertions = np.resize(rng.permutation(INSERTIONS), count)
    top_ks = np.resize(rng.permutation(TOP_KS), count)
    rng.shuffle(top_ks)
    drawn = [(int(p), int(k), int(rng.choice(block_options(int(p))))) for p, k in zip(insertions, top_ks, strict=True)]
    return (extremes + drawn)[:count]


def _plan(tier: str, insertion: int, top_k: int, blocks: int, rng: np.random.Generator) -> ExecutionPlan:
    dropped = rng.choice(np.arange(insertion, MODEL_BLOCKS), MODEL_BLOCKS - blocks, replace=False)
    return ExecutionPlan(tier, insertion, top_k, tuple(b for b in range(MODEL_BLOCKS) if b not in dropped))


def _measure(
    engine: Any, requests: Sequence[_Request], repeats: int, rng: np.random.Generator, controller: Any
) -> tuple[Cell, ...]:
    """Warm up, then run every request `repeats` times in shuffled passes."""
    _warm_up(engine, requests, controller)
    seen = _Records(len(requests))
    seen.run(engine, requests, repeats, rng, controller, None)
    return seen.cells(engine, requests)


def _warm_up(engine: Any, requests: Sequence[_Request], controller: Any) -> None:
    """Run the first request of every tier, untimed."""
    first = {plan.tier: (sample, plan) for sample, plan in reversed(requests)}
    for _ in range(_WARM_UP):
        for sample, plan in first.values():
            engine.run_measured(sample, plan, controller)


class _Records:
    """What was measured of each request so far."""

    def __init__(self, requests: int) -> None:
        self.records: list[list[LatencyRecord]] = [[] for _ in range(requests)]
        self.lengths = [0] * requests

    def run(
        self,
        engine: Any,
        requests: Sequence[_Request],
        repeats: int,
        rng: np.random.Generator,
        controller: Any,
        progress: Progress | None,
    ) -> None:
        """Run every request `repeats` times more, each pass in an order of its own."""
        total = repeats * len(requests)
        for done, i in enumerate((i for _ in range(repeats) for i in rng.permutation(len(requests))), start=1):
            outcome, record = engine.run_measured(*requests[i], controller)
            self.records[i].append(record)
            self.lengths[i] = outcome.n_tokens
            if progress is not None:
                progress(done, total)

    def cells(self, engine: Any, requests: Sequence[_Request]) -> tuple[Cell, ...]:
        """Medians and spreads of every request."""
        return tuple(
            _summary(engine.shape(sample, plan.tier), plan, length, seen)
            for (sample, plan), length, seen in zip(requests, self.lengths, self.records, strict=True)
        )


def _later(progress: Progress | None, turn: int) -> Progress | None:
    """`progress` for one of several turns, counted over all turns begun."""
    if progress is None:
        return None
    return lambda done, total: progress((turn - 1) * total + done, turn * total)


def _summary(shape: RequestShape, plan: ExecutionPlan, new_tokens: int, seen: Sequence[LatencyRecord]) -> Cell:
    times = np.array([[getattr(record, stage) for stage in STAGES] for record in seen])
    median = np.median(times, axis=0)
    spread = 1.4826 * np.median(np.abs(times - median), axis=0)
    return Cell(
        shape=shape,
        plan=plan,
        new_tokens=new_tokens,
        median=LatencyRecord(*map(float, median)),
        spread=LatencyRecord(*map(float, spread)),
        totals_ms=tuple(record.total for record in seen),
    )
