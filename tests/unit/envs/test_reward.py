"""The one objective: accuracy - multiplier x cost."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from envs.config import RewardSettings
from envs.reward import reward, violation_cost

times = st.floats(0.01, 1e4)
shares = st.floats(0, 1)
multipliers = st.floats(0, 10)
batches = st.lists(st.tuples(shares, times, times, multipliers), min_size=1, max_size=20)


def test_a_missed_budget_costs_more_the_more_it_is_missed() -> None:
    latencies = [50.0, 100.0, 101.0, 150.0, 200.0, 900.0]
    assert violation_cost(latencies, 100.0).tolist() == pytest.approx([0.0, 0.0, 1.01, 1.5, 2.0, 2.0])


def test_rewards_by_hand() -> None:
    assert reward([1.0, 1.0, 0.5], [80.0, 150.0, 300.0], 100.0, [2.0, 2.0, 0.5], 0.0).tolist() == [1.0, -2.0, -0.5]


def test_of_equal_answers_the_bonus_prefers_the_one_that_uses_the_budget() -> None:
    found = reward([1.0, 1.0, 1.0, 0.5], [50.0, 100.0, 110.0, 100.0], 100.0, 0.5, 0.1)
    np.testing.assert_allclose(found, [1.05, 1.1, 1.1 - 0.5 * 1.1, 0.6])


@given(batches)
def test_rows_do_not_influence_one_another(rows) -> None:
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    together = reward(*columns, 0.0)
    assert np.isfinite(together).all()
    for row, value in zip(rows, together, strict=True):
        assert float(reward(*row, 0.0)) == value


@given(shares, times, times, multipliers, st.floats(1.0, 10.0))
def test_slower_is_never_better(accuracy, latency, budget, multiplier, factor) -> None:
    slower, faster = (reward(accuracy, ms, budget, multiplier, 0.0) for ms in (latency * factor, latency))
    assert slower <= faster


@given(shares, times, st.floats(1.001, 1e3), multipliers, st.floats(0.01, 100))
def test_only_the_ratio_to_the_budget_counts(accuracy, budget, factor, multiplier, scale) -> None:
    one, scaled = (reward(accuracy, budget * factor * by, budget * by, multiplier, 0.0) for by in (1.0, scale))
    np.testing.assert_allclose(scaled, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "constrained"),
        ("penalty", -1.0),
        ("penalty_init", math.nan),
        ("penalty_max", math.inf),
        ("budget_use_bonus", -0.1),
        ("penalty_smoothing", 1.0),
        ("max_violation_rate", 1.1),
    ],
)
def test_bad_settings_are_named(field, value) -> None:
    with pytest.raises(ValidationError, match=field):
        RewardSettings(**{field: value})
