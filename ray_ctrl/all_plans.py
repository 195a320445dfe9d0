"""Outcomes of every distinct plan of many samples, shared among the machine's cores.

Batches are the same for any number of processes, which meet in the outcome store alone, so the outcomes are those of
one process.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any, Final

from envs.engine import Outcome
from envs.env_resources import EnvConfig, EnvResources
from envs.knobs import TIERS, ExecutionPlan
from ray_ctrl.console import console, counted

BATCH: Final = 1024
"""Requests of one engine call; larger ones are no faster, and progress is reported between two."""
LEAST_BATCHES: Final = 4
"""Of a process, which takes seconds to load the model."""


def distinct_plans(resources: EnvResources) -> list[ExecutionPlan]:
    """All plans that differ in what the model runs, in the space's order."""
    return [resources.space.plan(knobs) for knobs in resources.space.distinct]


def run_all_plans(resources: EnvResources, samples: Sequence[Any], what: str) -> Iterator[list[Outcome]]:
    """Outcomes of every distinct plan, sample by sample.

    Args:
        what: the samples' name in progress lines.
    """
    plans, done = len(resources.space.distinct), 0
    with counted(f"running all plans on {what}") as progress:
        for batch in _batches(resources, samples):
            outcomes = _run(resources, batch)
            done += len(batch)
            progress(done, len(samples))
            yield from (outcomes[start : start + plans] for start in range(0, len(outcomes), plans))


def fill_store(config: EnvConfig, what: str) -> EnvResources:
    """Runs what the store does not know of all plans of a split, in one process per core; returns its resources.

    Nothing is run without a store, where processes could not meet, or on a GPU, which one process fills.

    Args:
        what: the samples' name in progress lines.
    """
    resources = config.build()
    batches = [batch for batch in _batches(resources, resources.samples) if _missing(resources, batch)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores // config.model.threads, len(batches) // LEAST_BATCHES)
    if processes < 2 or config.store.path is None or resources.engine.model.device.type != "cpu":
        return resources
    index = {sample.id: number for number, sample in enumerate(resources.samples)}
    shares = [[index[sample.id] for sample in batch] for batch in batches]
    try:
        _run_shares(config, shares, processes, f"running all plans on {what}, {processes} processes")
    except BrokenProcessPool:
        console.print("a process that runs plans was killed, perhaps for memory: the rest runs in this one")
    return resources


def _run_shares(config: EnvConfig, shares: Sequence[Sequence[int]], processes: int, what: str) -> None:
    others = set(active_children())
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start, initargs=(config,)) as pool,
        counted(what) as progress,
    ):
        running = [pool.submit(_run_indices, share) for share in shares]
        try:
            for done, share in enumerate(as_completed(running), 1):
                share.result()
                progress(done, len(shares))
        except BrokenProcessPool:
            raise  # the pool has ended the others
        except BaseException:
            for child in set(active_children()) - others:
                child.terminate()  # an interrupted run does not wait for the batches under way
            raise


def _batches(resources: EnvResources, samples: Sequence[Any]) -> list[Sequence[Any]]:
    step = max(1, BATCH // len(resources.space.distinct))
    return [samples[first : first + step] for first in range(0, len(samples), step)]


def _run(resources: EnvResources, samples: Sequence[Any]) -> list[Outcome]:
    plans = distinct_plans(resources)
    return resources.engine.outcomes([sample for sample in samples for _ in plans], plans * len(samples))


def _missing(resources: EnvResources, samples: Sequence[Any]) -> bool:
    plans = distinct_plans(resources)
    return None in resources.engine.known_outcomes([sample for sample in samples for _ in plans], plans * len(samples))


_resources: EnvResources | None = None  # of a process of the pool


def _start(config: EnvConfig) -> None:
    """In a new process of the pool, which leaves Ctrl-C to its parent."""
    global _resources
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _resources = config.build()


def _run_indices(indices: Sequence[int]) -> None:
    assert _resources is not None  # set by the pool's initializer
    samples = [_resources.samples[index] for index in indices]
    # Latency tokens first: their pass leaves the prefixes that the plans reuse.
    rows = [sample for sample in samples for _ in TIERS]
    _resources.engine.latency_tokens(rows, list(TIERS) * len(samples), [0] * len(rows))
    _run(_resources, samples)
