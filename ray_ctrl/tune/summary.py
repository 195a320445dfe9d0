"""The end of a sweep: what each trial reached, by its own run folder; the best one's controller, table and plot."""

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.errors import UserError
from envs.files import atomic_folder, atomic_write, write_json
from ray_ctrl.run_folder import Checkpoint, RunFolder
from ray_ctrl.tune.sweep import Sweep
from ray_ctrl.tune.trial import TRIALS


@dataclass(frozen=True)
class Result:
    """One trial.

    Attributes:
        chosen: dotted key to value.
        status: Tune's word: TERMINATED, ERROR, RUNNING, PAUSED, PENDING; UNFINISHED where it was interrupted.
        curve: (iteration, metric) of every validation.
        best: iteration and metric of the best validation that has a checkpoint; None without one.
        iterations: how many were done.
    """

    trial: str
    chosen: Mapping[str, Any]
    status: str
    curve: tuple[tuple[int, float], ...]
    best: tuple[int, float] | None
    iterations: int
    path: Path


def read_results(sweep: Sweep, root: Path, statuses: Mapping[str, str]) -> list[Result]:
    """All trials that got as far as a run folder, best first."""
    results = []
    for place in sorted((root / TRIALS).glob("*")):
        if (place / "run.json").is_file():
            results.append(_result(sweep, RunFolder.open(place), statuses.get(place.name, "PENDING")))
    sign = -1.0 if sweep.file.mode == "max" else 1.0
    return sorted(results, key=lambda r: (r.best is None, sign * r.best[1] if r.best else 0.0, r.trial))


def _result(sweep: Sweep, folder: RunFolder, status: str) -> Result:
    metrics = folder.metrics()
    metric = sweep.file.metric
    curve = tuple((int(m["iteration"]), float(m[metric])) for m in metrics if metric in m)
    kept = {checkpoint.iteration for checkpoint in folder.checkpoints()}
    better = max if sweep.file.mode == "max" else min
    scored = [point for point in curve if point[0] in kept]
    best = better(scored, key=lambda point: point[1]) if scored else None
    settings = folder.config.model_dump(mode="json")
    chosen = {}
    for item in sweep.space:
        section, _, key = item.key.partition(".")
        chosen[item.key] = settings[section][key]
    done = int(metrics[-1]["iteration"]) if metrics else 0
    return Result(folder.root.name, chosen, status, curve, best, done, folder.root)


def export_winner(winner: Result, root: Path) -> Checkpoint:
    """Copies the best trial's best controller to `controller/` of the sweep."""
    assert winner.best is not None  # the caller's choice, no input
    found = [c for c in RunFolder.open(winner.path).checkpoints() if c.iteration == winner.best[0]]
    if not found:
        raise UserError(f"checkpoint {winner.best[0]} of trial {winner.trial} is gone: resume the sweep with --resume")
    with atomic_folder(root / "controller") as temporary:
        shutil.copytree(found[0].path / "controller", temporary, dirs_exist_ok=True)
    return found[0]


HEADER = ("trial", "score", "at", "iterations", "status")


def rows(sweep: Sweep, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary, best first."""
    header = [*HEADER, *(item.key for item in sweep.space)]
    table = []
    for result in results:
        score, at = (f"{result.best[1]:+.4f}", str(result.best[0])) if result.best else ("-", "-")
        words = [result.trial, score, at, str(result.iterations), result.status.lower()]
        table.append([*words, *(_short(result.chosen[item.key]) for item in sweep.space)])
    return header, table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_summary(sweep: Sweep, results: Sequence[Result], root: Path, provenance: Mapping[str, Any]) -> None:
    """summary.csv, summary.md, summary.json and sweep.png."""
    header, table = rows(sweep, results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *table])
    atomic_write(root / "summary.csv", text.getvalue())
    lines = ["| " + " | ".join(row) + " |" for row in [header, *table]]
    lines.insert(1, "|" + "---|" * len(header))
    origin = f"`{provenance['command']}` on {provenance['hardware']}; {sweep.file.metric}, {sweep.file.mode}imum.\n\n"
    atomic_write(root / "summary.md", origin + "\n".join(lines) + "\n")
    entries = [
        {"trial": r.trial, "settings": dict(r.chosen), "best": r.best, "iterations": r.iterations, "status": r.status}
        for r in results
    ]
    write_json(root / "summary.json", {"metric": sweep.file.metric, "trials": entries, **provenance})
    plot(sweep, results, root / "sweep.png")


def plot(sweep: Sweep, results: Sequence[Result], path: Path) -> None:
    """Left: every trial's validations, the best one strong. Then the score over each searched setting."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = sweep.space[:5]
    figure, axes = plt.subplots(1, 1 + len(shown), figsize=(4 * (1 + len(shown)), 3.6), squeeze=False)
    left = axes[0, 0]
    for index, result in reversed(list(enumerate(results))):
        if result.curve:
            style = {"color": "tab:orange", "linewidth": 2.5} if index == 0 else {"color": "tab:blue", "alpha": 0.35}
            left.plot(*zip(*result.curve, strict=True), marker="o", markersize=3, **style)
    left.set_xlabel("iteration")
    left.set_ylabel(sweep.file.metric)
    left.set_title(f"{len(results)} trials, best {results[0].trial}" if results else "no trials", fontsize=9)
    scored = [result for result in results if result.best]
    for axis, item in zip(axes[0, 1:], shown, strict=True):
        values = [result.chosen[item.key] for result in scored]
        heights = [result.best[1] for result in scored if result.best]
        if item.is_range:
            axis.plot(values, heights, "o", color="tab:blue", markersize=4)
            if item.kind.startswith("log"):
                axis.set_xscale("log")
        else:
            places = [item.values.index(value) if value in item.values else np.nan for value in values]
            axis.plot(places, heights, "o", color="tab:blue", markersize=4)
            axis.set_xticks(range(len(item.values)), [str(value) for value in item.values])
        axis.set_xlabel(item.key)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
