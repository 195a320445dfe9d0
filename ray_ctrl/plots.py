"""The three pictures: learning curve, accuracy and latency over the budget. Drawn without a
display.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from ray_ctrl.report import Line

PANELS = (
    ("reward", "mean reward"),
    ("accuracy", "accuracy"),
    ("latency_ms", "latency, ms"),
    ("violations", "violation rate"),
)


def learning_curve(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Four panels over the iterations: each iteration pale, their running mean strong, validation
    as dots.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    steps = np.array([m["iteration"] for m in metrics])
    for axis, (key, label) in zip(axes.flat, PANELS, strict=True):
        values = np.array([m.get(key, np.nan) for m in metrics], dtype=float)
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(steps, running_mean(values), color="tab:blue", label="training")
        dots = [(m["iteration"], m[f"validation/{key}"]) for m in metrics if f"validation/{key}" in m]
        if dots:
            axis.plot(*zip(*dots, strict=True), "o", color="tab:orange", label="validation")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    _save(figure, path)


def running_mean(values: np.ndarray, width: int | None = None) -> np.ndarray:
    """Mean over a centred window that shrinks at the ends; width a tenth of the series by
    default.
    """
    half = (width or max(1, len(values) // 10)) // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([window.mean() for window in windows])


def accuracy_over_budget(methods: Mapping[str, Sequence[Line]], path: Path) -> None:
    """One curve a method; hollow markers where more than 5 % of the requests overran."""
    _over_budget(methods, path, "accuracy", "accuracy", diagonal=False)


def latency_over_budget(methods: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Mean chosen latency, with the line at which latency equals budget."""
    _over_budget(methods, path, "latency_ms", "mean latency, ms", diagonal=True)


def _over_budget(methods: Mapping[str, Sequence[Line]], path: Path, key: str, label: str, *, diagonal: bool) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for index, (name, lines) in enumerate(methods.items()):
        budgets = [line.budget_ms or 0.0 for line in lines]
        values = [getattr(line, key) for line in lines]
        kept = ["full" if line.violations <= 0.05 else "none" for line in lines]
        color = f"C{index}"
        axis.plot(budgets, values, color=color, label=name, linewidth=2.2 if index == 0 else 1.2)
        for x, y, fill in zip(budgets, values, kept, strict=True):
            axis.plot([x], [y], "o", color=color, fillstyle=fill, markersize=5)
    if diagonal:
        ends = axis.get_xlim()
        axis.plot(ends, ends, color="grey", linestyle=":", label="latency = budget")
        axis.set_xlim(ends)
    axis.set_xlabel("budget, ms (hollow: over 5 % of requests overran)")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
