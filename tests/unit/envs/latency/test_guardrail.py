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
from envs.scoring_step import run_plans


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([20, 60, 200]),
    st.sampled_from([1, 4]),
    st.floats(0.0, 1.0),
    st.sampled_from([0.8, 0.9, 0.95]),
)
def test_conformal_coverage_is_met_for_any_noise(seed, samples, repeats, alike, confidence):
    """At least `confidence` of new requests are covered, however alike the ratios of one sample are."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 1.0)
    trials = 2000
    log_SR = np.sqrt(alike) * rng.normal(size=(trials, samples + 1, 1))
    log_SR = log_SR + np.sqrt(1 - alike) * rng.normal(size=(trials, samples + 1, repeats))
    ratios = np.exp(scale * log_SR)
    covered = np.mean(
        [new <= conformal_factor(old, confidence) for old, new in zip(ratios[:, 1:], ratios[:, 0, 0], strict=True)]
    )
    promised = min(confidence, samples / (samples + 1))
    error = 4 * np.sqrt(promised * (1 - promised) / trials)
    assert promised - error <= covered <= promised + 1 / (samples + 1) + error


def test_the_factor_is_the_rank_that_split_conformal_names():
    assert conformal_factor(np.arange(1, 20), 0.9) == 18.0  # ceil(20 x 0.9) of 19
    assert conformal_factor(np.arange(1, 39).reshape(19, 2), 0.9) == 36.0  # ceil(20 x 2 x 0.9) of 38
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


def test_every_answer_to_a_question_counts_and_none_is_below_one():
    rows = np.eye(3)
    assert AnswerLengths.fit(rows[:1], [[2, 5, 3]], 0.5).predict(rows).tolist() == [3, 3, 3]
    assert AnswerLengths.fit(rows[:1], [[2, 5, 3]], 0.9).predict(rows).tolist() == [5, 5, 5]
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
    shapes = [resources.engine.shape(resources.samples[1], tier) for tier in TIERS]
    assert (
        plan_latencies(costs, resources.space, shapes, 4) == plan_latencies(clock, resources.space, shapes, 4)
    ).all()


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("noise", [None, LatencyNoise((0.9, 1.0, 1.0, 1.1, 1.5), 0)])
def test_on_new_samples_the_prediction_covers_a_plan_as_often_as_promised(confidence, noise):
    """Not more than needed either: a guardrail that allows too little costs accuracy."""
    resources = replace(make_resources(900), noise=noise)
    train, validation, new = (
        replace(resources, samples=resources.samples[a:b]) for a, b in ((0, 100), (100, 300), (300, 900))
    )
    fitted = fit_guardrail(train, validation, confidence, None, 0)
    predictor = LatencyPredictor(fitted, resources.engine, resources.space, resources.clock)
    rng = np.random.default_rng(0)
    chosen = [resources.space.all[place] for place in rng.integers(len(resources.space.all), size=len(new.samples))]
    _, actual_ms = run_plans(new, new.samples, [resources.space.plan(knobs) for knobs in chosen])
    predicted = [predictor.predicted_ms(s)[resources.space.encode(k)] for s, k in zip(new.samples, chosen, strict=True)]
    covered = np.mean(actual_ms <= predicted)
    error = 3 * np.sqrt(confidence * (1 - confidence) * (1 / 600 + 1 / 200))
    assert covered >= confidence - error
    if noise is not None:
        assert fitted.factor <= 1.5


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


@pytest.mark.parametrize("empty", ["training", "validation"])
def test_a_split_without_samples_is_refused(empty):
    resources = make_resources(10)
    none = replace(resources, samples=resources.samples[:0])
    with pytest.raises(UserError, match=f"no {empty} samples"):
        fit_guardrail(*((none, resources) if empty == "training" else (resources, none)), 0.9, None, 0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0])
def test_impossible_confidences_are_refused(confidence):
    resources = make_resources()
    with pytest.raises(UserError, match=r"guardrail confidence .* not allowed"):
        fit_guardrail(resources, resources, confidence, None, 0)
