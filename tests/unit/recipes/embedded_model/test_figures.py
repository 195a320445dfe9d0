"""The arithmetic behind the model card, on tables small enough to check by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.knobs import Knobs
from recipes.embedded_model.figures import (
    OutcomeTable,
    by_family,
    chance,
    headroom,
    knob_figures,
    markdown_table,
)

KNOBS = tuple(
    Knobs(tier, 1, k, n)
    for tier, k, n in (
        ("low", 4, 12),
        ("low", 8, 16),
        ("medium", 8, 16),
        ("high", 4, 16),
        ("high", 8, 12),
        ("high", 8, 16),
    )
)


def table() -> OutcomeTable:
    accuracy = np.array([[0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0]], dtype=float)
    latency = np.tile(np.array([10.0, 20, 30, 40, 45, 50]), (4, 1))
    return OutcomeTable(KNOBS, ("digit", "color", "color", "digit"), accuracy, latency)


def test_figures_pick_the_right_plans() -> None:
    found = knob_figures(table())
    assert found["full"] == {"overall": 75.0, "color": 100.0, "digit": 50.0}
    assert found["cheapest"] == {"overall": 25.0, "color": 50.0, "digit": 0.0}
    assert found["low_tier"]["overall"] == 50.0
    assert found["top_k_4"]["color"] == 50.0
    assert found["blocks_12"]["digit"] == 0.0


def test_headroom_orders_one_plan_family_and_sample() -> None:
    row = headroom(table(), [40.0])[0]
    # Within 40 ms: medium is best for all (3 of 4); color wants low or medium, digit high with top-k 4 or medium.
    assert row["one_plan"] == 75.0
    assert row["per_family"] == 75.0
    assert row["per_sample"] == 100.0
    assert headroom(table(), [15.0])[0]["one_plan"] == 25.0
    assert headroom(table(), [5.0])[0] == {"budget_ms": 5.0, "one_plan": 0.0, "per_family": 0.0, "per_sample": 0.0}


@given(seed=st.integers(0, 1000), budget=st.floats(5.0, 60.0))
def test_more_freedom_to_choose_never_costs_accuracy(seed: int, budget: float) -> None:
    rng = np.random.default_rng(seed)
    accuracy, latency = (rng.random((12, 6)) > 0.5).astype(float), rng.uniform(10.0, 50.0, (12, 6))
    families = tuple(rng.choice(["a", "b", "c"], 12).tolist())
    row = headroom(OutcomeTable(KNOBS, families, accuracy, latency), [budget])[0]
    assert row["one_plan"] <= row["per_family"] + 1e-9 <= row["per_sample"] + 2e-9


def test_chance_is_the_commonest_answer() -> None:
    found = chance(
        ["color", "color", "color", "count", "count", "compare"],
        ["What color is the cross?"] * 3 + ["How many shapes are there?", "How many digits are there?", "Which?"],
        ["red", "red", "blue", "2", "3", "red"],
    )
    assert found["color"] == pytest.approx(200 / 3)
    assert found["count"] == 100.0  # each wording has its own commonest answer
    assert found["compare"] == 50.0


def test_means_are_per_family() -> None:
    assert by_family(["a", "b"], np.array([1.0, 0.0])) == {"overall": 50.0, "a": 100.0, "b": 0.0}


def test_table_has_a_row_for_each_entry() -> None:
    text = markdown_table({"full": {"overall": 75.0, "color": 100.0}, "cheapest": {"overall": 25.0, "color": 50.0}})
    assert text.splitlines()[2] == "| full | 75.0 | 100.0 |"
    assert len(text.splitlines()) == 4
