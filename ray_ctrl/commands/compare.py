"""`ray-ctrl compare`: trained controllers, rules and the oracle on one set of requests; tables and one HTML report."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from envs.errors import UserError
from envs.files import atomic_write, write_json
from policies.baselines import rules
from policies.baselines.two_stage import Trained
from policies.controller import Controller
from ray_ctrl.commands.evaluate import load_controller, new_folder, with_moved_store, with_profile_of
from ray_ctrl.comparison import summaries
from ray_ctrl.comparison.html import write_html
from ray_ctrl.comparison.methods import (
    FEASIBLE,
    WITHOUT,
    Choices,
    Method,
    all_rules,
    calibrated_margin,
    feasible_budgets,
    fitted,
    methods_of,
    rollouts,
    without_parts,
)
from ray_ctrl.comparison.outcomes import PlanOutcomes, run_all
from ray_ctrl.config import Config
from ray_ctrl.console import console, counted, table
from ray_ctrl.controllers import controller_config, find_controller, newest_controller
from ray_ctrl.load_config import load_config, with_overrides
from ray_ctrl.provenance import provenance
from ray_ctrl.run_context import RunContext, open_context
from ray_ctrl.run_folder import RunFolder
from ray_ctrl.serving import clamped_budget_ms
from ray_ctrl.trainer import validation_contexts

POINTS = 3
"""Budgets in each held-out band."""
VALIDATION_BUDGETS = 8
"""Training budgets on which margins are calibrated."""
HEADER = ("method", "accuracy", "gain", "over", "worst", "p95 used", "mean ms", "to oracle")
LEGEND = (
    "accuracy and gain over one plan per budget: mean ± half of the 95 % interval, paired and clustered by image; "
    "over, worst: requests over budget, mean and worst budget; p95 used: 95th percentile of latency / budget"
)


@dataclass(frozen=True)
class TrainedRun:
    """A controller to compare: its label, its export, and the folder that keeps what belongs to it."""

    label: str
    seed: int
    folder: Path
    home: Path

    @property
    def config(self) -> Config:
        return with_moved_store(controller_config(Controller.load(self.folder)[1], self.folder), self.home)


def run(arguments: Sequence[str], overrides: Sequence[str], out: Path | None) -> None:
    """Compares the controllers of the runs with all rules and the oracle.

    Args:
        arguments: runs as PATH or LABEL=PATH, and overrides as SECTION.KEY=VALUE; without runs the newest one.

    Raises:
        UserError: no controller, controllers for different models, or nowhere to write.
    """
    keys = [given for given in arguments if re.match(r"[a-z]+\.\w+=", given)]
    runs = named([given for given in arguments if given not in keys], [*keys, *overrides])
    stored = runs[0].config
    config = with_overrides(stored, [*keys, *overrides])
    with new_folder(out, runs[0].home, "comparison") as place:
        context = with_profile_of(open_context(config), stored, runs[0].home, place)
        Comparison.of(context, runs).write(place)


def named(given: Sequence[str], overrides: Sequence[str]) -> list[TrainedRun]:
    """The runs with labels; runs of one label count as its seeds.

    Raises:
        UserError: no controller, or a label of another row of the report.
    """
    taken = {*WITHOUT.values(), *(method.label for rule in all_rules(0) for method in methods_of(rule))}
    if not given:
        newest = newest_controller(Path(load_config("laptop", None, overrides).run.folder))
        given = [str(newest.parent)]
    found: list[TrainedRun] = []
    seeds: Counter[str] = Counter()
    for text in given:
        label, path = _label_and_path(text)
        if label in taken:
            raise UserError(f"label {label!r} is that of another row of the report: choose another")
        folder, home = find_controller(Path(path))
        if not label:
            label = f"GRPO, {controller_config(Controller.load(folder)[1], folder).grpo.advantages}"
        found.append(TrainedRun(label, seeds[label], folder, home))
        seeds[label] += 1
    return found


def _label_and_path(text: str) -> tuple[str, str]:
    """PATH or LABEL=PATH, where either may contain `=`: what exists is the path, else what follows the last `=`."""
    words = text.split("=")
    splits = [("=".join(words[:count]), "=".join(words[count:])) for count in range(len(words))]
    return next((split for split in splits if Path(split[1]).exists()), splits[-1])


@dataclass(frozen=True)
class Comparison:
    """Rollouts of all methods, and what the report is drawn from.

    Attributes:
        frame: rollouts of every method (see `methods.rollouts`).
        parts: rollouts of the first controller without its parts.
        learning: validation accuracy over model executions.
        labels: by budget, why it is not in the headline; empty for those that are.
        ours: labels of the trained controllers.
    """

    test: PlanOutcomes
    frame: pd.DataFrame
    parts: pd.DataFrame
    learning: pd.DataFrame
    labels: dict[float, str]
    ours: list[str]

    @classmethod
    def of(cls, context: RunContext, runs: Sequence[TrainedRun]) -> "Comparison":
        """Runs all plans, fits and calibrates every method, and lets each choose."""
        train = run_all(context.env_config("train"), "training samples")
        validation = run_all(context.env_config("validation"), "validation samples")
        test = run_all(context.env_config("test"), "test samples")
        known, budgets = train.known(), context.budgets.held_out(POINTS)
        trained = [_trained(context, run, budgets, test.resources.clock.reference_ms) for run in runs]
        calibration = feasible_budgets(validation, context.budgets.evenly(VALIDATION_BUDGETS))
        feasible = feasible_budgets(test, budgets)
        labels = {ms: _label(ms, feasible, context) for ms in budgets}
        seen, chosen = Choices(validation, known), Choices(test, known)

        def scored(methods: Sequence[Method]) -> pd.DataFrame:
            frames = []
            with counted("comparing") as progress:
                for done, method in enumerate(methods, 1):
                    method.rule.fit(known) if isinstance(method.rule, Trained) else None
                    margin = calibrated_margin(method, seen, calibration)
                    frames.append(rollouts(method, chosen, budgets, margin))
                    progress(done, len(methods))
            return pd.concat(frames, ignore_index=True)

        seed = context.config.run.seed
        frame = scored([*trained, *fitted(known, seed)])
        first = frame[(frame["method"] == trained[0].label) & (frame["seed"] == trained[0].seed)]
        parts = pd.concat([first, scored(list(without_parts(trained[0])))], ignore_index=True)
        curves = [summaries.learning_of_run(run.label, run.seed, RunFolder(run.home).metrics()) for run in runs]
        learners: list[rules.Rule] = [rules.BestMean(), rules.Ridge()]
        learners += [rules.MeanByFamily()] if known.families is not None else []
        trained_on = [ms for _, ms in validation_contexts(1, context.budgets)]
        curves.append(summaries.learning_of_rules(learners, train, validation, trained_on, seed))
        return cls(test, frame, parts, pd.concat(curves), labels, list(dict.fromkeys(run.label for run in runs)))

    def write(self, out: Path) -> None:
        """Tables as CSV, the report, and the table on the console."""
        inside = [ms for ms, label in self.labels.items() if not label]
        if not inside:
            raise UserError("no held-out budget is feasible on these samples: train with other budgets")
        head = self.frame[self.frame["budget_ms"].isin(inside)]
        boosted = f"{rules.Boosted.name} + mask"
        strong = [m for m in head["method"].unique() if m not in self.ours]
        tables = {
            "methods": summaries.overall(head, boosted),
            "differences": summaries.paired_differences(head, self.ours, strong),
            "budgets": summaries.per_budget(self.frame, self.labels),
            "knobs_by_budget": summaries.knob_use(self.frame, "budget_ms"),
            "learning": self.learning,
            "parts": summaries.parts(self.parts[self.parts["budget_ms"].isin(inside)]),
        }
        if self.test.families is not None:
            tables["families"] = head.groupby(["method", "family"], sort=False, as_index=False)[
                ["accuracy", "violation", "latency_ms"]
            ].mean()
            tables["knobs_by_family"] = summaries.knob_use(head, "family")
        for name, found in tables.items():
            atomic_write(out / f"{name}.csv", found.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        self.frame.to_parquet(out / "rollouts.parquet")
        origin = provenance()
        write_json(out / "summary.json", {"budgets": {str(ms): why for ms, why in self.labels.items()}, **origin})
        write_html(out / "report.html", self.test, self.frame, tables, self.labels, self.ours, origin)
        console.print(table(HEADER, [_cells(row) for row in tables["methods"].itertuples()], "held-out budgets"))
        left_out = [f"left out: {ms:.1f} ms, {why}" for ms, why in self.labels.items() if why]
        console.print("\n".join([LEGEND, *left_out, f"report and tables in {out}"]), markup=False)


def _trained(context: RunContext, run: TrainedRun, budgets: Sequence[float], reference_ms: float) -> Method:
    controller, metadata = load_controller(run.folder, context)
    observed = {ms: clamped_budget_ms(ms, metadata, reference_ms) for ms in budgets}
    return Method(run.label, Trained(controller, run.label), context.guardrail is not None, run.seed, observed)


def _label(budget_ms: float, feasible: Sequence[float], context: RunContext) -> str:
    budgets = context.budgets
    if budget_ms not in feasible:
        return f"no plan meets it for {FEASIBLE:.0%} of requests"
    if not budgets.low_ms <= budget_ms <= budgets.high_ms:
        return f"outside the training range, observed as {budgets.nearest(budget_ms):.1f} ms"
    return ""


def _cells(row: Any) -> tuple[str, ...]:
    return (
        row.method + (f" ({row.seeds} seeds)" if row.seeds > 1 else ""),
        f"{row.accuracy:.3f} ± {row.accuracy_ci:.3f}",
        f"{row.gain:+.3f} ± {row.gain_ci:.3f}",
        f"{row.violations:.1%}",
        f"{row.worst_violations:.1%}" + ("!" if np.isnan(row.margin) else ""),
        f"{row.p95_used:.0%}",
        f"{row.latency_ms:.1f}",
        f"{row.gap_to_oracle:.3f}",
    )
