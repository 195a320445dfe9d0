"""The guardrail: conformal coverage, answer lengths, predicted latencies, and the fit on a resources."""

import json
from dataclasses import replace

import numpy as np
import pytest
from doubles import EngineDouble, make_resources
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.calibrate_guardrail import fit_guardrail
from envs.errors import UserError
from envs.knobs import HEAD_SIZES, TIERS
from envs.latency import MeasuredClock, ProfiledClock, profile
from envs.latency.guardrail import (
    AnswerLengths,
    Guardrail,
    LatencyPredictor,
    ProfileCosts,
    conformal_factor,
    plan_latencies,
)
from envs.latency.noise import LatencyNoise


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([20, 60, 200]), st.sampled_from([0.8, 0.9, 0.95]))
def test_conformal_coverage_holds_for_any_noise(seed, calibration, confidence):
    """Over many draws of calibration set and new request, at least `confidence` of the new ones are covered."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 1.0)
    trials = 2000
    old = rng.lognormal(0.0, scale, (trials, calibration))
    new = rng.lognormal(0.0, scale, trials)
    covered = np.mean([n <= conformal_factor(o, confidence) for o, n in zip(old, new, strict=True)])
    promised = min(confidence, calibration / (calibration + 1))
    assert covered >= promised - 4 * np.sqrt(promised * (1 - promised) / trials)
    assert covered <= promised + 1 / (calibration + 1) + 4 * np.sqrt(promised * (1 - promised) / trials)


def test_the_factor_is_the_rank_that_split_conformal_names():
    assert conformal_factor(np.arange(1, 20), 0.9) == 18.0  # ceil(20 x 0.9) of 19
    assert conformal_factor([1.0, 2.0], 0.99) == 2.0  # too few for the rank: the largest


@pytest.mark.parametrize(
    ("ratios", "confidence"), [([], 0.9), ([1.0, np.nan], 0.9), ([0.0, 1.0], 0.9), ([1.0], 1.0), ([1.0], 0.0)]
)
def test_what_cannot_be_calibrated_is_refused(ratios, confidence):
    with pytest.raises(UserError, match="cannot be calibrated"):
        conformal_factor(ratios, confidence)


def test_lengths_are_a_quantile_over_similar_questions():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(2, 64))
    kind = np.arange(200) % 2
    features = kinds[kind] + 0.05 * rng.normal(size=(200, 64))
    lengths = np.where(kind == 0, 1, np.where(rng.random(200) < 0.3, 9, 3))
    high, low = (AnswerLengths.fit(features, lengths, quantile) for quantile in (0.95, 0.3))
    assert high.predict(kinds).tolist() == [1, 9]
    assert low.predict(kinds).tolist() == [1, 3]


def test_the_longest_answer_of_a_question_counts_and_is_never_below_one():
    rows = np.eye(3)
    assert AnswerLengths.fit(rows[:1], [[2, 5, 3]], 0.5).predict(rows).tolist() == [5, 5, 5]
    assert AnswerLengths.fit(rows[:1], [0], 0.5).predict(rows).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="length model"):
        AnswerLengths.fit(np.zeros((0, 3)), [], 0.5)


def test_predicted_latencies_are_the_clocks_and_infinite_where_illegal():
    resources = make_resources()
    shapes = [resources.engine.shape(resources.samples[0], tier) for tier in TIERS]
    ms = plan_latencies(resources.clock, resources.space, shapes, 3)
    assert ms.shape == HEAD_SIZES
    assert np.isfinite(ms).sum() == len(resources.space.all)
    for knobs in resources.space.all[::17]:
        action = resources.space.encode(knobs)
        assert ms[action] == resources.clock.latency(shapes[action[0]], resources.space.plan(knobs), 3).total


def test_a_profiles_costs_predict_as_its_clock_does():
    resources = make_resources()
    clock = ProfiledClock(
        profile(EngineDouble(resources.engine.model.config), resources.samples, repeats=1, per_tiling=4)
    )
    costs = ProfileCosts(clock.costs)
    shape = resources.engine.shape(resources.samples[1], "medium")
    for knobs in resources.space.all[::31]:
        plan = resources.space.plan(knobs)
        assert costs.latency(shape, plan, 4) == clock.latency(shape, plan, 4)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_on_new_samples_plans_within_the_prediction_meet_the_budget_as_often_as_promised(confidence):
    """Any plan, picked after the fact: the plan of each sample that exceeds its prediction most."""
    resources = make_resources(600)
    train, validation = (
        replace(resources, samples=resources.samples[:100]),
        replace(resources, samples=resources.samples[100:300]),
    )
    fitted = fit_guardrail(train, validation, confidence, None, 0)
    predictor = LatencyPredictor(fitted, resources.engine, resources.space, resources.clock)
    rng = np.random.default_rng(0)
    inside = []
    for sample in resources.samples[300:]:
        predicted = predictor.predicted_ms(sample)
        ratios = []
        for place in rng.choice(len(resources.space.all), 4, replace=False):
            knobs = resources.space.all[place]
            plan = resources.space.plan(knobs)
            outcome = resources.engine.outcome(sample, plan)
            actual = resources.clock.latency(resources.engine.shape(sample, knobs.tier), plan, outcome.n_tokens).total
            ratios.append(actual / predicted[resources.space.encode(knobs)])
        inside.append(max(ratios) <= 1.0)
    assert np.mean(inside) >= confidence - 3 * np.sqrt(confidence * (1 - confidence) / 200)


def test_a_measuring_clock_is_calibrated_on_measured_requests():
    resources = make_resources(40)
    engine = EngineDouble(resources.engine.model.config)
    table = ProfiledClock(
        profile(EngineDouble(resources.engine.model.config), resources.samples, repeats=1, per_tiling=4)
    )
    engine.scale = 1.5  # slower than when it was profiled
    measured = replace(resources, engine=engine, clock=MeasuredClock(engine))
    fitted = fit_guardrail(resources, measured, 0.9, table, 0)
    assert fitted.factor > 1.2
    assert fitted.noise == fitted.factor
    with pytest.raises(UserError, match="no profile"):
        fit_guardrail(resources, measured, 0.9, None, 0)


def test_noise_of_the_profiled_source_is_calibrated_in():
    resources = make_resources(80)
    profiled = ProfiledClock(
        profile(EngineDouble(resources.engine.model.config), resources.samples, repeats=3, per_tiling=8)
    )
    quiet, noisy = (
        replace(resources, clock=profiled, noise=noise) for noise in (None, LatencyNoise((0.8, 1.0, 1.4), 0))
    )
    factors = [fit_guardrail(resources, w, 0.9, profiled, 0) for w in (quiet, noisy)]
    assert 1.15 < factors[1].factor / factors[0].factor <= 1.4
    assert all(found.noise >= found.factor for found in factors)


def test_a_guardrail_survives_json_and_pickling():
    resources = make_resources(30)
    table = ProfiledClock(
        profile(EngineDouble(resources.engine.model.config), resources.samples, repeats=1, per_tiling=4)
    )
    fitted = fit_guardrail(resources, resources, 0.9, table, 0)
    again = Guardrail.from_dict(json.loads(json.dumps(fitted.to_dict())))
    one, two = (LatencyPredictor(found, resources.engine, resources.space, None) for found in (fitted, again))
    for sample in resources.samples[:5]:
        np.testing.assert_array_equal(one.predicted_ms(sample), two.predicted_ms(sample))
    assert fitted.noise >= fitted.factor
    with pytest.raises(UserError, match="cannot be read"):
        Guardrail.from_dict({"confidence": 0.9})


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0])
def test_impossible_confidences_are_refused(confidence):
    resources = make_resources()
    with pytest.raises(UserError, match=r"guardrail confidence .* not allowed"):
        fit_guardrail(resources, resources, confidence, None, 0)
