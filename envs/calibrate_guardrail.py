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
DRAWS: Final = 4
"""Plans drawn for each sample, each as likely as any other."""


def fit_guardrail(
    train: EnvResources, validation: EnvResources, confidence: float, profile: ProfiledClock | None, seed: int
) -> Guardrail:
    """The guardrail of a device and task.

    Args:
        train: answer lengths are learned from its samples.
        validation: the factor is calibrated on its samples, latency source and noise, with plans drawn at random: the
            guarantee is for a choice among plans that does not know how long each will take.
        confidence: above 0, below 1.
        profile: predicts latencies; None takes the latency source, which then must not be `measured`.
        seed: of the random plans.

    Raises:
        UserError: no samples, or source `measured` without a profile.
    """
    if not 0.0 < confidence < 1.0:
        raise UserError(f"guardrail confidence {confidence!r} is not allowed: give a number between 0 and 1, or null")
    for split, resources in (("training", train), ("validation", validation)):
        if not resources.samples:
            raise UserError(f"the guardrail cannot be calibrated with no {split} samples: give the task some")
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
    rows, plans = _drawn(samples, resources.space, DRAWS, seed)
    tokens = [outcome.n_tokens for outcome in resources.engine.outcomes(rows, plans)]
    features = resources.engine.language_features(samples).numpy()
    return AnswerLengths.fit(features, np.reshape(tokens, (len(samples), DRAWS)), confidence)


def _ratios(resources: EnvResources, raw: Guardrail, seed: int) -> npt.NDArray[np.float64]:
    """Actual over predicted latency of each validation sample under random plans, (S, R)."""
    clock = None if is_measuring(resources.clock) else resources.clock
    samples = list(resources.samples[: MEASURED_SAMPLES if clock is None else SAMPLES])
    predictor = LatencyPredictor(raw, resources.engine, resources.space, clock)
    # A measured request costs its time: another sample says more than a second plan.
    rows, plans = _drawn(samples, resources.space, 1 if clock is None else DRAWS, seed + 1)
    _, actual_ms = run_plans(resources, rows, plans)
    actions = {resources.space.plan(knobs): resources.space.encode(knobs) for knobs in resources.space.all}
    predicted = [predictor.predicted_ms(s)[actions[plan]] for s, plan in zip(rows, plans, strict=True)]
    return np.asarray((actual_ms / np.array(predicted)).reshape(len(samples), -1))


def _drawn(samples: Sequence[Any], space: KnobSpace, count: int, seed: int) -> tuple[list[Any], list[ExecutionPlan]]:
    """Each sample `count` times, each time with a plan drawn uniformly."""
    picks = np.random.default_rng(seed).integers(len(space.all), size=len(samples) * count)
    plans = [space.plan(space.all[pick]) for pick in picks.tolist()]
    return [sample for sample in samples for _ in range(count)], plans
