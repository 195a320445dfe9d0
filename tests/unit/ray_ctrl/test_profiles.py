"""Which profile a run uses: the truth table, and budgets that leave nothing to learn."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.budgets import BudgetDistribution
from envs.errors import UserError
from ray_ctrl import run_context
from ray_ctrl.profiles import MISSING, Measure, Use, resolve_profile

GIVEN, HOME = Path("given.json"), Path("home")
FIRST, SECOND = HOME / "profile.json", HOME / "profile-abc-2.json"
OTHER = "measured on another device"


@pytest.mark.parametrize(
    ("given", "problems", "decision"),
    [
        (GIVEN, {GIVEN: None, FIRST: None}, Use(GIVEN)),
        (GIVEN, {GIVEN: OTHER, FIRST: None}, OTHER),
        (GIVEN, {FIRST: None}, "profile given.json cannot be used: no such file"),
        (None, {FIRST: None, SECOND: None}, Use(FIRST)),
        (None, {}, Measure(FIRST, "no profile of this device, model and thread count in home")),
        (None, {SECOND: None}, Measure(FIRST, "no profile of this device, model and thread count in home")),
        (None, {FIRST: OTHER}, Measure(SECOND, f"profile {FIRST} is not used: {OTHER}")),
        (None, {FIRST: OTHER, SECOND: None}, Use(SECOND)),
        (None, {FIRST: OTHER, SECOND: OTHER}, f"profile {SECOND} is not used: {OTHER}; remove it"),
    ],
)
def test_truth_table(given: Path | None, problems: dict[Path, str | None], decision: Use | Measure | str) -> None:
    def problem(path: Path) -> str | None:
        return problems.get(path, MISSING)

    if isinstance(decision, str):
        with pytest.raises(UserError, match=decision):
            resolve_profile(given, HOME, "abc-2", problem)
    else:
        assert resolve_profile(given, HOME, "abc-2", problem) == decision


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.0, 9.9, "too small"),
        (40.1, 90.0, "too large.*no plan ever exceeds one"),
        (5.0, 15.0, None),
        (35.0, 50.0, None),
    ],
)
def test_budgets_must_leave_a_choice(
    monkeypatch: pytest.MonkeyPatch, low: float, high: float, words: str | None
) -> None:
    monkeypatch.setattr(run_context, "budget_range", lambda *given: (10.0, 40.0))
    resources: Any = SimpleNamespace(
        budgets=BudgetDistribution.over(low, high), engine=None, clock=None, space=None, samples=[]
    )
    if words is None:
        run_context._compare_with_device(resources)
        return
    with pytest.raises(UserError, match=words):
        run_context._compare_with_device(resources)
