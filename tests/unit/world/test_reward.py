"""The reward's terms and the priced return."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.reward import TERMS, RewardConfig, plan_share, reward

ALL = RewardConfig(accuracy=1.0, latency=0.5, temperature=0.1, overrun=2.0, efficiency=0.3, complexity=0.2)
times = st.floats(0.01, 1e4)
shares = st.floats(0, 1)
batches = st.lists(st.tuples(shares, times, times, shares), min_size=1, max_size=20)


def one(config, accuracy, latency, budget, share=0.0):
    judged = reward(config, [accuracy], [latency], [budget], [share])
    return float(judged.total[0]), {name: float(values[0]) for name, values in judged.terms.items()}


def test_terms_within_the_budget():
    total, terms = one(ALL, 1.0, 80.0, 100.0, 0.5)
    assert terms["accuracy"] == 1.0
    assert terms["latency"] == pytest.approx(-0.5 / (1 + math.exp(2.0)))
    assert terms["overrun"] == 0.0
    assert terms["efficiency"] == pytest.approx(0.3 * 0.2)
    assert terms["complexity"] == pytest.approx(-0.1)
    assert total == pytest.approx(sum(terms.values()))


def test_terms_beyond_the_budget():
    _, terms = one(ALL, 1.0, 150.0, 100.0)
    assert terms["latency"] == pytest.approx(-0.5 / (1 + math.exp(-5.0)))
    assert terms["overrun"] == pytest.approx(-2.0 * 0.25)
    assert terms["efficiency"] == 0.0


def test_at_the_budget_the_smooth_penalty_is_half_its_weight():
    _, terms = one(ALL, 0.0, 100.0, 100.0)
    assert terms["latency"] == pytest.approx(-0.25)
    assert terms["overrun"] == terms["efficiency"] == 0.0


def test_wrong_answers_earn_no_bonus():
    assert one(ALL, 0.0, 10.0, 100.0)[1]["efficiency"] == 0.0


@given(batches)
def test_total_is_the_sum_of_terms_row_by_row(rows):
    accuracy, latency, budget, share = map(np.array, zip(*rows, strict=True))
    judged = reward(ALL, accuracy, latency, budget, share)
    assert set(judged.terms) == set(TERMS)
    assert np.allclose(sum(judged.terms.values()), judged.total)
    for i, row in enumerate(rows):
        assert one(ALL, *row)[0] == pytest.approx(float(judged.total[i]))
    assert np.isfinite(judged.total).all()


@given(shares, times, times, st.floats(1.0, 10.0))
def test_slower_is_never_better(accuracy, latency, budget, factor):
    assert one(ALL, accuracy, latency * factor, budget)[0] <= one(ALL, accuracy, latency, budget)[0] + 1e-9


@given(shares, times, times, st.floats(0.01, 100))
def test_only_the_ratio_to_the_budget_counts(accuracy, latency, budget, scale):
    scaled = one(ALL, accuracy, latency * scale, budget * scale)[0]
    assert scaled == pytest.approx(one(ALL, accuracy, latency, budget)[0], rel=1e-6, abs=1e-6)


def test_extreme_overruns_do_not_overflow():
    with np.errstate(all="raise"):
        assert np.isfinite(one(ALL, 0.0, 1e6, 0.1)[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("accuracy", -1.0), ("overrun", math.nan), ("latency", math.inf), ("temperature", 0.0), ("temperature", -0.1)],
)
def test_bad_weights_are_named(field, value):
    with pytest.raises(UserError, match=field):
        RewardConfig(**{field: value})


def test_shares_of_the_full_plan():
    assert plan_share(ExecutionPlan()) == 1.0
    assert plan_share(ExecutionPlan("low")) == pytest.approx(4 / 13)
    cheapest = ExecutionPlan("low", 1, 4, tuple(range(12)))
    assert plan_share(cheapest) == pytest.approx(4 / 13 * (8 + 11 * 4) / 128)
