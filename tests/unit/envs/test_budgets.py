"""Training and held-out budgets."""

import math

import numpy as np
import pytest
from doubles import EngineDouble, make_resources
from hypothesis import given
from hypothesis import strategies as st

from envs.budgets import BudgetDistribution, budget_range, check_budget
from envs.errors import UserError
from envs.latency import MeasuredClock

ranges = st.tuples(st.floats(0.1, 1e4), st.floats(1.05, 50)).map(lambda r: (r[0], r[0] * r[1]))


@given(ranges, st.integers(0, 5), st.integers(0, 2**32))
def test_training_budgets_stay_in_range_and_out_of_the_bands(ends, bands, seed):
    budgets = BudgetDistribution.over(*ends, bands=bands)
    drawn = budgets.at(np.random.default_rng(seed).random(200))
    assert drawn.min() >= ends[0] * (1 - 1e-12)
    assert drawn.max() <= ends[1] * (1 + 1e-12)
    for low, high in budgets.bands:
        inside = (drawn > low * (1 + 1e-9)) & (drawn < high * (1 - 1e-9))
        assert not inside.any()


@given(ranges, st.integers(0, 5))
def test_held_out_budgets_are_never_trained_on(ends, bands):
    budgets = BudgetDistribution.over(*ends, bands=bands)
    held_out = budgets.held_out()
    assert len(held_out) == bands + 2
    assert list(held_out) == sorted(held_out)
    assert held_out[0] < ends[0]
    assert held_out[-1] > ends[1]
    for budget, (low, high) in zip(held_out[1:-1], budgets.bands, strict=True):
        assert low < budget < high
        assert math.log(high / low) == pytest.approx(0.15 * math.log(ends[1] / ends[0]))


@given(ranges, st.integers(0, 5))
def test_quantiles_rise_from_end_to_end(ends, bands):
    budgets = BudgetDistribution.over(*ends, bands=bands)
    values = budgets.at(np.linspace(0, 1, 101))
    assert (np.diff(values) > 0).all()
    assert values[0] == pytest.approx(ends[0])
    assert values[-1] == pytest.approx(ends[1])


def test_budgets_are_uniform_in_the_logarithm():
    drawn = BudgetDistribution(10.0, 1000.0).at(np.random.default_rng(0).random(20_000))
    counts, _ = np.histogram(np.log(drawn), bins=10, range=(math.log(10), math.log(1000)))
    assert counts.min() > 1800
    assert counts.max() < 2200


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, "soon", None])
def test_impossible_budgets_are_refused(budget):
    with pytest.raises(UserError):
        check_budget(budget)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0.0, 10.0), "0.0 ms"),
        ((-5.0, 10.0), "-5.0 ms"),
        ((math.nan, 10.0), "nan ms"),
        ((10.0, math.inf), "inf ms"),
        ((10.0, 10.0), "empty or inverted"),
        ((20.0, 10.0), "empty or inverted"),
        ((10.0, 20.0, ((9.0, 12.0),)), "held-out bands"),
        ((10.0, 20.0, ((12.0, 21.0),)), "held-out bands"),
        ((10.0, 20.0, ((14.0, 12.0),)), "held-out bands"),
        ((10.0, 20.0, ((12.0, 14.0), (13.0, 15.0))), "held-out bands"),
        ((10.0, 20.0, ((10.0, 20.0),)), "entire range"),
    ],
)
def test_impossible_distributions_are_refused(arguments, named):
    with pytest.raises(UserError, match=named):
        BudgetDistribution(*arguments)


@pytest.mark.parametrize("bands", [-1, 6])
def test_a_number_of_bands_that_does_not_fit_is_refused(bands):
    with pytest.raises(UserError, match=f"{bands} held-out bands"):
        BudgetDistribution.over(1.0, 2.0, bands=bands)


def test_the_device_range_serves_most_requests_at_either_end():
    resources = make_resources(40)
    low, high = budget_range(resources.engine, resources.clock, resources.space, resources.samples, new_tokens=4)
    cheapest, full = resources.space.plan(resources.space.cheapest), resources.space.plan(resources.space.full)

    def served(plan, budget):
        times = [
            resources.clock.latency(resources.engine.shape(s, plan.tier), plan, 4).total for s in resources.samples
        ]
        return np.mean(np.array(times) <= budget * (1 + 1e-9))

    assert low < high
    assert served(cheapest, low) >= 0.9
    assert served(full, high) >= 0.9
    assert served(full, low) < 0.9


def test_the_device_range_of_a_measured_clock_runs_few_requests():
    resources = make_resources(40)
    engine = EngineDouble(resources.engine.model.config)
    low, high = budget_range(engine, MeasuredClock(engine), resources.space, resources.samples)
    assert 0 < low < high
    assert engine.calls["measured"] == 34  # 16 samples under two plans, one before to warm up


def test_the_device_range_counts_on_the_usual_answer_length():
    resources = make_resources(40)
    lengths = [
        resources.engine.outcome(s, resources.space.plan(resources.space.full)).n_tokens
        for s in resources.samples[::2][:16]
    ]
    usual = round(float(np.median(lengths)))
    found = budget_range(resources.engine, resources.clock, resources.space, resources.samples)
    assert found == budget_range(
        resources.engine, resources.clock, resources.space, resources.samples, new_tokens=usual
    )
    assert (
        found[1]
        < budget_range(resources.engine, resources.clock, resources.space, resources.samples, new_tokens=usual + 1)[1]
    )


def test_a_range_needs_samples():
    resources = make_resources(3)
    with pytest.raises(UserError, match="training samples"):
        budget_range(resources.engine, resources.clock, resources.space, [])
