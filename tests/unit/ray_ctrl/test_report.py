"""Tables: means, percentiles, correlation, budgets that no plan can meet, and the lookup baseline."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from envs.errors import UserError
from ray_ctrl import console, plots, report
from ray_ctrl.report import lookup_choices, summarize


def _rows() -> list[dict[str, float]]:
    rows = []
    for context in range(8):
        sample, budget = divmod(context, 2)
        rows.append(
            {
                "context": context,
                "sample": sample,
                "budget_ms": (10.0, 20.0)[budget],
                "accuracy": 1.0 if budget else 0.5,
                "latency_ms": 12.0 + budget + sample if sample == 0 else 8.0 + budget,
                "reward": 0.1 * sample + budget,
                "avoidable": bool(budget),
                "tier": 2 if budget else 0,
                "insertion": 1 + sample,
                "top_k": 8,
                "blocks": 16,
            }
        )
    return rows


@pytest.fixture
def frame() -> pd.DataFrame:
    return report.rollouts("policy", _rows())


def test_rows_are_ordered_by_context() -> None:
    assert report.rollouts("policy", _rows()[::-1])["context"].tolist() == list(range(8))


def test_a_context_twice_and_an_empty_table_are_refused() -> None:
    rows = _rows()
    with pytest.raises(UserError, match="more than once"):
        report.rollouts("policy", [*rows, rows[0]])
    with pytest.raises(UserError, match="not complete"):
        report.rollouts("policy", [])


def test_per_budget_lines(frame: pd.DataFrame) -> None:
    small, large = summarize(frame, "method", "budget_ms").itertuples()
    assert (small.method, small.budget_ms, large.budget_ms, small.rollouts) == ("policy", 10.0, 20.0, 4)
    assert (small.violations, large.violations) == (0.25, 0.0)
    assert small.latency_ms == pytest.approx(9.0)
    assert small.latency_p95_ms == pytest.approx(np.percentile([12, 8, 8, 8], 95))
    assert (small.tier_low, large.tier_high) == (1.0, 1.0)
    assert large.accuracy == 1.0


def test_standard_error_is_over_samples(frame: pd.DataFrame) -> None:
    (line,) = summarize(frame, "method").itertuples()
    means = np.array([0.5, 0.6, 0.7, 0.8])
    assert line.reward == pytest.approx(means.mean())
    assert line.reward_error == pytest.approx(means.std(ddof=1) / 2)
    assert line.accuracy_error == 0.0
    (single,) = summarize(frame[frame["sample"] == 0], "method").itertuples()
    assert single.reward_error == 0.0


def test_budgets_that_no_plan_can_meet_are_no_headline(frame: pd.DataFrame) -> None:
    assert report.attainable_budgets(frame) == [20.0]
    met = report.rollouts("policy", [row | {"avoidable": True} for row in _rows()])
    assert report.attainable_budgets(met) == [10.0, 20.0]


def test_rank_correlation(frame: pd.DataFrame) -> None:
    assert 0 < report.budget_rank_correlation(frame) < 1
    assert report.budget_rank_correlation(frame.assign(latency_ms=5.0)) == 0.0
    assert report.budget_rank_correlation(frame.assign(latency_ms=frame["budget_ms"] * 0.9)) == pytest.approx(1.0)


def test_rank_correlation_within_a_request_ignores_its_size(frame: pd.DataFrame) -> None:
    grows = frame.assign(latency_ms=frame["budget_ms"] + 1000.0 * frame["sample"])
    assert report.request_rank_correlation(grows) == pytest.approx(1.0)
    assert report.budget_rank_correlation(grows) < 0.99


def test_lookup_takes_the_most_accurate_plan_that_fits() -> None:
    accuracy = np.array([[0.5] * 20, [0.7] * 20, [0.9] * 20, [0.7] * 20])
    latency = np.array([[5.0] * 20, [10.0] * 20, [20.0] * 20, [8.0] * 20])
    latency[2, 0] = 30.0
    # 1 of 20 requests of plan 2 exceeds 25 ms, which is allowed; plans 1 and 3 tie, the faster one is taken.
    assert lookup_choices([25.0, 12.0, 6.0], accuracy, latency) == [2, 3, 0]
    latency[2, 1] = 30.0
    assert lookup_choices([25.0], accuracy, latency) == [3]


def test_lookup_without_a_fitting_plan_takes_the_least_violating() -> None:
    latency = np.array([[5.0, 9.0], [7.0, 8.0]])
    assert lookup_choices([6.0, 1.0], np.ones((2, 2)), latency) == [0, 0]


def test_tables_fit_80_columns_and_markdown_has_a_line_per_row(frame: pd.DataFrame) -> None:
    widest = frame.assign(method="static plan at 90%", budget_ms=12345.6, latency_ms=12345.6, tier=1, reward=-10.0)
    over = report.budget_rows(summarize(widest, "method", "budget_ms"))
    for header, rows in (
        (report.BUDGET_HEADER, over),
        (report.METHOD_HEADER, report.method_rows(summarize(widest, "method"))),
        (report.FAMILY_HEADER, report.family_rows(summarize(widest.assign(family="counting objects"), "family"))),
    ):
        narrow = Console(width=80)
        with narrow.capture() as captured:
            narrow.print(console.table(header, rows, "title"))
        text = captured.get()
        assert "…" not in text
        assert all(cell in text for row in rows for cell in row)
        assert max(map(len, text.splitlines())) <= 80
    assert report.markdown(report.BUDGET_HEADER, over).count("\n") == 2 + len(over)


def test_pictures_are_drawn(frame: pd.DataFrame, tmp_path: Path) -> None:
    table = summarize(pd.concat([frame, frame.assign(method="full plan")]), "method", "budget_ms")
    plots.accuracy_over_budget(table, tmp_path / "a.png")
    plots.latency_over_budget(table, tmp_path / "l.png")
    metrics = [
        {"iteration": i, "reward": 0.1 * i, "accuracy": 0.5, "latency_ms": 9.0, "violations": 0.1} for i in range(1, 21)
    ]
    metrics[9]["validation/accuracy"] = 0.4
    plots.learning_curve(metrics, tmp_path / "c.png")
    for name in ("a.png", "l.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
