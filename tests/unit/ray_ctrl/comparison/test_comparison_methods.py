"""Margins are calibrated to one violation rate, choices respect them, and headline tables are right."""

import numpy as np
import pandas as pd
import pytest

from envs.errors import UserError
from policies.baselines import rules
from ray_ctrl.comparison import summaries
from ray_ctrl.comparison.methods import (
    ONE_PLAN,
    ORACLE,
    TARGET,
    Choices,
    Method,
    calibrated_margin,
    feasible_budgets,
    fitted,
    rollouts,
)

HELD_OUT = (30.0, 36.0, 42.0)


@pytest.fixture(scope="module")
def frame(sets) -> pd.DataFrame:
    train, validation, test = sets
    known = train.known()
    seen, chosen = Choices(validation, known), Choices(test, known)
    found = [(method, calibrated_margin(method, seen, [28.0, 33.0, 40.0])) for method in fitted(known, 0)]
    return pd.concat([rollouts(method, chosen, HELD_OUT, margin) for method, margin in found], ignore_index=True)


def test_every_method_is_there_with_and_without_the_mask(frame: pd.DataFrame) -> None:
    names = set(frame["method"])
    assert {ONE_PLAN, ORACLE, "cheapest", "value heads", "value heads + mask", "per family + mask"} <= names
    learned = ("ridge", "MLP", "k nearest", "gradient boosting", "tier alone", "top_k alone", "blocks alone", "random")
    assert {f"{name}{mask}" for name in learned for mask in ("", " + mask")} <= names
    assert (frame.groupby("method").size() == 200 * len(HELD_OUT)).all()


def test_margins_bring_methods_to_one_violation_rate(frame: pd.DataFrame, sets) -> None:
    rates = frame[frame["masked"]].groupby("method")["violation"].mean()
    assert rates[ORACLE] == 0.0
    assert (rates <= TARGET + 0.03).all()  # three standard errors of 200 samples above the target
    margins = frame.groupby("method")["margin"].first()
    assert margins["ridge + mask"] > 1.0  # predictions leave out the noise
    validation = sets[1]
    ridge = rules.Ridge()
    ridge.fit(sets[0].known())
    seen = Choices(validation, sets[0].known())
    method = Method("ridge + mask", ridge, True)
    margin = calibrated_margin(method, seen, [33.0])
    assert seen.violation_rates(method, [33.0], margin)[0] <= TARGET
    assert seen.violation_rates(method, [33.0], 0.9 * margin)[0] > TARGET


def test_what_ignores_the_budget_has_no_margin(frame: pd.DataFrame) -> None:
    margins = frame.groupby("method")["margin"].first()
    assert np.isnan(margins["full"])
    assert margins["cheapest"] == 1.0


def test_a_margin_without_effect_is_tried_once(sets, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Choices(sets[1], sets[0].known())
    rule, tried = rules.Full(), []
    rule.fit(seen.known)
    rates = Choices.violation_rates
    monkeypatch.setattr(Choices, "violation_rates", lambda *given: tried.append(1) or rates(*given))
    assert np.isnan(calibrated_margin(Method("full", rule, False), seen, [33.0]))
    assert len(tried) == 1


def test_a_margin_needs_a_budget(sets) -> None:
    rule = rules.Ridge()
    rule.fit(sets[0].known())
    with pytest.raises(UserError, match="no budget"):
        calibrated_margin(Method("ridge + mask", rule, True), Choices(sets[1], sets[0].known()), [])


def test_feasible_budgets_are_those_of_the_cheapest_plan(sets) -> None:
    test = sets[2]
    share = [(test.latency_ms[:, test.cheapest] <= ms).mean() for ms in (8.0, 10.0, 30.0)]
    assert share[0] < 0.95 < share[2]
    assert feasible_budgets(test, (8.0, 30.0)) == [30.0]


def test_headline_columns_follow_from_the_rollouts(frame: pd.DataFrame) -> None:
    table = summaries.overall(frame, "gradient boosting + mask").set_index("method")
    for method in (ONE_PLAN, "ridge + mask", ORACLE):
        part = frame[frame["method"] == method]
        assert table.loc[method, "accuracy"] == pytest.approx(part["accuracy"].mean())
        rates = part.groupby("budget_ms")["violation"].mean()
        assert table.loc[method, "worst_violations"] == pytest.approx(rates.max())
    gain = table.loc["ridge + mask", "accuracy"] - table.loc[ONE_PLAN, "accuracy"]
    assert table.loc["ridge + mask", "gain"] == pytest.approx(gain)
    assert table.loc["gradient boosting + mask", "gain_share"] == pytest.approx(1.0)
    assert table.loc[ORACLE, "gap_to_oracle"] == 0.0
    assert list(table.index)[-1] == "full"  # no margin brings it to the target: listed last
    differences = summaries.paired_differences(frame, ["ridge + mask"], [ONE_PLAN])
    assert differences["difference"][0] == pytest.approx(gain)


def test_the_question_is_worth_something_under_the_mask(frame: pd.DataFrame) -> None:
    table = summaries.overall(frame, "gradient boosting + mask").set_index("method")
    for learned in ("ridge + mask", "per family + mask", "value heads + mask", "gradient boosting + mask"):
        assert table.loc[learned, "gain"] > 3 * table.loc[learned, "gain_ci"], learned


def test_clustered_errors_are_those_of_independent_clusters() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    assert summaries.clustered_error(values, np.arange(50)) == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    doubled, clusters = np.repeat(values, 4), np.repeat(np.arange(50), 4)
    assert summaries.clustered_error(doubled, clusters) == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert summaries.clustered_error(values, np.zeros(50)) == 0.0


def test_learning_curves_count_the_executions_of_all_plans(sets) -> None:
    train, validation, _ = sets
    found = summaries.learning_of_rules([rules.MeanByFamily()], train, validation, [33.0], 0)
    assert found["model_executions"].tolist() == [195 * size for size in (8, 16, 32, 64, 120)]
    assert found["accuracy"].iloc[-1] >= found["accuracy"].iloc[0]
    rows = [{"iteration": 1}, {"model_executions": 5, "validation/accuracy": 0.5, "validation/violations": 0.1}]
    assert summaries.learning_of_run("ours", 2, rows).values.tolist() == [["ours", 2, 5, 0.5, 0.1]]
