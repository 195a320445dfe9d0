"""Results of a sweep, read from its trials' run folders: the best controller, a table and a plot."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from envs.errors import UserError
from envs.files import atomic_folder, atomic_write, write_json
from ray_ctrl.config import Config
from ray_ctrl.run_folder import Checkpoint, RunFolder
from ray_ctrl.tune.sweep import VARIANT, Range, Sweep
from ray_ctrl.tune.trial import TRIALS


@dataclass(frozen=True)
class Result:
    """One trial.

    Attributes:
        chosen: dotted key to value.
        status: of Tune: TERMINATED, ERROR, RUNNING, PAUSED, PENDING; UNFINISHED if it was interrupted.
        curve: (iteration, metric) of every validation.
        best: iteration and metric of the best validation that has a checkpoint; None without one.
        iterations: completed.
    """

    trial: str
    chosen: Mapping[str, Any]
    status: str
    curve: tuple[tuple[int, float], ...]
    best: tuple[int, float] | None
    iterations: int
    path: Path


def read_results(sweep: Sweep, root: Path, statuses: Mapping[str, str]) -> list[Result]:
    """All trials that have a run folder, best first."""
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
    chosen = {item.key: _chosen(sweep, item, folder.config) for item in sweep.space}
    done = int(metrics[-1]["iteration"]) if metrics else 0
    return Result(folder.root.name, chosen, status, curve, best, done, folder.root)


def _chosen(sweep: Sweep, item: Range, config: Config) -> Any:
    """A trial's value of a searched key, or the variant that its configuration shows."""
    if item.key != VARIANT:
        section, _, key = item.key.partition(".")
        return config.model_dump(mode="json")[section][key]
    changed = {key for values in item.values for key in values}

    def values_of(some: Config) -> list[Any]:
        return [getattr(getattr(some, key.split(".")[0]), key.split(".")[1]) for key in sorted(changed)]

    return next(value for value in item.values if values_of(sweep.config({VARIANT: value})) == values_of(config))


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
    atomic_write(root / "summary.csv", pd.DataFrame(table, columns=header).to_csv(index=False))
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
    """Left: every trial's validations, the best one highlighted. Then the score over each searched key."""
    from matplotlib.figure import Figure

    keys = sweep.space[:5]
    figure = Figure(figsize=(4 * (1 + len(keys)), 3.6), layout="tight")
    axes = figure.subplots(1, 1 + len(keys), squeeze=False)[0]
    for index, result in reversed(list(enumerate(results))):
        style = {"color": "tab:blue", "alpha": 0.35} if index else {"color": "tab:orange", "linewidth": 2.5}
        axes[0].plot(*zip(*result.curve, strict=True) if result.curve else ((), ()), marker="o", markersize=3, **style)
    best = f", best {results[0].trial}" if results else ""
    axes[0].set(xlabel="iteration", ylabel=sweep.file.metric, title=f"{len(results)} trials{best}")
    for axis, item in zip(axes[1:], keys, strict=True):
        scored = [(result.chosen[item.key], result.best[1]) for result in results if result.best]
        axis.set(xlabel=item.key, xscale="log" if item.kind.startswith("log") else "linear")
        if not item.is_range:
            scored = [(item.values.index(value), score) for value, score in scored if value in item.values]
            axis.set_xticks(range(len(item.values)), [str(value) for value in item.values])
        axis.plot([value for value, _ in scored], [score for _, score in scored], "o", color="tab:blue", markersize=4)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
