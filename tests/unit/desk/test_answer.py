"""Budgets far from those that a controller was trained for are not shown to it."""

import warnings
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.budgets import BudgetDistribution
from ray_ctrl.answer import within_reach

METADATA = {"budgets": asdict(BudgetDistribution.over(20.0, 60.0)), "reference_ms": 80.0}
LOW, HIGH = BudgetDistribution.over(20.0, 60.0).reach


@given(st.floats(1e-3, 1e7), st.sampled_from([0.5, 1.0, 3.0]))
def test_a_budget_is_shown_as_it_is_or_as_the_nearest_within_reach(budget_ms: float, slower: float) -> None:
    """On a device so many times as slow, budgets are so many times as large."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        shown = within_reach(budget_ms, METADATA, 80.0 * slower)
    assert shown == pytest.approx(np.clip(budget_ms, LOW * slower, HIGH * slower))
    assert bool(told) == (budget_ms < LOW * slower)


def test_every_held_out_budget_is_within_reach() -> None:
    for ms in BudgetDistribution.over(20.0, 60.0).held_out():
        assert within_reach(ms, METADATA, 80.0) == ms


def test_a_warning_names_the_budget_and_what_is_allowed() -> None:
    with pytest.warns(UserWarning, match=r"budget of 3 ms is smaller than any .* \(17\.4 ms on this device\)"):
        within_reach(3.0, METADATA, 80.0)


def test_an_export_without_budgets_is_shown_any() -> None:
    assert within_reach(3.0, {}, 80.0) == 3.0
