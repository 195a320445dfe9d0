"""Fits the guardrail: answer lengths on training samples, the conformal factor on validation samples.

With latency source `measured`, costs come from a profile of the same device and the factor from real timed requests, so
it covers misfit and noise of the device. With `profiled` and noise, the factor covers the profile's noise, and serving
adds the profile's misfit; without noise, serving adds both.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from envs.env_resources import EnvResources
from envs.errors import UserError
from envs.knobs import ExecutionPlan, KnobSpace
from envs.latency import ProfiledClock, is_measuring
from envs.latency.guardrail import AnswerLengths, Guardrail, LatencyPredictor, ProfileCosts, conformal_factor
from envs.scoring_step import run_plans

SAMPLES: Final = 256
"""Largest number of samples run per split."""
MEASURED_SAMPLES: Final = 64
"""Largest number of samples measured one after another."""
DRAWN_PLANS: Final = 2
"""Random plans per sample, in addition to the full and the cheapest plan."""


def fit_guardrail(
    train: EnvResources, validation: EnvResources, confidence: float, profile: ProfiledClock | None, seed: int
) -> Guardrail:
    """The guardrail of a device and task.

    Args:
        train: answer lengths are learned from its samples.
        validation: the factor is calibrated on its samples, latency source and noise. The largest ratio over a sample's
            plans counts, so that the guarantee is valid for any choice among plans.
        confidence: above 0, below 1.
        profile: predicts latencies; None takes the latency source, which then must not be `measured`.
        seed: of the random plans.

    Raises:
        UserError: no samples, or source `measured` without a profile.
    """
    if not 0.0 < confidence < 1.0:
        raise UserError(f"guardrail confidence {confidence!r} is not allowed: give a number between 0 and 1, or null")
    lengths = _lengths(train, confidence, seed)
    costs = None if profile is None else ProfileCosts(profile.costs)
    raw = Guardrail(confidence, lengths, 1.0, 1.0, costs)
    factor = conformal_factor(_ratios(validation, raw, seed), confidence)
    wall = factor
    if profile is not None and not is_measuring(validation.clock):
        covered = 1.0 if validation.noise is None else float(np.quantile(profile.repeat_ratios, confidence))
        wall = factor * max(profile.quantile(confidence) / covered, 1.0)
    return Guardrail(confidence, lengths, factor, wall, costs)


def _lengths(resources: EnvResources, confidence: float, seed: int) -> AnswerLengths:
    samples = list(resources.samples[:SAMPLES])
    plans = [plan for index in range(len(samples)) for plan in _plans(resources.space, seed, index)]
    each = len(plans) // max(len(samples), 1)
    outcomes = resources.engine.outcomes([sample for sample in samples for _ in range(each)], plans)
    tokens = np.array([outcome.n_tokens for outcome in outcomes]).reshape(len(samples), -1)
    return AnswerLengths.fit(resources.engine.language_features(samples).numpy(), tokens, confidence)


def _ratios(resources: EnvResources, raw: Guardrail, seed: int) -> npt.NDArray[np.float64]:
    """Largest ratio of actual to predicted latency over the plans of each validation sample."""
    measuring = is_measuring(resources.clock)
    samples = list(resources.samples[: MEASURED_SAMPLES if measuring else SAMPLES])
    predictor = LatencyPredictor(
        raw, resources.engine, resources.space, None if is_measuring(resources.clock) else resources.clock
    )
    chosen = [_plans(resources.space, seed + 1, index) for index in range(len(samples))]
    if measuring:  # one plan each, as another sample says more than a second plan
        chosen = [plans[-1:] for plans in chosen]
    rows = [sample for sample, plans in zip(samples, chosen, strict=True) for _ in plans]
    flat = [plan for plans in chosen for plan in plans]
    _, actual_ms = run_plans(resources, rows, flat)
    actions = {resources.space.plan(knobs): resources.space.encode(knobs) for knobs in resources.space.all}
    predicted = [predictor.predicted_ms(s)[actions[plan]] for s, plan in zip(rows, flat, strict=True)]
    return np.asarray((actual_ms / np.array(predicted)).reshape(len(samples), -1).max(axis=1))


def _plans(space: KnobSpace, seed: int, index: int) -> Sequence[ExecutionPlan]:
    """The full plan, the cheapest plan, then random plans."""
    generator = np.random.default_rng([seed, index])
    drawn: list[Any] = [space.all[int(i)] for i in generator.choice(len(space.all), DRAWN_PLANS, replace=False)]
    return [space.plan(knobs) for knobs in (space.full, space.cheapest, *drawn)]
