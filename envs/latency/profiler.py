"""Measure a device: real requests at batch 1, in random order, into a profile."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, INSERTIONS, MODEL_BLOCKS, TIERS, TOP_KS, ExecutionPlan, block_options
from envs.latency.clock import reference_shape
from envs.latency.latency_profile import Cell, Identity, LatencyProfile
from envs.latency.profiled import FEWEST_CELLS, ProfiledClock
from envs.latency.record import STAGES, LatencyRecord

if TYPE_CHECKING:
    from envs.contracts import Engine

Progress = Callable[[int, int], None]
_WARM_UP: Final = 2
GOOD_FIT: Final = 0.05
"""Largest median error of a fit that budgets can be based on."""
_MAX_PASSES: Final = 3
"""A busy device needs more repeats: up to three times as many are made."""
_Request = tuple[Any, ExecutionPlan]


def profile(
    engine: "Engine",
    samples: Sequence[Any],
    *,
    repeats: int = 5,
    per_tiling: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    controller: Any = None,
) -> LatencyProfile:
    """Measure requests under diverse plans for every tiling of `samples`.

    Passes over all cells are shuffled, so that warm-up, throttling and disturbances affect all cells alike.

    Args:
        samples: `per_tiling` of them are used for each tiling.
        repeats: timed runs of each cell; up to three times as many until the fit's median error is at most 5 %.
        per_tiling: cells for each tiling.
        seed: of plans and order.
        progress: called with (requests done, requests in total).
        controller: timed within the requests; without one that stage counts as 0 ms.

    Raises:
        UserError: no samples, or fewer than 1 repeat or cell.
    """
    if not samples or repeats < 1 or per_tiling < 1:
        raise UserError(
            f"nothing to profile with {len(samples)} samples, {repeats} repeats and {per_tiling} cells per tiling: "
            f"give 1 or more of each"
        )
    rng = np.random.default_rng(seed)
    requests = draw_requests(engine, samples, per_tiling, rng)
    identity, reference = Identity.of(engine), reference_shape(engine.model.config)
    measurement = Measurement(engine, requests, controller)
    for _ in range(_MAX_PASSES):
        measurement.run(repeats, rng, progress)
        measured = LatencyProfile(identity, reference, measurement.cells())
        if len(requests) < FEWEST_CELLS or ProfiledClock(measured).median_error <= GOOD_FIT:
            break
    return measured


def draw_requests(
    engine: "Engine", samples: Sequence[Any], per_tiling: int, rng: np.random.Generator
) -> list[_Request]:
    """`per_tiling` requests for every tiling: samples in turn, plans over the range of the knobs."""
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
        for i, (insertion, top_k, blocks) in enumerate(_knob_values(per_tiling, rng)):
            sample, tier = places[order[i % len(order)]]
            requests.append((sample, _plan(tier, insertion, top_k, blocks, rng)))
    return requests


def _knob_values(count: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
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


class Measurement:
    """Repeated runs of requests; the first request of every tier warms up the device."""

    def __init__(self, engine: "Engine", requests: Sequence[_Request], controller: Any) -> None:
        self.engine, self.requests, self.controller = engine, requests, controller
        self.records: list[list[LatencyRecord]] = [[] for _ in requests]
        self.lengths = [0] * len(requests)
        first = {plan.tier: (sample, plan) for sample, plan in reversed(requests)}
        for sample, plan in [*first.values()] * _WARM_UP:
            engine.run_measured(sample, plan, controller)

    def run(self, repeats: int, rng: np.random.Generator, progress: Progress | None) -> None:
        """Run every request `repeats` times more, each pass in a new random order."""
        before, count = len(self.records[0]), len(self.requests)
        order = [int(i) for _ in range(repeats) for i in rng.permutation(count)]
        for done, i in enumerate(order, start=before * count + 1):
            outcome, record = self.engine.run_measured(*self.requests[i], self.controller)
            self.records[i].append(record)
            self.lengths[i] = outcome.n_tokens
            if progress is not None:
                progress(done, (before + repeats) * count)

    def cells(self) -> tuple[Cell, ...]:
        """Summary of every request."""
        return tuple(map(self._cell, self.requests, self.lengths, self.records))

    def _cell(self, request: _Request, new_tokens: int, records: Sequence[LatencyRecord]) -> Cell:
        sample, plan = request
        medians = (float(np.median([getattr(record, stage) for record in records])) for stage in STAGES)
        return Cell(
            shape=self.engine.shape(sample, plan.tier),
            plan=plan,
            new_tokens=new_tokens,
            median=LatencyRecord(*medians),
            totals_ms=tuple(record.total for record in records),
        )
