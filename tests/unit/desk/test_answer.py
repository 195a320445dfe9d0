"""What budget a controller is shown: never one far from those it was trained for."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.budgets import BudgetDistribution
from ray_ctrl.steering import shown_budget

TRAINED = BudgetDistribution.over(20.0, 60.0)
METADATA = {"budgets": asdict(TRAINED), "reference_ms": 80.0}


@given(st.floats(1e-3, 1e7), st.sampled_from([0.5, 1.0, 3.0]))
def test_a_budget_is_shown_as_it_is_or_as_the_nearest_trained_for(budget_ms: float, slower: float) -> None:
    """On a device so many times as slow, budgets are so many times as large."""
    shown = shown_budget(budget_ms, METADATA, 80.0 * slower)
    assert shown == pytest.approx(np.clip(budget_ms, 20.0 * slower, 60.0 * slower))


def test_of_the_held_out_budgets_only_those_beyond_the_range_are_shown_as_others() -> None:
    low, *middles, high = TRAINED.held_out()
    assert [shown_budget(ms, METADATA, 80.0) for ms in middles] == middles
    assert (shown_budget(low, METADATA, 80.0), shown_budget(high, METADATA, 80.0)) == (20.0, 60.0)


def test_an_export_without_budgets_is_shown_any() -> None:
    assert shown_budget(3.0, {}, 80.0) == 3.0
