"""The last step of a batch of episodes: run the plans, score answers, read latencies, give rewards."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.data.sample import Sample
from envs.env_resources import EnvResources
from envs.knobs import BLOCK_COUNTS, INSERTIONS, TOP_KS, ExecutionPlan
from envs.latency import RequestShape, is_measuring
from envs.reward import reward
from envs.schedule import Context

Array = npt.NDArray[Any]


def score(
    resources: EnvResources,
    contexts: Sequence[Context],
    choices: Array,
    multipliers: npt.NDArray[np.float64],
    feasible: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.float64], dict[str, Array]]:
    """Run the chosen plans of B episodes and score them.

    Args:
        choices: legal action indices (B, 4).
        multipliers: penalty multiplier of each budget bin.
        feasible: (B,) whether the guardrail found a plan predicted to meet the budget.

    Returns:
        Rewards (B,), and infos, arrays (B,) by name: accuracy, latency_ms, budget_ms, budget_bin, multiplier, feasible,
        avoidable (whether the cheapest plan would have met the budget with an answer of the same length), context,
        sample, new_tokens, execution (index into `KnobSpace.distinct`) and the four choices as numbers (tier as its
        index).
    """
    decoded = {
        tuple(row): resources.space.plan(resources.space.decode(row)) for row in np.unique(choices, axis=0).tolist()
    }
    plans = [decoded[tuple(row)] for row in choices.tolist()]
    samples = [resources.samples[context.sample] for context in contexts]
    outcomes, latency_ms = run_plans(resources, samples, plans)
    accuracy = np.array([resources.engine.accuracy(s, o) for s, o in zip(samples, outcomes, strict=True)], np.float64)
    budget_ms = np.array([context.budget_ms for context in contexts])
    bins = resources.budgets.bin_index(budget_ms)
    new_tokens = np.array([outcome.n_tokens for outcome in outcomes], np.int64)
    infos = {
        "accuracy": accuracy,
        "latency_ms": latency_ms,
        "budget_ms": budget_ms,
        "budget_bin": bins,
        "multiplier": multipliers[bins],
        "feasible": feasible,
        "avoidable": feasible & (_lowest_ms(resources, samples, new_tokens) <= budget_ms),
        "context": np.array([context.id for context in contexts], np.int64),
        "sample": np.array([context.sample for context in contexts], np.int64),
        "execution": resources.space.executions[tuple(choices.T)],
        "tier": choices[:, 0].copy(),
        "insertion": choices[:, 1] + INSERTIONS[0],
        "top_k": choices[:, 2] + TOP_KS[0],
        "blocks": choices[:, 3] + BLOCK_COUNTS[0],
        "new_tokens": new_tokens,
    }
    rewards = reward(accuracy, latency_ms, budget_ms, infos["multiplier"], resources.reward.budget_use_bonus)
    return rewards, infos


def run_plans(
    resources: EnvResources, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]
) -> tuple[list[Any], npt.NDArray[np.float64]]:
    """Outcomes, and latencies in ms (B,): one batched call, or one measured request after another."""
    if is_measuring(resources.clock):
        pairs = [resources.clock.measure(s, plan) for s, plan in zip(samples, plans, strict=True)]
        return [outcome for outcome, _ in pairs], np.array([record.total for _, record in pairs])
    outcomes = resources.engine.outcomes(samples, plans)
    return outcomes, latencies(resources, samples, plans, [outcome.n_tokens for outcome in outcomes])


def _lowest_ms(resources: EnvResources, samples: Sequence[Sample], new_tokens: Array) -> npt.NDArray[np.float64]:
    """Latency of the cheapest plan with answers of these lengths, ms (B,); 0 under a measuring clock."""
    if is_measuring(resources.clock):
        return np.zeros(len(samples))
    cheapest = resources.space.plan(resources.space.cheapest)
    return latencies(resources, samples, [cheapest] * len(samples), new_tokens.tolist())


def latencies(
    resources: EnvResources, samples: Sequence[Sample], plans: Sequence[ExecutionPlan], new_tokens: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Latencies by the latency source in use, which must not be a measuring one, with its noise, ms (B,)."""
    clock: Any = resources.clock
    known: dict[tuple[RequestShape, ExecutionPlan, int], float] = {}
    found = []
    for sample, plan, tokens in zip(samples, plans, new_tokens, strict=True):
        key = (resources.engine.shape(sample, plan.tier), plan, tokens)
        if key not in known:
            known[key] = clock.latency(*key).total
        found.append(known[key] * (1.0 if resources.noise is None else resources.noise.factor(sample.id, plan)))
    return np.array(found, np.float64)
