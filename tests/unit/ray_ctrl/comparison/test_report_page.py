"""The report in a browser: plotted values are those of the CSV files, no error, readable on a desktop and a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from policies.baselines import rules
from ray_ctrl.commands.compare import Comparison
from ray_ctrl.comparison import html
from ray_ctrl.comparison.methods import Choices, calibrated_margin, fitted, rollouts
from ray_ctrl.comparison.summaries import learning_of_rules

HELD_OUT = (17.0, 30.0, 36.0, 42.0)
OURS = "per family + mask"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ERRORS = ("error", "warning")


@pytest.fixture(scope="module")
def report(sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written comparison; the rule per family takes the place of a controller."""
    train, validation, test = sets
    known = train.known()
    seen, chosen = Choices(validation, known), Choices(test, known)
    methods = list(fitted(known, 0))
    frames = [rollouts(m, chosen, HELD_OUT, calibrated_margin(m, seen, [33.0])) for m in methods]
    frame = pd.concat(frames, ignore_index=True)
    parts = frame[frame["method"].isin((OURS, "per family", "best mean + mask"))]
    curve = learning_of_rules([rules.BestMean(), rules.MeanByFamily()], train, validation, [33.0], 0)
    labels = dict.fromkeys(HELD_OUT, "") | {17.0: "no plan meets it for 95% of requests"}
    out = tmp_path_factory.mktemp("report")
    Comparison(test, frame, parts, curve, labels, [OURS]).write(out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the path: install it to test the report in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser: Any, report: Path, width: int) -> tuple[Any, list[str]]:
    """The report at a window's width, without a network, and what its console said."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text) if message.type in ERRORS else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((report / "report.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 11")
    return page, said


def test_plotted_values_are_those_of_the_csv_files(browser: Any, report: Path) -> None:
    page, said = opened(browser, report, 1280)
    plotted = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(plot => [plot.id, plot.data.map("
        "trace => ({name: trace.name, x: [...trace.x], y: [...trace.y]}))]))"
    )
    budgets = pd.read_csv(report / "budgets.csv")
    for figure, x, y in (
        ("accuracy-over-budget", "budget_ms", "accuracy"),
        ("accuracy-over-latency", "latency_ms", "accuracy"),
        ("violations", "budget_ms", "violations"),
        ("p95", "budget_ms", "p95_used"),
        ("p99", "budget_ms", "p99_used"),
    ):
        assert {trace["name"] for trace in plotted[figure]} == set(budgets["method"])
        for trace in plotted[figure]:
            part = budgets[budgets["method"] == trace["name"]].sort_values(x)
            assert trace["x"] == pytest.approx(part[x].tolist(), rel=1e-4)
            assert trace["y"] == pytest.approx(part[y].tolist(), rel=1e-4, abs=1e-6)
    methods = pd.read_csv(report / "methods.csv").set_index("method")
    (bars,) = plotted["gap"]
    assert bars["x"] == pytest.approx(methods.loc[bars["y"], "gap_to_oracle"].tolist(), rel=1e-4, abs=1e-6)
    page.click("#legend button >> text=/^random$/")
    visible = "plot => plot.data.filter(trace => trace.visible).map(trace => trace.name)"
    assert "random" in page.eval_on_selector("#violations", visible)
    knobs = pd.read_csv(report / "knobs_by_budget.csv", dtype={"option": str})
    for trace in plotted["knobs-by-budget"]:
        knob, _, option = trace["name"].rpartition(" ")
        part = knobs[(knobs["method"] == OURS) & (knobs["knob"] == knob) & (knobs["option"] == option)]
        assert trace["y"] == pytest.approx(part.sort_values("budget_ms")["share"].tolist(), rel=1e-4)
    learning = pd.read_csv(report / "learning.csv")
    for trace in plotted["learning"]:
        part = learning[learning["method"] == trace["name"]]
        assert (trace["x"], trace["y"]) == (part["model_executions"].tolist(), pytest.approx(part["accuracy"].tolist()))
    assert said == []


def test_the_viewer_says_what_each_method_chose(browser: Any, report: Path) -> None:
    page, said = opened(browser, report, 1280)
    rows = pd.read_parquet(report / "rollouts.parquet")
    page.select_option("#sample", "3")
    page.select_option("#budget", "36.0")
    sample = int(page.text_content("#question").removeprefix("Question ").removesuffix("?"))
    cells = [row.inner_text().split("\t") for row in page.query_selector_all("#choices tbody tr")]
    assert {OURS, "oracle (unattainable)"} <= {cell[0] for cell in cells}
    for method, answer, ms, _ in cells:
        match = rows[(rows["method"] == method) & (rows["sample"] == sample) & (rows["budget_ms"] == 36.0)].iloc[0]
        assert answer == match["answer"]
        assert float(ms.split()[0]) == pytest.approx(match["latency_ms"], abs=0.06)
        assert ("over" in ms) == match["violation"]
    assert len(page.query_selector_all("#plans tbody tr")) == 225
    assert page.evaluate("document.getElementById('image').naturalWidth") == 64
    assert said == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_readable(browser: Any, report: Path, width: int, tmp_path: Path) -> None:
    page, said = opened(browser, report, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "scrolls sideways"
    for plot in page.query_selector_all(".js-plotly-plot"):
        box = plot.bounding_box()
        assert box["width"] >= 0.3 * width
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1
    areas = page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].map(p => [p._fullLayout._size.w, p._fullLayout._size.h])"
    )
    assert min(min(area) for area in areas) > 60, "labels and legends leave no place for the plot"
    page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    assert said == []


def test_text_of_a_task_stays_text(tmp_path: Path) -> None:
    """Neither a comment that opens a script element nor the name of a place in the page is more than text."""
    assert "<" not in html.script({"question": "<!--<script> </script>"})
    page = html.filled("@@A@@ @@B@@", {"A": "@@B@@", "B": "b"})
    assert page == "@@B@@ b"


def test_the_report_loads_nothing(report: Path) -> None:
    text = (report / "report.html").read_text("utf-8")
    assert "<script src" not in text
    assert '<link rel="stylesheet' not in text
    assert "@@" not in text.partition("<body>")[2]
