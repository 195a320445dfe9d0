"""Rules fitted on known outcomes choose as they say, with and without the guardrail."""

import numpy as np
import pytest

from envs.errors import UserError
from envs.knobs import KnobSpace
from policies.baselines.rules import (
    BestMean,
    Boosted,
    Cheapest,
    Full,
    KnownOutcomes,
    MeanByFamily,
    Nearest,
    Neural,
    Oracle,
    RandomFeasible,
    Requests,
    Ridge,
    SingleKnob,
    choose,
)

SPACE = KnobSpace([1.0 - 0.05 * block for block in range(16)])
ACTIONS = np.array([SPACE.encode(knobs) for knobs in SPACE.distinct])


def resources(samples: int, seed: int = 0) -> tuple[KnownOutcomes, np.ndarray]:
    """Two kinds of questions: one is right with a high tier, the other with many blocks; full plans take longest."""
    rng = np.random.default_rng(seed)
    family = rng.integers(0, 2, samples)
    features = np.eye(8)[family] + 0.05 * rng.normal(size=(samples, 8))
    right = np.where(family[:, None] == 0, ACTIONS[:, 0] == 2, ACTIONS[:, 3] == 4)
    accuracy = np.where(rng.random(right.shape) < 0.05, ~right, right).astype(float)
    size = rng.uniform(0.8, 1.2, samples)
    latency = size[:, None] * (10.0 + ACTIONS @ np.array([8.0, 0.5, 1.0, 4.0]))
    return KnownOutcomes(features, ACTIONS, accuracy, latency, family), right.astype(float)


TRAIN, _ = resources(200)
TEST, RIGHT = resources(100, 1)


def requests(budget: float, *, masked: bool = True) -> Requests:
    budgets = np.full(100, budget)
    return Requests(TEST.features, budgets, TEST.latency_ms if masked else None, TEST.families, TEST.accuracy)


def run(rule, budget: float, *, masked: bool = True):
    rule.fit(TRAIN)
    chosen = choose(rule, TRAIN, requests(budget, masked=masked))
    return chosen, RIGHT[np.arange(100), chosen], TEST.latency_ms[np.arange(100), chosen]


ALL = (Full, Cheapest, BestMean, MeanByFamily, RandomFeasible, Ridge, Nearest, Neural, Oracle, Boosted, SingleKnob)


@pytest.mark.parametrize("kind", ALL)
def test_under_the_guardrail_every_rule_stays_within_the_budget(kind) -> None:
    _, _, latency = run(kind(), 36.0)
    assert (latency <= 36.0).all()


@pytest.mark.parametrize("kind", ALL)
def test_if_nothing_fits_the_cheapest_plan_runs(kind) -> None:
    chosen, *_ = run(kind(), 1.0)
    assert (chosen == TRAIN.latency_ms.mean(0).argmin()).all()


@pytest.mark.parametrize("kind", [MeanByFamily, Ridge, Nearest, Neural, Boosted])
def test_rules_that_see_the_question_beat_one_plan_per_budget(kind) -> None:
    """At 34 ms one of the two needs fits in each request, hardly both."""
    _, right, _ = run(kind(), 34.0)
    _, one_plan, _ = run(BestMean(), 34.0, masked=False)
    assert right.mean() > one_plan.mean() + 0.2


def test_without_the_guardrail_plans_are_safe_on_training_samples() -> None:
    chosen, *_ = run(BestMean(), 36.0, masked=False)
    assert len(set(chosen.tolist())) == 1
    assert (TRAIN.latency_ms[:, chosen[0]] > 36.0).mean() <= 0.05
    allowed = (TRAIN.latency_ms > 36.0).mean(0) <= 0.05
    assert TRAIN.accuracy.mean(0)[chosen[0]] == TRAIN.accuracy.mean(0)[allowed].max()


def test_full_and_cheapest_ignore_the_budget_without_the_guardrail() -> None:
    full, *_ = run(Full(), 1.0, masked=False)
    cheapest, *_ = run(Cheapest(), 1.0, masked=False)
    assert (full == TRAIN.latency_ms.mean(0).argmax()).all()
    assert (cheapest == TRAIN.latency_ms.mean(0).argmin()).all()


@pytest.mark.parametrize("knob", ["tier", "top_k", "blocks"])
def test_a_single_knob_leaves_the_others_at_full(knob: str) -> None:
    chosen, *_ = run(SingleKnob(knob=knob), 1000.0)
    place = ("tier", "insertion", "top_k", "blocks").index(knob)
    others = [index for index in range(4) if index != place]
    assert (ACTIONS[chosen][:, others] == np.array((2, 0, 4, 4))[others]).all()


def test_the_oracle_is_right_wherever_some_plan_that_fits_is() -> None:
    chosen, *_ = run(Oracle(), 36.0)
    best = np.where(TEST.latency_ms <= 36.0, TEST.accuracy, -1).max(1)
    assert (TEST.accuracy[np.arange(100), chosen] == best).all()


def test_what_a_rule_lacks_is_named() -> None:
    bare = KnownOutcomes(TRAIN.features, ACTIONS, TRAIN.accuracy, TRAIN.latency_ms)
    with pytest.raises(UserError, match="families"):
        MeanByFamily().fit(bare)
    with pytest.raises(UserError, match="knob 'speed'"):
        SingleKnob(knob="speed").fit(TRAIN)
    with pytest.raises(UserError, match="one row per sample"):
        KnownOutcomes(TRAIN.features[:3], ACTIONS, TRAIN.accuracy, TRAIN.latency_ms)
