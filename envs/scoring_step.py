"""The end of a batch of episodes: plans run, answers scored, latencies read, rewards given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.env_resources import World
from envs.knobs import ExecutionPlan, KnobSpace
from envs.latency import RequestShape, is_measuring
from envs.reward import plan_share, reward
from envs.schedule import Context
from envs.tasks.sample import Sample

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Finished:
    """B ended episodes: `rewards` (B,) at fixed prices, and `infos`, arrays (B,) by name."""

    rewards: npt.NDArray[np.float64]
    infos: dict[str, Array]


def finish(world: World, contexts: Sequence[Context], choices: Array) -> Finished:
    """Run the chosen plans and judge them.

    Args:
        contexts: one per row.
        choices: legal action indices (B, 4).

    Returns:
        Rewards, and infos: accuracy, latency_ms, budget_ms, context, sample, the four choices as numbers (tier as its
        index), and a `reward_` entry per term.
    """
    plans, shares = _plans(world.space, choices)
    samples = [world.samples[context.sample] for context in contexts]
    outcomes, latency_ms = _run(world, samples, plans)
    accuracy = np.array([world.engine.accuracy(s, o) for s, o in zip(samples, outcomes, strict=True)], np.float64)
    budget_ms = np.array([context.budget_ms for context in contexts])
    judged = reward(world.reward, accuracy, latency_ms, budget_ms, shares)
    infos: dict[str, Array] = {
        "accuracy": accuracy,
        "latency_ms": latency_ms,
        "budget_ms": budget_ms,
        "context": np.array([context.id for context in contexts], np.int64),
        "sample": np.array([context.sample for context in contexts], np.int64),
        "tier": choices[:, 0].copy(),
        "insertion": choices[:, 1] + 1,
        "top_k": choices[:, 2] + 4,
        "blocks": choices[:, 3] + 12,
        "new_tokens": np.array([outcome.n_tokens for outcome in outcomes], np.int64),
    }
    infos.update({f"reward_{term}": values for term, values in judged.terms.items()})
    return Finished(judged.total, infos)


def _plans(space: KnobSpace, choices: Array) -> tuple[list[ExecutionPlan], npt.NDArray[np.float64]]:
    known: dict[tuple[int, ...], tuple[ExecutionPlan, float]] = {}
    rows = []
    for action in map(tuple, choices.tolist()):
        if action not in known:
            plan = space.plan(space.decode(action))
            known[action] = (plan, plan_share(plan))
        rows.append(known[action])
    return [plan for plan, _ in rows], np.array([share for _, share in rows])


def _run(
    world: World, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]
) -> tuple[list[Any], npt.NDArray[np.float64]]:
    """Outcomes, and latencies in ms (B,): one batched call, or one measured request after another."""
    engine, clock = world.engine, world.clock
    if is_measuring(clock):
        pairs = [clock.measure(s, plan) for s, plan in zip(samples, plans, strict=True)]
        return [outcome for outcome, _ in pairs], np.array([record.total for _, record in pairs])
    outcomes = engine.outcomes(samples, plans)
    known: dict[tuple[RequestShape, ExecutionPlan, int], float] = {}
    latencies = []
    for sample, plan, outcome in zip(samples, plans, outcomes, strict=True):
        key = (engine.shape(sample, plan.tier), plan, outcome.n_tokens)
        if key not in known:
            known[key] = clock.latency(*key).total
        latencies.append(known[key])
    return outcomes, np.array(latencies, np.float64)
