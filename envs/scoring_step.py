"""The end of a batch of episodes: plans run, answers scored, latencies read, rewards given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.data.sample import Sample
from envs.env_resources import World
from envs.knobs import ExecutionPlan, KnobSpace
from envs.latency import RequestShape, is_measuring
from envs.reward import reward
from envs.schedule import Context

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Finished:
    """B ended episodes: `rewards` (B,), and `infos`, arrays (B,) by name."""

    rewards: npt.NDArray[np.float64]
    infos: dict[str, Array]


def finish(
    world: World,
    contexts: Sequence[Context],
    choices: Array,
    multipliers: npt.NDArray[np.float64],
    feasible: npt.NDArray[np.bool_],
) -> Finished:
    """Run the chosen plans and score them.

    Args:
        contexts: one per row.
        choices: legal action indices (B, 4).
        multipliers: penalty multiplier of each budget bin.
        feasible: (B,) whether the guardrail found a plan predicted to meet the budget.

    Returns:
        Rewards, and infos: accuracy, latency_ms, budget_ms, budget_bin, multiplier, feasible, avoidable (whether the
        cheapest plan would have met the budget with an answer as long), context, sample, new_tokens and the four
        choices as numbers (tier as its index).
    """
    plans = _plans(world.space, choices)
    samples = [world.samples[context.sample] for context in contexts]
    outcomes, latency_ms = run_plans(world, samples, plans)
    accuracy = np.array([world.engine.accuracy(s, o) for s, o in zip(samples, outcomes, strict=True)], np.float64)
    budget_ms = np.array([context.budget_ms for context in contexts])
    bins = world.budgets.bin_index(budget_ms)
    rewards = reward(accuracy, latency_ms, budget_ms, multipliers[bins], world.reward.budget_use_bonus)
    new_tokens = np.array([outcome.n_tokens for outcome in outcomes], np.int64)
    infos: dict[str, Array] = {
        "accuracy": accuracy,
        "latency_ms": latency_ms,
        "budget_ms": budget_ms,
        "budget_bin": bins,
        "multiplier": multipliers[bins],
        "feasible": feasible,
        "avoidable": feasible & (_least_ms(world, samples, new_tokens) <= budget_ms),
        "context": np.array([context.id for context in contexts], np.int64),
        "sample": np.array([context.sample for context in contexts], np.int64),
        "tier": choices[:, 0].copy(),
        "insertion": choices[:, 1] + 1,
        "top_k": choices[:, 2] + 4,
        "blocks": choices[:, 3] + 12,
        "new_tokens": new_tokens,
    }
    return Finished(rewards, infos)


def run_plans(
    world: World, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]
) -> tuple[list[Any], npt.NDArray[np.float64]]:
    """Outcomes, and latencies in ms (B,): one batched call, or one measured request after another."""
    if is_measuring(world.clock):
        pairs = [world.clock.measure(s, plan) for s, plan in zip(samples, plans, strict=True)]
        return [outcome for outcome, _ in pairs], np.array([record.total for _, record in pairs])
    outcomes = world.engine.outcomes(samples, plans)
    return outcomes, _latencies(world, samples, plans, [outcome.n_tokens for outcome in outcomes])


def _least_ms(world: World, samples: Sequence[Sample], new_tokens: Array) -> npt.NDArray[np.float64]:
    """Latency of the cheapest plan with answers of these lengths, ms (B,); 0 if only measuring could tell."""
    if is_measuring(world.clock):
        return np.zeros(len(samples))
    cheapest = world.space.plan(world.space.cheapest)
    return _latencies(world, samples, [cheapest] * len(samples), new_tokens.tolist())


def _latencies(
    world: World, samples: Sequence[Sample], plans: Sequence[ExecutionPlan], new_tokens: Sequence[int]
) -> npt.NDArray[np.float64]:
    clock: Any = world.clock
    known: dict[tuple[RequestShape, ExecutionPlan, int], float] = {}
    latencies = []
    for sample, plan, tokens in zip(samples, plans, new_tokens, strict=True):
        key = (world.engine.shape(sample, plan.tier), plan, tokens)
        if key not in known:
            known[key] = clock.latency(*key).total
        latencies.append(known[key])
    return np.array(latencies, np.float64)


def _plans(space: KnobSpace, choices: Array) -> list[ExecutionPlan]:
    known: dict[tuple[int, ...], ExecutionPlan] = {}
    for action in map(tuple, choices.tolist()):
        if action not in known:
            known[action] = space.plan(space.decode(action))
    return [known[action] for action in map(tuple, choices.tolist())]
