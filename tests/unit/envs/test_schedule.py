"""Which (sample, budget) every group is about."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.budgets import BudgetDistribution
from envs.errors import UserError
from envs.schedule import PADDING, TrainingSchedule, listed

BUDGETS = BudgetDistribution.over(10.0, 100.0)


@given(st.integers(0, 2**31), st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 50))
def test_draws_do_not_depend_on_who_draws_them(seed, iteration, total, samples):
    together = TrainingSchedule(seed, samples, BUDGETS).draw(iteration, range(total), total)
    apart = [TrainingSchedule(seed, samples, BUDGETS).draw(iteration, [g], total)[0] for g in reversed(range(total))]
    assert together == apart[::-1]


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 7))
def test_every_epoch_visits_every_sample_once(seed, samples, total):
    schedule = TrainingSchedule(seed, samples, BUDGETS)
    iterations = range(2 * samples)  # total epochs are complete: 2 * samples * total visits
    visits = [c for r in iterations for c in schedule.draw(r, range(total), total)]
    assert [c.id for c in visits] == list(range(2 * samples * total))
    for epoch in range(2 * total):
        seen = [c.sample for c in visits[epoch * samples : (epoch + 1) * samples]]
        assert sorted(seen) == list(range(samples))


def test_orders_and_budgets_change_with_epoch_and_seed():
    schedule = TrainingSchedule(0, 50, BUDGETS)
    first, second = (schedule.draw(r, range(50), 50) for r in (0, 1))
    other = TrainingSchedule(1, 50, BUDGETS).draw(0, range(50), 50)
    for one, two in ((first, second), (first, other)):
        assert [c.sample for c in one] != [c.sample for c in two]
        assert {c.budget_ms for c in one}.isdisjoint(c.budget_ms for c in two)


def test_budgets_follow_the_distribution():
    drawn = [c.budget_ms for r in range(40) for c in TrainingSchedule(3, 9, BUDGETS).draw(r, range(50), 50)]
    counts, _ = np.histogram(np.log(drawn), bins=8, range=np.log([BUDGETS.low_ms, BUDGETS.high_ms]))
    assert counts.min() > 100
    assert not any(low < budget < high for budget in drawn for low, high in BUDGETS.bands)


def test_draws_are_pinned():
    drawn = TrainingSchedule(7, 100, BUDGETS).draw(5, [0, 3], 4)
    assert [(c.id, c.sample) for c in drawn] == PINNED
    assert [c.budget_ms for c in drawn] == pytest.approx(PINNED_MS)


@pytest.mark.parametrize(("count", "workers", "places"), [(10, 1, 4), (10, 3, 2), (7, 2, 8), (12, 3, 4)])
def test_listed_contexts_run_exactly_once_at_any_number_of_workers(count, workers, places):
    wanted = [(i % 5, 10.0 + i) for i in range(count)]
    schedule = listed(wanted, 5)
    total = workers * places
    seen = [
        context
        for iteration in range(schedule.iterations(total))
        for worker in range(workers)
        for context in schedule.draw(iteration, range(worker * places, (worker + 1) * places), total)
    ]
    real = [context for context in seen if context.id != PADDING]
    assert sorted(context.id for context in real) == list(range(count))
    assert [(c.sample, c.budget_ms) for c in sorted(real, key=lambda c: c.id)] == wanted
    assert len(seen) - len(real) < total


@pytest.mark.parametrize(
    ("contexts", "named"),
    [
        ([], "empty"),
        ([(5, 10.0)], "sample 5"),
        ([(-1, 10.0)], "sample -1"),
        ([(0, 0.0)], "0.0 ms"),
        ([(0, "x")], "'x'"),
        ([(0, 10.0, 0.0)], "0.0 ms"),
        ([(0,)], "context 0 is"),
        ([(0, 10.0, 10.0, 10.0)], "context 0 is"),
    ],
)
def test_bad_lists_are_refused(contexts, named):
    with pytest.raises(UserError, match=named):
        listed(contexts, 5)


def test_no_samples_and_bad_seeds_are_refused():
    with pytest.raises(UserError, match="no samples"):
        TrainingSchedule(0, 0, BUDGETS)
    with pytest.raises(UserError, match="seed -1"):
        TrainingSchedule(-1, 5, BUDGETS)


PINNED = [(20, 38), (23, 61)]
PINNED_MS = [99.27013276866805, 75.63840679302474]
