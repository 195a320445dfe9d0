"""The report: one HTML file with its own plotly, so that it opens from disk without a network."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources as package
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative, sample_colorscale
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from envs.files import atomic_write
from envs.knobs import KNOBS
from ray_ctrl.comparison.methods import ONE_PLAN, ORACLE
from ray_ctrl.comparison.outcomes import PlanOutcomes

VIEWED: Final = 24
"""Samples of the viewer."""
PLOTTED: Final = (ONE_PLAN, "per family + mask", "ridge + mask", "gradient boosting + mask", ORACLE)
"""Methods that plots start with, in addition to the controllers; the buttons above them add others."""
COLORS: Final = (*qualitative.D3, *qualitative.Dark24)


def write_html(
    path: Path,
    test: PlanOutcomes,
    frame: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    labels: Mapping[float, str],
    ours: Sequence[str],
    origin: Mapping[str, Any],
) -> None:
    """Writes the report.

    Args:
        frame: rollouts of every method.
        tables: as they are written to CSV files; every plotted value is one of theirs.
        labels: by budget, why it is not in the headline.
        ours: trained controllers, plotted first.
    """
    parts = tables["parts"]
    names = [f"{part.method}, {part.violation:.0%} over" for part in parts.itertuples()]
    figures = {
        "accuracy-over-budget": lines(tables["budgets"], ours, "budget_ms", "accuracy", "accuracy_ci"),
        "accuracy-over-latency": lines(tables["budgets"], ours, "latency_ms", "accuracy", "accuracy_ci"),
        "violations": lines(tables["budgets"], ours, "budget_ms", "violations"),
        "p95": lines(tables["budgets"], ours, "budget_ms", "p95_used"),
        "p99": lines(tables["budgets"], ours, "budget_ms", "p99_used"),
        "gap": bars(tables["methods"], "gap_to_oracle", "accuracy_ci"),
        "parts": bars(parts.assign(method=names), "difference", "difference_ci"),
        "knobs-by-budget": knobs(tables["knobs_by_budget"], ours[0], "budget_ms"),
        "learning": learning(tables["learning"], ours),
    }
    if "knobs_by_family" in tables:
        figures["knobs-by-family"] = knobs(tables["knobs_by_family"], ours[0], "family")
    values = {
        "PLOTLY": get_plotlyjs(),
        "FIGURES": script({name: json.loads(figure.to_json()) for name, figure in figures.items()}),
        "VIEWER": script(viewer(test, frame, [*ours, *PLOTTED])),
        "METHODS": method_table(tables["methods"]),
        "BUDGETS": html.escape("; ".join(f"{ms:.1f} ms: {why}" for ms, why in labels.items() if why) or "none"),
        "ORIGIN": html.escape(f"{origin['command']} on {origin['hardware']}"),
        "SAMPLES": str(len(test.accuracy)),
        "IMAGES": str(len(np.unique(test.images))),
        "FAMILIES": "" if "knobs-by-family" in figures else "hidden",
    }
    page = package.files("ray_ctrl.comparison").joinpath("report.html").read_text("utf-8")
    atomic_write(path, filled(page, values))


def filled(page: str, values: Mapping[str, str]) -> str:
    """`page` with each @@NAME@@ replaced by its value; a value's own @@NAME@@ is text."""
    return re.sub(r"@@([A-Z]+)@@", lambda place: values[place[1]], page)


def lines(table: pd.DataFrame, ours: Sequence[str], x: str, y: str, error: str | None = None) -> go.Figure:
    """One line per method, by rising x; the controllers are drawn thicker."""
    figure = go.Figure()
    for index, (method, part) in enumerate(_ordered(table, ours)):
        part = part.sort_values(x)
        figure.add_scatter(
            x=part[x].tolist(),
            y=part[y].tolist(),
            error_y={"array": part[error].tolist(), "thickness": 1, "width": 2} if error else None,
            customdata=[[label or "held out"] for label in part["label"]],
            hovertemplate="%{fullData.name}<br>%{x:.1f} ms: %{y:.3f}<br>%{customdata[0]}<extra></extra>",
            name=method,
            mode="lines+markers",
            line={"width": 3 if method in ours else 1.5, "color": COLORS[index % len(COLORS)]},
            visible=method in (*ours, *PLOTTED),
        )
    names = {"budget_ms": "budget, ms", "latency_ms": "mean latency, ms", "violations": "share over budget"}
    names |= {"p95_used": "latency / budget, 95th percentile", "p99_used": "latency / budget, 99th percentile"}
    figure.update_layout(xaxis_title=names.get(x, x), yaxis_title=names.get(y, y), showlegend=False)
    return _styled(figure)


def bars(table: pd.DataFrame, value: str, error: str) -> go.Figure:
    """One horizontal bar per method, with intervals."""
    part = table.iloc[::-1]
    figure = go.Figure(
        go.Bar(
            x=part[value].tolist(),
            y=part["method"].tolist(),
            error_x={"array": part[error].tolist(), "thickness": 1},
            orientation="h",
            name=value,
            marker_color=COLORS[0],
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )
    figure.update_layout(height=110 + 22 * len(part), xaxis_title="accuracy", yaxis={"dtick": 1, "tickfont_size": 11})
    return _styled(figure)


def knobs(table: pd.DataFrame, method: str, key: str) -> go.Figure:
    """Four panels of stacked bars: share of each option of a knob by `key`, for one method."""
    figure = make_subplots(rows=2, cols=2, subplot_titles=KNOBS, shared_xaxes=True, vertical_spacing=0.12)
    mine = table[table["method"] == method].sort_values(key, kind="stable")
    for place, knob in enumerate(KNOBS):
        options = mine[mine["knob"] == knob]
        found = _options(options["option"].unique())
        for color, option in zip(
            sample_colorscale("Tealgrn", np.linspace(0, 1, max(2, len(found)))), found, strict=False
        ):
            part = options[options["option"] == option]
            x = [f"{value:.1f}" if key == "budget_ms" else str(value) for value in part[key]]
            figure.add_bar(
                x=x,
                y=part["share"].tolist(),
                name=f"{knob} {option}",
                marker_color=color,
                hovertemplate=f"{knob} {option}, %{{x}}: %{{y:.0%}}<extra></extra>",
                showlegend=False,
                text=option,
                textposition="inside",
                row=place // 2 + 1,
                col=place % 2 + 1,
            )
    figure.update_layout(barmode="stack", height=560)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title_text="budget, ms" if key == "budget_ms" else key, row=2)
    return _styled(figure)


def learning(table: pd.DataFrame, ours: Sequence[str]) -> go.Figure:
    """Validation accuracy over model executions; a line for each seed."""
    figure = go.Figure()
    for index, (method, some) in enumerate(_ordered(table, ours)):
        for seed, part in some.groupby("seed", sort=False):
            figure.add_scatter(
                x=part["model_executions"].tolist(),
                y=part["accuracy"].tolist(),
                name=method if not seed else f"{method}, seed {seed}",
                legendgroup=method,
                mode="lines+markers",
                line={"color": COLORS[index % len(COLORS)]},
                hovertemplate="%{fullData.name}<br>%{x:,} executions: %{y:.3f}<extra></extra>",
            )
    figure.update_layout(xaxis={"title": "model executions", "type": "log"}, yaxis_title="validation accuracy")
    return _styled(figure)


def method_table(table: pd.DataFrame) -> str:
    """The headline as an HTML table."""
    head = "method|accuracy|gain over one plan per budget|over budget|worst budget|p95 used|p99 used|to oracle"
    rows = []
    for row in table.itertuples():
        cells = [row.method + (f" ({row.seeds} seeds)" if row.seeds > 1 else "")]
        cells += [f"{row.accuracy:.3f} ± {row.accuracy_ci:.3f}", f"{row.gain:+.3f} ± {row.gain_ci:.3f}"]
        cells += [f"{row.violations:.1%}", f"{row.worst_violations:.1%}"]
        cells += [f"{row.p95_used:.0%}", f"{row.p99_used:.0%}", f"{row.gap_to_oracle:.3f}"]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    titles = "".join(f"<th>{title}</th>" for title in head.split("|"))
    return f"<table id='methods'><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def viewer(test: PlanOutcomes, frame: pd.DataFrame, methods: Sequence[str]) -> dict[str, Any]:
    """What the sample viewer shows: images, every plan's answer and latency, what each method chose."""
    samples = test.resources.samples
    viewed = np.unique(np.linspace(0, len(samples) - 1, min(VIEWED, len(samples))).astype(int))
    first = frame[(frame["seed"] == 0) & frame["method"].isin(methods)]
    space = test.resources.space
    entries = []
    for index in viewed.tolist():
        sample, mine = samples[index], first[first["sample"] == index]
        texts = list(dict.fromkeys(test.answers[index]))
        choices = {
            f"{ms:.1f}": dict(zip(part["method"], part["plan"].tolist(), strict=True))
            for ms, part in mine.groupby("budget_ms")
        }
        entries.append(
            {
                "question": sample.question,
                "family": sample.family,
                "reference": list(dict.fromkeys(sample.answers)),
                "image": _png(sample.image.load()) if sample.image else None,
                "answers": texts,
                "answer": [texts.index(text) for text in test.answers[index]],
                "accuracy": test.accuracy[index].round(3).tolist(),
                "ms": test.latency_ms[index].round(2).tolist(),
                "choices": choices,
            }
        )
    plans = [f"{k.tier}, p {k.insertion}, top-{k.top_k}, {k.blocks} blocks" for k in space.all]
    return {"plans": plans, "samples": entries}


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def script(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value).replace("<", "\\u003c")


def _ordered(table: pd.DataFrame, ours: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Parts of a table by method, the controllers first."""
    parts = dict(list(table.groupby("method", sort=False)))
    return [(name, parts[name]) for name in sorted(parts, key=lambda name: (name not in ours, name not in PLOTTED))]


def _options(found: Sequence[str]) -> list[str]:
    order = {"low": 0, "medium": 1, "high": 2}
    return sorted(found, key=lambda option: order[option] if option in order else int(option))


def _styled(figure: go.Figure) -> go.Figure:
    figure.update_layout(template="plotly_white", margin={"l": 10, "r": 10, "t": 30, "b": 10}, font_size=12)
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "font_size": 11})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure
