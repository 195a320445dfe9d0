"""The three pictures: learning curve, accuracy and latency over the budget. Drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

PANELS = (
    ("accuracy", "accuracy"),
    ("violations", "violation rate"),
    ("latency_ms", "latency, ms"),
    ("reward", "mean reward"),
)
MAX_VIOLATION_RATE = 0.05


def learning_curve(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Four panels over the iterations: validation by argmax strong, sampled training rollouts pale."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    frame = pd.DataFrame(list(metrics)).set_index("iteration")
    for axis, (key, label) in zip(axes.flat, PANELS, strict=True):
        if key in frame:
            # A moving mean over a tenth of the run, centered, shorter at the ends.
            smooth = frame[key].rolling(max(1, len(frame) // 10), center=True, min_periods=1).mean()
            axis.plot(frame.index, frame[key], color="tab:blue", alpha=0.2, linewidth=1)
            axis.plot(frame.index, smooth, color="tab:blue", alpha=0.6, label="training, sampled")
        if f"validation/{key}" in frame:
            validated = frame[f"validation/{key}"].dropna()
            axis.plot(validated.index, validated, "o-", color="tab:orange", linewidth=2, label="validation, argmax")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    _save(figure, path)


def accuracy_over_budget(table: pd.DataFrame, path: Path) -> None:
    """One curve per method; hollow markers for budgets that more than 5 % of the requests exceeded.

    Args:
        table: `report.summarize(rollouts, "method", "budget_ms")`.
    """
    _over_budget(table, path, "accuracy", "accuracy", diagonal=False)


def latency_over_budget(table: pd.DataFrame, path: Path) -> None:
    """Mean chosen latency, with the line at which latency equals budget."""
    _over_budget(table, path, "latency_ms", "mean latency, ms", diagonal=True)


def _over_budget(table: pd.DataFrame, path: Path, key: str, label: str, *, diagonal: bool) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for index, (method, lines) in enumerate(table.groupby("method", sort=False)):
        color = f"C{index}"
        axis.plot(lines["budget_ms"], lines[key], color=color, label=method, linewidth=1.2 if index else 2.2)
        for fill, some in lines.groupby(np.where(lines["violations"] <= MAX_VIOLATION_RATE, "full", "none")):
            axis.plot(some["budget_ms"], some[key], "o", color=color, fillstyle=fill, markersize=5)
    if diagonal:
        ends = axis.get_xlim()
        axis.plot(ends, ends, color="grey", linestyle=":", label="latency = budget")
        axis.set_xlim(ends)
    axis.set_xlabel("budget, ms (hollow: exceeded by over 5 % of requests)")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
