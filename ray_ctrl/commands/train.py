"""`ray-ctrl train`: one run from settings to controller, learning curve and held-out table."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from envs.errors import UserError
from envs.files import atomic_folder, atomic_write
from ray_ctrl.config import Config
from ray_ctrl.console import console
from ray_ctrl.load_config import flat, load_config, to_yaml
from ray_ctrl.preflight import Layout, check_inputs, check_machine, plan_layout
from ray_ctrl.run_folder import (
    Checkpoint,
    RunFolder,
    claim_folder,
    locked,
    newest_run,
    remove_on_error,
    select_checkpoint,
)
from ray_ctrl.signals import Stopper, hint_on_interrupt
from ray_ctrl.trainer import Trainer

if TYPE_CHECKING:
    from ray_ctrl.run_context import RunContext

RESUMABLE = (
    "run.iterations",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.tensorboard",
    "run.tracker",
    "run.prometheus",
    "runners.",
)


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
        Interrupted: by a signal; what was trained until then is kept.
        UserError: settings, folders or files that cannot be used.
    """
    folder = None
    if resume:
        runs = Path() if run_dir else Path(load_config(preset, config_file, overrides).run.folder)
        folder = RunFolder.open(run_dir) if run_dir else newest_run(runs)
        folder.check_importance()
    config = resumed_config(folder, overrides) if folder else load_config(preset, config_file, overrides)
    layout = plan_layout(config, here=not dry_run)
    if dry_run:
        _show_plan(config, layout)
        check_machine(config, layout)
    check_inputs(config)
    root = run_dir or Path(config.run.folder) / (config.run.name or time.strftime("%Y%m%d-%H%M%S"))
    if folder is None:
        RunFolder.refuse(root)
    if dry_run:
        return
    if folder is not None and folder.finished(config.run.iterations):
        console.print(
            f"run {folder.root} is finished: {config.run.iterations} iterations, exported and evaluated; continue it "
            f"with a larger run.iterations=N, or evaluate it again with: ray-ctrl evaluate {folder.root}"
        )
        return
    if folder is None and run_dir is None and config.run.name is None:
        root = claim_folder(root)  # two runs may begin in the same second
    _train(config, layout, root, folder)


def resumed_config(folder: RunFolder, overrides: Sequence[str]) -> Config:
    """The run's own configuration with `overrides`, which may change only what leaves its results unchanged.

    Raises:
        UserError: an override that would make it another run.
    """
    changed = load_config(None, folder.root / "config.yaml", overrides)
    values = flat(changed.model_dump())
    for key, value in flat(folder.config.model_dump()).items():
        if values[key] != value and not key.startswith(RESUMABLE):
            raise UserError(
                f"{key} cannot change when a run is resumed (it is {value!r} in {folder.root}): start a "
                "new run, or change only " + ", ".join(RESUMABLE).replace("runners.", "runners.*")
            )
    return changed


def _show_plan(config: Config, layout: Layout) -> None:
    """The dry run: resolved settings, and the resources of each process."""
    console.print(to_yaml(config))
    rollouts = config.grpo.group_size * config.grpo.groups_per_iteration
    console.print(
        f"# each iteration: {config.grpo.groups_per_iteration} groups of {config.grpo.group_size} = {rollouts} "
        f"rollouts, in vectors of {layout.envs} environments, {layout.batches} per runner"
    )
    for line in layout.resources.lines():
        console.print(f"# {line}")


def _train(config: Config, layout: Layout, root: Path, resumed: RunFolder | None) -> None:
    """Open the run, train, export, evaluate."""
    from cluster.connect import connect
    from ray_ctrl.commands.evaluate import evaluate_context, new_folder
    from ray_ctrl.model_card import describe_export
    from ray_ctrl.run_context import open_context

    started = time.monotonic()
    runners = config.runners
    with remove_if_empty(root), Stopper() as stopper:
        context = open_context(config)
        with (
            connect(runners.address, layout.resources, timeout_s=runners.connect_timeout_s),
            open_run(root, config, context, resumed) as (folder, context),
        ):
            with hint_on_interrupt(f"continue with: ray-ctrl train --resume --run-dir {root}"):
                train(config, layout, folder, context, stopper, new=resumed is None)
                with stopper.defer_interrupt("exporting the controller"):
                    exported = export_controller(folder)
            console.print(f"controller of iteration {exported.iteration} exported to {folder.controller}")
            with hint_on_interrupt(f"the controller is ready; evaluate it with: ray-ctrl evaluate {root}"):
                stopper.raise_if_interrupted()
                with new_folder(None, folder.root) as out:
                    describe_export(folder.controller, evaluate_context(context, folder.controller, out))
    console.print(
        f"finished in {(time.monotonic() - started) / 60:.1f} minutes\n"
        f"next: ray-ctrl answer IMAGE QUESTION --budget-ms {context.budgets.high_ms:.0f} --controller {root}"
    )


@contextmanager
def remove_if_empty(root: Path) -> Iterator[None]:
    """Removes a claimed folder that was never filled."""
    try:
        yield
    finally:
        if root.is_dir() and not any(root.iterdir()):
            root.rmdir()


@contextmanager
def open_run(
    root: Path, config: Config, context: "RunContext", resumed: RunFolder | None
) -> Iterator[tuple[RunFolder, "RunContext"]]:
    """The locked run folder, and the context with its clock and budgets.

    A new folder is removed if the settings turn out impossible or profiling is interrupted: nothing was trained yet,
    and it would only block the name for the next try.
    """
    if resumed is None:
        RunFolder.refuse(root)
        root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        with remove_on_error(root, UserError, OSError, KeyboardInterrupt) if resumed is None else nullcontext():
            folder = resumed or RunFolder.create(root, config)
            if folder.config != config:  # a resumed run with more iterations, for one
                atomic_write(root / "config.yaml", to_yaml(config))
            console.print(f"run folder {root}")
            context = context.with_profile(root)
        yield folder, context


def train(
    config: Config, layout: Layout, folder: RunFolder, context: "RunContext", stopper: Stopper, *, new: bool
) -> None:
    """Runs all iterations.

    Raises:
        KeyboardInterrupt: a signal ended it before; a checkpoint was written.
    """
    from ray_ctrl.lookup import precompute

    with remove_on_error(folder.root, UserError) if new else nullcontext():
        trainer = Trainer(config, folder, context, layout)
    try:
        precompute(context)
        if not trainer.train(stopper):
            stopper.raise_if_interrupted()
    finally:
        trainer.stop()


def export_controller(folder: RunFolder) -> Checkpoint:
    """Copies the chosen checkpoint's controller to `controller/`, draws the learning curve; returns the checkpoint."""
    from ray_ctrl.plots import learning_curve

    chosen = select_checkpoint(folder.checkpoints())
    if chosen is None:
        raise UserError(f"run {folder.root} has no good checkpoint: resume it with --resume")
    with atomic_folder(folder.controller) as temporary:
        shutil.copytree(chosen.path / "controller", temporary, dirs_exist_ok=True)
    learning_curve(folder.metrics(), folder.root / "learning_curve.png")
    return chosen
