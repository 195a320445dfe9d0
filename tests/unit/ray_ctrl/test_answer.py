"""The budget that a controller observes is clamped to its training range."""

import warnings
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.budgets import BudgetDistribution
from envs.data.sample import Sample
from envs.errors import UserError
from envs.knobs import Knobs
from envs.latency import LatencyRecord
from policies.controller import Controller
from ray_ctrl.commands import answer
from ray_ctrl.config import Config
from ray_ctrl.serving import RequestController, clamped_budget_ms

TRAINED = BudgetDistribution.over(20.0, 60.0)
METADATA = {"budgets": asdict(TRAINED), "reference_ms": 80.0}


@given(st.floats(1e-3, 1e7), st.sampled_from([0.5, 1.0, 3.0]))
def test_a_budget_is_clamped_to_the_training_range(budget_ms: float, slower: float) -> None:
    """On a device so many times as slow, budgets are so many times as large."""
    clamped = clamped_budget_ms(budget_ms, METADATA, 80.0 * slower)
    assert clamped == pytest.approx(np.clip(budget_ms, 20.0 * slower, 60.0 * slower))


def test_only_held_out_budgets_outside_the_range_are_clamped() -> None:
    low, *middles, high = TRAINED.held_out()
    assert [clamped_budget_ms(ms, METADATA, 80.0) for ms in middles] == middles
    assert (clamped_budget_ms(low, METADATA, 80.0), clamped_budget_ms(high, METADATA, 80.0)) == (20.0, 60.0)


def test_without_exported_budgets_nothing_is_clamped() -> None:
    assert clamped_budget_ms(3.0, {}, 80.0) == 3.0


@pytest.mark.parametrize("budgets", [None, {"low": 3}, asdict(TRAINED) | {"low_ms": "few"}])
def test_budgets_that_cannot_be_read_are_a_users_mistake(budgets: Any) -> None:
    with pytest.raises(UserError, match=r"cannot be read|not a number"):
        clamped_budget_ms(3.0, {"budgets": budgets, "reference_ms": 80.0}, 80.0)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Budgets, ms, that the controller observes in `answer`, with an engine that answers "red"."""
    seen: list[float] = []

    def run_decided(sample: Sample, serving: RequestController) -> Any:
        seen.append(80.0 * float(serving.budget.exp()))
        serving.knobs = Knobs("low", 1, 4, 12)
        return SimpleNamespace(n_tokens=1), LatencyRecord(1.0, 1.0, 1.0, 1.0, 1.0, 1.0), None

    engine = SimpleNamespace(
        importance=[float(block) for block in range(16)], run_decided=run_decided, text=lambda outcome: "red"
    )
    monkeypatch.setattr(answer, "env_config", lambda *given: SimpleNamespace(build_engine=lambda: engine))
    monkeypatch.setattr(answer, "_check_model", lambda *given: None)
    monkeypatch.setattr(answer, "_reference_ms", lambda *given: 80.0)
    return seen


@pytest.mark.parametrize(("budget_ms", "clamped_ms"), [(3.0, 20.0), (30.0, 30.0), (1e5, 60.0)])
def test_an_answer_uses_the_clamped_budget(served: list[float], budget_ms: float, clamped_ms: float) -> None:
    """The answer keeps the requested budget; one that is too small is warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        given = answer.answer(Config(), METADATA, Controller(8, 8), Sample("s", None, "what?", ()), budget_ms)
    assert served == pytest.approx([clamped_ms])
    assert (given.budget_ms, given.to_dict()["clamped_budget_ms"]) == (budget_ms, clamped_ms)
    assert bool(warned) == (budget_ms < clamped_ms)


def test_a_request_too_large_for_its_budget_is_warned_of(served: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """By its sizes alone, with what makes it large: a photo's pixels, a long question."""
    monkeypatch.setattr(answer, "plans_within", lambda *given: np.zeros((3, 5, 5, 5), dtype=bool))
    image: Any = SimpleNamespace(size=(5000, 3000))
    with pytest.warns(UserWarning, match=r"no plan is predicted to meet 30 ms .*3 words, image 5000 x 3000"):
        given = answer.answer(Config(), METADATA, Controller(8, 8), Sample("s", image, "what is it?", ()), 30.0)
    assert not given.feasible
    assert not given.to_dict()["feasible"]
