"""Fits the guardrail: answer lengths on training samples, the conformal factor on validation samples."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from envs.env_resources import World
from envs.errors import UserError
from envs.knobs import ExecutionPlan, KnobSpace
from envs.latency import ProfiledClock, is_measuring
from envs.latency.guardrail import AnswerLengths, Guardrail, LatencyPredictor, ProfileCosts, conformal_factor
from envs.scoring_step import run_plans

SAMPLES: Final = 256
"""Samples of a split that are run, at most."""
MEASURED_SAMPLES: Final = 64
"""The same of requests that have to be measured one after another."""
DRAWN_PLANS: Final = 2
"""Plans run for each sample besides the full and the cheapest one."""


def fit_guardrail(
    train: World, validation: World, confidence: float, profile: ProfiledClock | None = None, seed: int = 0
) -> Guardrail:
    """The guardrail of a device and task.

    Args:
        train: answer lengths are learned from its samples.
        validation: the conformal factor is calibrated on its samples, under its clock. Of the plans run for a sample
            the one that exceeds its prediction most counts, so that the guarantee survives a choice among plans.
        confidence: above 0, below 1.
        profile: predicts latencies; None takes the clock, which must not be a measuring one then.
        seed: of the plans drawn.

    Raises:
        UserError: no samples, or a measuring clock without a profile.
    """
    if not 0.0 < confidence < 1.0:
        raise UserError(f"guardrail confidence {confidence!r} is not allowed: give a number between 0 and 1, or null")
    lengths = _lengths(train, confidence, seed)
    costs = None if profile is None else ProfileCosts(profile.costs)
    noise = 1.0 if profile is None else profile.quantile(confidence)
    raw = Guardrail(confidence, lengths, 1.0, noise, costs)
    factor = conformal_factor(_ratios(validation, raw, seed), confidence)
    # What the judging clock has of a wall clock's noise is in the factor already if it measures.
    wall = factor if is_measuring(validation.clock) else factor * max(noise, 1.0)
    return Guardrail(confidence, lengths, factor, wall, costs)


def _lengths(world: World, confidence: float, seed: int) -> AnswerLengths:
    samples = list(world.samples[:SAMPLES])
    plans = [plan for index in range(len(samples)) for plan in _plans(world.space, seed, index)]
    each = len(plans) // max(len(samples), 1)
    outcomes = world.engine.outcomes([sample for sample in samples for _ in range(each)], plans)
    tokens = np.array([outcome.n_tokens for outcome in outcomes]).reshape(len(samples), -1)
    return AnswerLengths.fit(world.engine.language_features(samples).numpy(), tokens, confidence)


def _ratios(world: World, raw: Guardrail, seed: int) -> npt.NDArray[np.float64]:
    """Largest ratio of judged to predicted latency over the plans run for each validation sample."""
    measuring = is_measuring(world.clock)
    samples = list(world.samples[: MEASURED_SAMPLES if measuring else SAMPLES])
    predictor = LatencyPredictor(raw, world.engine, world.space, None if is_measuring(world.clock) else world.clock)
    chosen = [_plans(world.space, seed + 1, index) for index in range(len(samples))]
    if measuring:  # one plan each: a second one would cost as much as another sample, which says more
        chosen = [plans[-1:] for plans in chosen]
    rows = [sample for sample, plans in zip(samples, chosen, strict=True) for _ in plans]
    flat = [plan for plans in chosen for plan in plans]
    _, judged = run_plans(world, rows, flat)
    actions = {world.space.plan(knobs): world.space.encode(knobs) for knobs in world.space.all}
    predicted = [predictor.predicted_ms(s)[actions[plan]] for s, plan in zip(rows, flat, strict=True)]
    return np.asarray((judged / np.array(predicted)).reshape(len(samples), -1).max(axis=1))


def _plans(space: KnobSpace, seed: int, index: int) -> Sequence[ExecutionPlan]:
    """The full and the cheapest plan, then drawn ones."""
    generator = np.random.default_rng([seed, index])
    drawn: list[Any] = [space.all[int(i)] for i in generator.choice(len(space.all), DRAWN_PLANS, replace=False)]
    return [space.plan(knobs) for knobs in (space.full, space.cheapest, *drawn)]
