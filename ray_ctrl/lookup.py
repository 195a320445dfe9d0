"""Baselines that the controller is compared with; the lookup table runs every distinct plan on training samples."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from envs.env_resources import EnvResources
from envs.latency import is_measuring
from policies.baselines import Baseline, FixedKnobs, LookupKnobs, RandomKnobs
from ray_ctrl import report
from ray_ctrl.all_plans import distinct_plans, fill_store, run_all_plans
from ray_ctrl.config import Config
from ray_ctrl.run_context import RunContext

STATIC_SHARE = 0.9  # of the budget, for plans chosen from a profile and then measured: a margin for the device's noise


def baselines(context: RunContext, resources: EnvResources, budgets: Sequence[float]) -> dict[str, Baseline | None]:
    """By name, the most informative first."""
    space = resources.space
    found: dict[str, Baseline | None] = {}
    lookup = lookup_table(context, budgets)
    if lookup is not None:
        measured = is_measuring(resources.clock)
        found[f"static plan at {STATIC_SHARE:.0%}" if measured else "lookup table"] = lookup
    found["random knobs"] = RandomKnobs(context.config.run.seed)
    found["full plan"] = FixedKnobs(space.encode(space.full))
    found["cheapest plan"] = FixedKnobs(space.encode(space.cheapest))
    return found


def lookup_table(context: RunContext, budgets: Sequence[float]) -> LookupKnobs | None:
    """The best single plan of each budget on training samples, within budget for at least 95 % of them by the profile.

    With the measured clock plans are chosen for 90 % of the budget. None if it is off, or nothing was profiled.
    """
    resources = context.build("train")
    samples = lookup_samples(context.config, resources.samples)
    measured = is_measuring(resources.clock)
    clock: Any = context.profiled() if measured else resources.clock
    if not samples or clock is None:
        return None
    accuracy_PS, latency_PS = all_plan_outcomes(resources, samples, clock)
    share = STATIC_SHARE if measured else 1.0
    choices = report.lookup_choices([share * ms for ms in budgets], accuracy_PS, latency_PS)
    reference = float(resources.clock.reference_ms)
    middles = [math.sqrt(a * b) for a, b in pairwise(budgets)]
    actions = tuple(resources.space.encode(resources.space.distinct[choice]) for choice in choices)
    return LookupKnobs(tuple(math.log(ms / reference) for ms in middles), actions)


def lookup_samples(config: Config, samples: Sequence[Any]) -> list[Any]:
    """The training samples of the lookup table: all, or as many as configured, drawn at random with the run's seed."""
    wanted = config.evaluation.lookup_samples
    if wanted is None or wanted >= len(samples):
        return list(samples)
    drawn = np.random.default_rng(config.run.seed).choice(len(samples), wanted, replace=False)
    return [samples[index] for index in sorted(drawn.tolist())]


def all_plan_outcomes(resources: EnvResources, samples: Sequence[Any], clock: Any) -> tuple[report.Array, report.Array]:
    """Accuracy and latency by `clock`, ms, of every distinct plan on every sample, both (plans, samples)."""
    plans = distinct_plans(resources)
    accuracy = np.zeros((len(plans), len(samples)))
    latency = np.zeros_like(accuracy)
    for s, outcomes in enumerate(run_all_plans(resources, samples, "training samples")):
        for p, outcome in enumerate(outcomes):
            shape = resources.engine.shape(samples[s], plans[p].tier)
            accuracy[p, s] = resources.engine.accuracy(samples[s], outcome)
            latency[p, s] = clock.latency(shape, plans[p], outcome.n_tokens).total
    return accuracy, latency


def precompute(context: RunContext) -> None:
    """Runs what the lookup table needs before the first iteration, if training can need nothing else.

    Large batches of it on all cores take far less time than the same requests met one by one in rollouts. Not with env
    runners, which share that work, nor with a measured clock, which reuses nothing.
    """
    config = context.config
    wanted = config.evaluation.lookup_samples
    covered = wanted is None or wanted >= config.task.train_samples
    if covered and not config.runners.count and config.latency.source != "measured":
        resources = fill_store(context.env_config("train"), "training samples")
        for _ in run_all_plans(resources, resources.samples, "training samples"):
            pass
