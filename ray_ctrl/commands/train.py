"""`ray-ctrl train`: one run from settings to controller, learning curve and held-out table."""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.resources import check_outlives_job
from envs.errors import UserError
from envs.files import atomic_folder
from ray_ctrl.config import Config
from ray_ctrl.console import console, iteration_line, progress_bar
from ray_ctrl.load_config import load_config, to_yaml
from ray_ctrl.preflight import Layout, check_inputs, check_machine, plan_layout
from ray_ctrl.run_folder import Checkpoint, Metrics, RunFolder, choose, free_folder, newest_run, removed_if_vain
from ray_ctrl.signals import Stopper, telling
from ray_ctrl.tracking import Gauges, open_tracker

VALIDATION_BUDGETS = 4
LEARNER_LOSSES = 4  # a run gives up at the fourth
RESUMABLE = (
    "run.iterations",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.tensorboard",
    "run.tracker",
    "run.prometheus",
    "runners.",
)
# What the algorithm calls a number, and what tables and curves call it.
RENAMED = {
    "reward_mean": "reward",
    "accuracy_mean": "accuracy",
    "latency_ms_mean": "latency_ms",
    "violation_rate": "violations",
    "seconds_sample": "time/sample_s",
    "seconds_learn": "time/learn_s",
}


def run(
    preset: str,
    config_file: Path | None,
    overrides: Sequence[str],
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Trains and evaluates.

    Raises:
        Interrupted: by SIGINT or SIGTERM; what was trained until then is kept.
        UserError: settings, folders or files that do not do.
    """
    folder = _find(run_dir, preset, config_file, overrides) if resume else None
    if folder is not None:
        folder.check_importance()
    config = resumed_config(folder, overrides) if folder else load_config(preset, config_file, overrides)
    layout = plan_layout(config, here=not dry_run)
    if dry_run:
        _show_plan(config, layout)
        check_machine(config, layout)
    check_inputs(config)
    root = folder.root if folder else run_dir or _new_root(config)
    check_outlives_job(root)
    if folder is None:
        RunFolder.refuse(root)
    if dry_run:
        return
    _train(config, layout, root, folder)


def resumed_config(folder: RunFolder, overrides: Sequence[str]) -> Config:
    """The run's own settings with `overrides`, which may change only what leaves its results as they would be.

    Raises:
        UserError: an override that would make it another run.
    """
    stored = folder.config
    changed = load_config(None, folder.root / "config.yaml", overrides)
    for key, value in _flat(stored.model_dump()).items():
        if _flat(changed.model_dump())[key] != value and not key.startswith(RESUMABLE):
            raise UserError(
                f"{key} cannot change when a run is resumed (it is {value!r} in {folder.root}): start a "
                "new run, or change only " + ", ".join(RESUMABLE).replace("runners.", "runners.*")
            )
    return changed


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def _find(run_dir: Path | None, preset: str, file: Path | None, overrides: Sequence[str]) -> RunFolder:
    if run_dir is not None:
        return RunFolder.open(run_dir)
    return newest_run(Path(load_config(preset, file, overrides).run.folder))


def _new_root(config: Config) -> Path:
    name = config.run.name or time.strftime("%Y%m%d-%H%M%S")
    return Path(config.run.folder) / name


def _show_plan(config: Config, layout: Layout) -> None:
    """The dry run: resolved settings and who holds which resources."""
    console.print(to_yaml(config), markup=False)
    rollouts = config.grpo.group_size * config.grpo.groups_per_iteration
    console.print(
        f"# each iteration: {config.grpo.groups_per_iteration} groups of {config.grpo.group_size} = {rollouts} "
        f"rollouts, in vectors of {layout.envs} environments, {layout.rounds} round(s)"
    )
    for line in layout.resources.lines():
        console.print(f"# {line}", markup=False)


def _train(config: Config, layout: Layout, root: Path, resumed: RunFolder | None) -> None:
    from cluster.connect import connect
    from ray_ctrl.commands.evaluate import evaluate_setting
    from ray_ctrl.run_context import open_setting

    started = time.monotonic()
    runners = config.runners
    with Stopper() as stopper:
        setting = open_setting(config)
        with connect(runners.address, layout.resources, timeout_s=runners.connect_timeout_s):
            folder, trainer = _begin(config, layout, root, resumed, setting)
            with telling(_resume(folder)):
                try:
                    _run_ahead(config, trainer.setting)
                    if not trainer.train(stopper):
                        stopper.obey()
                finally:
                    trainer.stop()
                with stopper.patient("exporting the controller"):
                    exported = export_controller(folder)
            console.print(f"controller of iteration {exported.iteration} exported to {folder.controller}", markup=False)
            with telling(f"the controller is ready; evaluate it with: ray-ctrl evaluate {folder.root}"):
                stopper.obey()
                evaluate_setting(trainer.setting, folder.controller, free_folder(folder.root / "evaluation"))
    console.print(f"finished in {(time.monotonic() - started) / 60:.1f} minutes")


def _run_ahead(config: Config, setting: Any) -> None:
    """Runs what the lookup table asks for before the first iteration, where that is all that training can ask for.

    Whole batches of it take far less time than the same requests when rollouts come upon them bit by bit. Not with
    runners, which share that work, nor under a measured clock, which reuses nothing.
    """
    covered = config.evaluation.lookup_samples >= config.task.train_samples
    if not covered or config.runners.count or config.latency.source == "measured":
        return
    from ray_ctrl.commands.evaluate import run_all_plans

    world = setting.build("train")
    for _ in run_all_plans(world, list(world.samples)):
        pass


def _begin(
    config: Config, layout: Layout, root: Path, resumed: RunFolder | None, setting: Any
) -> tuple[RunFolder, "Trainer"]:
    """The run folder and the trainer, ready for the next iteration.

    A folder made here is taken away again where the settings turn out not to do, or the profile is interrupted: nothing
    was trained yet, and it would only stand in the way of the next try.
    """
    folder = resumed or RunFolder.create(root, config)
    console.print(f"run folder {folder.root}", markup=False)

    def removed_by(*errors: type[BaseException]) -> AbstractContextManager[None]:
        return removed_if_vain(folder.root, errors) if resumed is None else nullcontext()

    with removed_by(UserError, KeyboardInterrupt):
        setting = setting.with_clock(folder.root)
    with removed_by(UserError), telling(_resume(folder)):
        return folder, Trainer(config, folder, setting, layout)


def _resume(folder: RunFolder) -> str:
    return f"go on with: ray-ctrl train --resume --run-dir {folder.root}"


def export_controller(folder: RunFolder) -> Checkpoint:
    """Copies the chosen checkpoint's controller to `controller/`, draws the learning curve; returns the checkpoint."""
    from ray_ctrl.plots import learning_curve

    chosen = choose(folder.checkpoints())
    if chosen is None:
        raise UserError(f"run {folder.root} has no good checkpoint: resume it with --resume")
    with atomic_folder(folder.controller) as temporary:
        shutil.copytree(chosen.path / "controller", temporary, dirs_exist_ok=True)
    learning_curve(folder.metrics(), folder.root / "learning_curve.png")
    return chosen


@dataclass
class Trainer:
    """The loop over iterations: train, validate, write down, checkpoint."""

    config: Config
    folder: RunFolder
    setting: Any
    layout: Layout

    def __post_init__(self) -> None:
        run = self.config.run
        tracker = open_tracker(run.tracker, self.config.model_dump(mode="json"), self.folder.root)
        gauges = Gauges(self.folder.root) if run.prometheus else None
        self.trackers = [found for found in (tracker, gauges) if found is not None]
        self.contexts = validation_contexts(len(self.setting.build("validation").samples), self.setting.budgets)
        self.lost = 0
        self.writer: Any = None
        self._build()

    def _build(self) -> None:
        from ray_ctrl.rllib_setup import build_algorithm

        self.algorithm = build_algorithm(self.setting, self.layout.envs, len(self.contexts))
        self.done = self._restore()
        if self.writer is not None:
            self.writer.close()
        self.writer = self._writer()

    def train(self, stopper: Stopper) -> bool:
        """Runs to the last iteration; False when a signal ended it before."""
        total = self.config.run.iterations
        begun, first = time.monotonic(), self.done
        with progress_bar() as bar, stopper.patient("stopping after this iteration, with a checkpoint"):
            task = bar.add_task("training", total=total, completed=self.done)
            while self.done < total and not stopper.requested:
                row = self._iterate_or_recover(stopper)
                if row is None:
                    first, begun = self.done, time.monotonic()
                    continue
                spent = (time.monotonic() - begun) / (self.done - first)
                console.print(iteration_line(row, total, spent * (total - self.done)), markup=False)
                bar.update(task, completed=self.done)
        return self.done >= total

    def _iterate_or_recover(self, stopper: Stopper) -> Metrics | None:
        """One iteration and its checkpoint; where a learner died, None, with everything back at the last checkpoint.

        Raises:
            LearnerDied: learners keep dying.
            ConnectError: the cluster has no place for a new one in time.
        """
        from cluster.connect import wait_for
        from policies.grpo.learner import LearnerDied, learner_errors

        try:
            with learner_errors(self.done):
                row = self.iterate()
                if self._due() or stopper.requested:
                    self._checkpoint(row)
        except LearnerDied as error:
            self.lost += 1
            if self.lost >= LEARNER_LOSSES:
                raise
            console.print(f"{error.message} (done by itself, {self.lost} of {LEARNER_LOSSES - 1})", markup=False)
            self.algorithm.stop()
            wait_for(self.layout.resources, self.config.runners.connect_timeout_s, "the cluster")
            self._build()
            return None
        return row

    def iterate(self) -> Metrics:
        """One iteration, written to metrics.jsonl and TensorBoard."""
        started = time.perf_counter()
        numbers = self.algorithm.train()["grpo"]
        self.done += 1
        row: Metrics = {"iteration": self.done}
        # What was not seen (a penalty bin without rollouts) is NaN there and left out here: JSON has no NaN.
        row |= {RENAMED.get(key, key): value for key, value in numbers.items() if math.isfinite(value)}
        if self._validates():
            row |= self._validate()
        row |= self.algorithm.engine_stats()
        row["time/iteration_s"] = time.perf_counter() - started
        self.folder.append_metrics(row)
        if self.writer is not None:
            for key, value in row.items():
                if key != "iteration":
                    self.writer.add_scalar(key, value, self.done)
        for tracker in self.trackers:
            tracker.log({key: value for key, value in row.items() if key != "iteration"}, self.done)
        return row

    def stop(self) -> None:
        """Ends the algorithm's processes."""
        if self.writer is not None:
            self.writer.close()
        for tracker in self.trackers:
            tracker.close()
        self.algorithm.stop()

    def _restore(self) -> int:
        """Takes up the newest good checkpoint and cuts the metrics back to it; returns iterations done."""
        from policies.grpo.checkpoint import restore_checkpoint

        latest = self.folder.latest()
        done = latest.iteration if latest else 0
        if latest is not None:
            restore_checkpoint(self.algorithm, latest.path)
            console.print(f"resumed after iteration {done}")
        self.folder.set_aside_after(done)
        self.folder.cut_metrics(done)
        return done

    def _writer(self) -> Any:
        if not self.config.run.tensorboard:
            return None
        from tensorboardX import SummaryWriter

        # What was written of iterations that were lost is taken back. Files are named by the second they begin in, and
        # a second one of that name would empty the first.
        suffix = f".{self.lost}" if self.lost else ""
        return SummaryWriter(str(self.folder.root / "tensorboard"), purge_step=self.done + 1, filename_suffix=suffix)

    def _validates(self) -> bool:
        every = self.config.evaluation.every
        return bool(every) and (self.done % every == 0 or self.done == self.config.run.iterations)

    def _due(self) -> bool:
        every, total = self.config.run.checkpoint_every, self.config.run.iterations
        return self.done % every == 0 or self.done == total or self._validates()

    def _validate(self) -> Metrics:
        """Means over the validation contexts, acting by argmax, and the score that chooses among checkpoints."""
        from policies.grpo.evaluation import evaluate_contexts, summary

        rows = evaluate_contexts(self.algorithm, self.contexts)
        means = summary(rows)
        means.pop("contexts")
        figures = {f"validation/{RENAMED.get(key, key)}": value for key, value in means.items()}
        figures["validation/score"], figures["validation/score_error"] = validation_score(rows)
        return figures

    def _checkpoint(self, row: Metrics) -> None:
        score, error = row.get("validation/score"), row.get("validation/score_error", 0.0)

        def write(folder: Path) -> None:
            self.algorithm.save_to_path(folder.absolute())
            metadata = self.setting.metadata() | {"iteration": self.done, "validation_score": score}
            self.algorithm.controller().save(folder / "controller", metadata)

        self.folder.save_checkpoint(self.done, score, write, score_error=error)
        self.folder.prune(self.config.run.keep_checkpoints)


def validation_score(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """What checkpoints are chosen by, and its standard error over samples, each of them seen under every budget.

    The mean reward by argmax under the constant multiplier `reward.penalty`, in both modes: what training maximizes, at
    a multiplier that does not move from checkpoint to checkpoint.

    Args:
        rows: one per (validation sample, budget), with `reward`, budgets of one sample next to one another.
    """
    rewards = np.array([row["reward"] for row in rows])
    sample_of = np.arange(len(rows)) // VALIDATION_BUDGETS
    means = np.bincount(sample_of, rewards) / np.bincount(sample_of)
    error = float(means.std(ddof=1) / math.sqrt(means.size)) if means.size > 1 else 0.0
    return float(rewards.mean()), error


def validation_contexts(samples: int, budgets: Any) -> list[tuple[int, float]]:
    """Every validation sample under evenly spread training budgets (never held-out ones, which choose nothing)."""
    shares = (np.arange(VALIDATION_BUDGETS) + 0.5) / VALIDATION_BUDGETS
    spread = [float(ms) for ms in budgets.at(shares)]
    return [(sample, ms) for sample in range(samples) for ms in spread]
