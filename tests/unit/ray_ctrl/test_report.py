"""Tables: means, percentiles, correlation and the lookup baseline."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from envs.errors import UserError
from ray_ctrl import plots, report
from ray_ctrl.report import Rollouts, lookup_choices, per_budget, summarise


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
                "tier": 2 if budget else 0,
                "insertion": 1 + sample,
                "top_k": 8,
                "blocks": 16,
            }
        )
    return rows


def test_rows_are_ordered_by_context() -> None:
    rollouts = Rollouts.of("policy", _rows()[::-1])
    assert rollouts["context"].tolist() == list(range(8))
    assert len(rollouts) == 8


def test_a_context_twice_and_an_empty_table_are_refused() -> None:
    rows = _rows()
    with pytest.raises(UserError, match="more than once"):
        Rollouts.of("policy", [*rows, rows[0]])
    with pytest.raises(UserError, match="not a table"):
        Rollouts.of("policy", [])


def test_per_budget_lines() -> None:
    small, large = per_budget(Rollouts.of("policy", _rows()))
    assert (small.budget_ms, large.budget_ms) == (10.0, 20.0)
    assert small.violations == 0.25
    assert large.violations == 0.0
    assert small.latency_ms == pytest.approx(9.0)
    assert small.latency_p95_ms == pytest.approx(np.percentile([12, 8, 8, 8], 95))
    assert (small.tier_low, large.tier_high) == (1.0, 1.0)
    assert large.accuracy == 1.0


def test_standard_error_is_over_samples() -> None:
    line = summarise(Rollouts.of("policy", _rows()))
    means = np.array([0.5, 0.6, 0.7, 0.8])
    assert line.reward == pytest.approx(means.mean())
    assert line.reward_error == pytest.approx(means.std(ddof=1) / 2)


def test_rank_correlation() -> None:
    rollouts = Rollouts.of("policy", _rows())
    assert 0 < report.budget_rank_correlation(rollouts) < 1
    flat = Rollouts("flat", {**rollouts.columns, "latency_ms": np.full(8, 5.0)})
    assert report.budget_rank_correlation(flat) == 0.0
    follows = Rollouts("up", {**rollouts.columns, "latency_ms": rollouts["budget_ms"] * 0.9})
    assert report.budget_rank_correlation(follows) == pytest.approx(1.0)


def test_rank_correlation_within_a_request_ignores_its_size() -> None:
    rollouts = Rollouts.of("policy", _rows())
    sizes = 1000.0 * rollouts["sample"]
    grows = Rollouts("grows", {**rollouts.columns, "latency_ms": rollouts["budget_ms"] + sizes})
    assert report.request_rank_correlation(grows) == pytest.approx(1.0)
    assert report.budget_rank_correlation(grows) < 0.99


def test_lookup_takes_the_most_accurate_plan_that_fits() -> None:
    accuracy = np.array([[0.5] * 20, [0.7] * 20, [0.9] * 20, [0.7] * 20])
    latency = np.array([[5.0] * 20, [10.0] * 20, [20.0] * 20, [8.0] * 20])
    latency[2, 0] = 30.0
    # 1 of 20 requests of plan 2 overruns 25 ms, which is allowed; plans 1 and 3 tie, the faster one
    # is taken.
    assert lookup_choices([25.0, 12.0, 6.0], accuracy, latency) == [2, 3, 0]
    latency[2, 1] = 30.0
    assert lookup_choices([25.0], accuracy, latency) == [3]


def test_lookup_without_a_fitting_plan_takes_the_least_violating() -> None:
    latency = np.array([[5.0, 9.0], [7.0, 8.0]])
    assert lookup_choices([6.0, 1.0], np.ones((2, 2)), latency) == [0, 0]


def test_csv_and_markdown() -> None:
    rollouts = Rollouts.of("policy", _rows())
    lines = [*per_budget(rollouts), summarise(rollouts)]
    table = list(csv.DictReader(io.StringIO(report.to_csv(lines))))
    assert [row["budget_ms"] for row in table] == ["10", "20", ""]
    assert table[0]["method"] == "policy"
    text = report.markdown(report.BUDGET_HEADER, report.budget_rows(lines))
    assert text.count("\n") == 5
    assert "| all |" in text
    all_rows = list(csv.DictReader(io.StringIO(report.rollouts_csv([rollouts]))))
    assert len(all_rows) == 8


def test_pictures_are_drawn(tmp_path: Path) -> None:
    lines = per_budget(Rollouts.of("policy", _rows()))
    plots.accuracy_over_budget({"controller": lines, "full plan": lines}, tmp_path / "a.png")
    plots.latency_over_budget({"controller": lines}, tmp_path / "l.png")
    metrics = [
        {"iteration": i, "reward": 0.1 * i, "accuracy": 0.5, "latency_ms": 9.0, "violations": 0.1} for i in range(1, 21)
    ]
    metrics[9]["validation/reward"] = 0.4
    plots.learning_curve(metrics, tmp_path / "c.png")
    for name in ("a.png", "l.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_running_mean_keeps_length_and_level() -> None:
    smooth = plots.running_mean(np.arange(20, dtype=float), 4)
    assert len(smooth) == 20
    assert smooth[10] == pytest.approx(10.0)
