"""The training loop: iterate, validate, record, checkpoint; back to the last checkpoint if a learner dies."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_ctrl.config import Config
from ray_ctrl.console import console, iteration_line, progress_bar
from ray_ctrl.model_card import describe_export
from ray_ctrl.preflight import Layout
from ray_ctrl.run_folder import Metrics, RunFolder
from ray_ctrl.signals import Stopper
from ray_ctrl.tracking import Gauges, open_tracker

if TYPE_CHECKING:
    from envs.budgets import BudgetDistribution
    from ray_ctrl.run_context import RunContext

VALIDATION_BUDGETS = 4
MAX_LEARNER_RESTARTS = 3
SHORT_RUN = 20  # iterations, up to which each one is printed
QUIET_S = 60.0  # without a line, of a longer run
# What the algorithm calls a number, and what tables and curves call it.
COLUMN_NAMES = {
    "reward_mean": "reward",
    "accuracy_mean": "accuracy",
    "latency_ms_mean": "latency_ms",
    "violation_rate": "violations",
    "seconds_sample": "time/sample_s",
    "seconds_learn": "time/learn_s",
}


@dataclass
class Trainer:
    """Trains in a run folder, from its newest good checkpoint on.

    Raises:
        UserError: settings that no algorithm can be built from, or a resumed run whose weights or data changed.
    """

    config: Config
    folder: RunFolder
    context: "RunContext"
    layout: Layout

    def __post_init__(self) -> None:
        run = self.config.run
        self.folder.check_inputs(self.context.inputs)
        config = self.config.model_dump(mode="json")
        tracker = open_tracker(run.tracker, config, self.folder.root, self.folder.metrics())
        gauges = Gauges(self.folder.root) if run.prometheus else None
        self.trackers = [found for found in (tracker, gauges) if found is not None]
        self.contexts = validation_contexts(len(self.context.build("validation").samples), self.context.budgets)
        self.restarts = 0
        self.printed = -math.inf
        self.writer: Any = None
        self._build()

    def _build(self) -> None:
        from ray_ctrl.rllib_setup import build_algorithm

        self.algorithm = build_algorithm(self.context, self.layout.envs, len(self.contexts))
        self.done = self._restore()
        if self.writer is not None:
            self.writer.close()
        self.writer = self._writer()

    def train(self, stopper: Stopper) -> bool:
        """Runs to the last iteration; False if a signal ended it before."""
        total = self.config.run.iterations
        started, first = time.monotonic(), self.done
        with progress_bar() as bar, stopper.defer_interrupt("the run stops after this iteration, with a checkpoint"):
            task = bar.add_task("training", total=total, completed=self.done)
            while self.done < total and not stopper.requested:
                row = self._iterate_or_recover(stopper)
                if row is None:
                    first, started = self.done, time.monotonic()
                    continue
                each_s = (time.monotonic() - started) / (self.done - first)
                if self._prints():
                    console.print(iteration_line(row, total, each_s * (total - self.done)))
                bar.update(task, completed=self.done)
        return self.done >= total

    def iterate(self) -> Metrics:
        """One iteration, written to metrics.jsonl, TensorBoard and trackers."""
        started = time.perf_counter()
        numbers = self.algorithm.train()["grpo"]
        self.done += 1
        row: Metrics = {"iteration": self.done}
        # What was not observed (a penalty bin without rollouts) is NaN there and left out here: JSON has no NaN.
        row |= {COLUMN_NAMES.get(key, key): value for key, value in numbers.items() if math.isfinite(value)}
        if self._validates():
            row |= self._validate()
        row |= self.algorithm.engine_stats()
        row["time/iteration_s"] = time.perf_counter() - started
        self.folder.append_metrics(row)
        logged = {key: value for key, value in row.items() if key != "iteration"}
        for key, value in logged.items() if self.writer is not None else ():
            self.writer.add_scalar(key if "/" in key else f"train/{key}", value, self.done)
        for tracker in self.trackers:
            tracker.log(logged, self.done)
        return row

    def step(self, stopper: Stopper | None = None) -> Metrics:
        """One iteration, and its checkpoint if one is due or a stop was requested meanwhile."""
        row = self.iterate()
        if self._due() or (stopper is not None and stopper.requested):
            self._checkpoint(row)
        return row

    def stop(self) -> None:
        """Ends the algorithm's processes."""
        if self.writer is not None:
            self.writer.close()
        for tracker in self.trackers:
            tracker.close()
        self.algorithm.stop()

    def _iterate_or_recover(self, stopper: Stopper) -> Metrics | None:
        """One iteration and its checkpoint; None if a learner died and everything is back at the last checkpoint.

        Raises:
            LearnerDied: learners keep dying.
            ConnectError: the cluster has no place for a new one within the timeout.
        """
        from cluster.connect import wait_for
        from policies.grpo.learner import LearnerDied, learner_errors

        try:
            with learner_errors(self.done):
                row = self.step(stopper)
        except LearnerDied as error:
            self.restarts += 1
            if self.restarts > MAX_LEARNER_RESTARTS:
                raise
            console.print(f"{error.message} (automatic restart {self.restarts} of {MAX_LEARNER_RESTARTS})")
            self.algorithm.stop()
            wait_for(self.layout.resources, self.config.runners.connect_timeout_s, "the cluster")
            self._build()
            return None
        return row

    def _restore(self) -> int:
        """Restores the newest good checkpoint and cuts the metrics back to it; returns iterations done."""
        from policies.grpo.checkpoint import restore_checkpoint

        latest = self.folder.latest()
        done = latest.iteration if latest else 0
        if latest is not None:
            restore_checkpoint(self.algorithm, latest.path)
            console.print(f"resumed after iteration {done}")
        self.folder.discard_after(done)
        self.folder.cut_metrics(done)
        return done

    def _writer(self) -> Any:
        if not self.config.run.tensorboard:
            return None
        from tensorboardX import SummaryWriter

        # Purges what was written of lost iterations. Files are named by the second they are opened in, and another of
        # that name would empty the first.
        suffix = f".{self.restarts}" if self.restarts else ""
        return SummaryWriter(str(self.folder.root / "tensorboard"), purge_step=self.done + 1, filename_suffix=suffix)

    def _validates(self) -> bool:
        every = self.config.evaluation.every
        return bool(every) and (self.done % every == 0 or self.done == self.config.run.iterations)

    def _due(self) -> bool:
        every, total = self.config.run.checkpoint_every, self.config.run.iterations
        return self.done % every == 0 or self.done == total or self._validates()

    def _prints(self) -> bool:
        """Whether this iteration gets a line: validations, the first and the last, and one a minute."""
        now, total = time.monotonic(), self.config.run.iterations
        if total > SHORT_RUN and not self._validates() and self.done < total and now - self.printed < QUIET_S:
            return False
        self.printed = now
        return True

    def _validate(self) -> Metrics:
        """Means over the validation contexts, acting by argmax, and the score that chooses among checkpoints."""
        from policies.grpo.evaluation import evaluate_contexts, summary

        rows = evaluate_contexts(self.algorithm, self.contexts)
        means = summary(rows)
        means.pop("contexts")
        figures = {f"validation/{COLUMN_NAMES.get(key, key)}": value for key, value in means.items()}
        figures["validation/score"], figures["validation/score_error"] = validation_score(rows)
        return figures

    def _checkpoint(self, row: Metrics) -> None:
        score, error = row.get("validation/score"), row.get("validation/score_error", 0.0)

        def write(folder: Path) -> None:
            self.algorithm.save_to_path(folder.absolute())
            metadata = self.context.metadata() | {"iteration": self.done, "validation_score": score}
            describe_export(self.algorithm.controller().save(folder / "controller", metadata))

        self.folder.save_checkpoint(self.done, score, write, score_error=error)
        self.folder.prune(self.config.run.keep_checkpoints)


def validation_score(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """What checkpoints are chosen by, and its standard error over samples, each of which occurs under every budget.

    The mean reward by argmax with the constant multiplier `reward.penalty`, in both modes: what training maximizes, at
    a multiplier that does not move from checkpoint to checkpoint.

    Args:
        rows: one per (validation sample, budget), with `reward`, budgets of one sample next to one another.
    """
    rewards = np.array([row["reward"] for row in rows])
    sample_of = np.arange(len(rows)) // VALIDATION_BUDGETS
    means = np.bincount(sample_of, rewards) / np.bincount(sample_of)
    error = float(means.std(ddof=1) / math.sqrt(means.size)) if means.size > 1 else 0.0
    return float(rewards.mean()), error


def validation_contexts(samples: int, budgets: "BudgetDistribution") -> list[tuple[int, float]]:
    """Every validation sample under evenly spaced training budgets (held-out budgets choose nothing)."""
    return [(sample, ms) for sample in range(samples) for ms in budgets.evenly(VALIDATION_BUDGETS)]
