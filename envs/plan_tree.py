"""All decisions about a request and the returns of the plans whose outcomes are known, without running anything."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.env_resources import EnvResources
from envs.errors import UserError
from envs.knobs import HEAD_SIZES, STAGE1_PAIRS
from envs.latency import is_measuring
from envs.observation import Fits, Observation, observation_bounds, observe_latency_token
from envs.reward import reward
from envs.schedule import Context
from envs.scoring_step import latencies

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class KnownPlans:
    """What is known about one sample.

    Attributes:
        accuracy, latency_ms: (3, 5, 5, 5), NaN for plans without a known outcome and illegal ones.
        executions: (distinct executions,), which outcomes are known.
    """

    accuracy: Array
    latency_ms: Array
    executions: Array


def known_plans(resources: EnvResources, index: int) -> KnownPlans:
    """Accuracy and latency of every plan of a sample whose outcome the engine has.

    Raises:
        UserError: a measuring latency source, whose latencies are not known before a request runs.
    """
    if is_measuring(resources.clock):
        raise UserError(
            "grpo.advantages=known needs latencies of plans that do not run: set latency.source to profiled or "
            "roofline, or grpo.advantages=sampled"
        )
    space, sample = resources.space, resources.samples[index]
    distinct = [space.plan(knobs) for knobs in space.distinct]
    outcomes = resources.engine.known_outcomes([sample] * len(distinct), distinct)
    accuracy, latency_ms = (np.full(HEAD_SIZES, np.nan) for _ in range(2))
    actions = [action for action in map(space.encode, space.all) if outcomes[space.executions[action]] is not None]
    if actions:
        places = tuple(np.array(actions).T)
        found = [outcomes[place] for place in space.executions[places]]
        plans = [space.plan(space.decode(action)) for action in actions]
        accuracy[places] = [resources.engine.accuracy(sample, outcome) for outcome in found]
        tokens = [outcome.n_tokens for outcome in found]
        latency_ms[places] = latencies(resources, [sample] * len(plans), plans, tokens)
    return KnownPlans(accuracy, latency_ms, np.array([outcome is not None for outcome in outcomes]))


def plan_tree(
    resources: EnvResources,
    contexts: Sequence[Context],
    log_ratios: Sequence[float],
    fits: Fits,
    first: Array,
    multipliers: Array,
    complete: MutableMapping[int, KnownPlans],
) -> tuple[Observation, Array, Array]:
    """Every second decision of N requests, and the returns of the plans that are known.

    Args:
        first: (N, 15), the legal pairs of stage 1.
        multipliers: penalty multiplier of each budget bin.
        complete: samples of which all is known already; added to.

    Returns:
        Observations of stage 2 after each pair, (N, 15, ...), zero after illegal ones; returns (N, 15, 25), NaN if not
        known; which executions of the sample are known, (N, distinct executions).
    """
    known = []
    for context in contexts:
        found = complete.get(context.sample) or known_plans(resources, context.sample)
        if found.executions.all():
            complete[context.sample] = found
        known.append(found)
    budget_ms = np.array([context.budget_ms for context in contexts])
    accuracy, latency_ms = (
        np.stack([getattr(found, name) for found in known]).reshape(len(known), -1)
        for name in ("accuracy", "latency_ms")
    )
    multiplier = multipliers[resources.budgets.bin_index(budget_ms)][:, None]
    returns = reward(accuracy, latency_ms, budget_ms[:, None], multiplier, resources.reward.budget_use_bonus)
    observation = _second_observations(resources, contexts, log_ratios, fits, first)
    executions = np.stack([found.executions for found in known])
    return observation, returns.reshape(len(known), STAGE1_PAIRS, -1), executions


def _second_observations(
    resources: EnvResources, contexts: Sequence[Context], log_ratios: Sequence[float], fits: Fits, first: Array
) -> Observation:
    rows, pairs = np.nonzero(first)
    choices = np.zeros((len(rows), len(HEAD_SIZES)), np.int64)
    choices[:, 0], choices[:, 1] = np.divmod(pairs, HEAD_SIZES[1])
    some = rows.tolist()
    legal = observe_latency_token(
        resources,
        [contexts[row] for row in some],
        [log_ratios[row] for row in some],
        [fits[row] for row in some],
        choices,
    )
    observation = {
        name: np.zeros((*first.shape, width), np.float32)
        for name, (_, _, width) in observation_bounds(resources.d_model).items()
    }
    for name, values in legal.items():
        observation[name][rows, pairs] = values
    return observation
