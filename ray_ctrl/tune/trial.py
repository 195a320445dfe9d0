"""One trial: an ordinary run in a run folder of its own, which reports its validation metric to Ray Tune.

A trial whose process died, or whose sweep was interrupted, continues from the run folder's last good checkpoint, as
`ray-ctrl train --resume` does.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from envs.files import atomic_write
from envs.latency import LatencyProfile, ProfiledClock
from ray_ctrl.config import Config
from ray_ctrl.load_config import to_yaml
from ray_ctrl.run_context import BUDGETS_FILE, PROFILE_FILE, open_context
from ray_ctrl.run_folder import LOCK, RunFolder, locked

TRIALS = "trials"
# Tune reuses a trial's process for the next trial and gives the previous one 2 s to end. On a busy machine, or with
# runners to stop, that is too short, and Tune then fails the next trial without a retry.
END_TIMEOUT_S = 600
LOCK_WAIT_S = 60.0
"""How long a restarted trial waits for its folder, which a process that is ending may still have."""


def train_trial(chosen: Mapping[str, Any], *, sweep: Any, root: str) -> None:
    """Runs inside a trial's process.

    Args:
        chosen: dotted key to value.
        sweep: the `Sweep`.
        root: the sweep's folder, reachable from all nodes.

    Raises:
        UserError: another process, such as `ray-ctrl train --resume`, writes to the trial's folder.
    """
    from cluster.connect import silence_ray_warnings

    silence_ray_warnings()
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(END_TIMEOUT_S))
    trial = tune.get_context().get_trial_id()
    place = Path(root) / TRIALS / trial
    place.mkdir(parents=True, exist_ok=True)
    with locked(place, LOCK_WAIT_S):
        config = sweep.config(chosen)
        folder = open_folder(Path(root), trial, config, share=sweep.shares_budgets)
        _train(folder, config, sweep)


def _train(folder: RunFolder, config: Config, sweep: Any) -> None:
    """The iterations that are left, each reported."""
    from ray_ctrl.commands.train import Trainer
    from ray_ctrl.preflight import plan_layout

    if folder.config != config:  # the resumed sweep changed it
        atomic_write(folder.root / "config.yaml", to_yaml(config))
    context = open_context(config)
    if (profile := folder.root.parents[1] / PROFILE_FILE).is_file() and sweep.shares_budgets:
        # All trials use one profile: a node that it is not valid for is refused, not profiled again.
        ProfiledClock.for_engine(LatencyProfile.load(profile), context.engine)
    trainer = Trainer(config, folder, context.with_profile(folder.root), plan_layout(config))
    try:
        # Tune may not have received the last iteration before a crash or an interruption; twice does no harm.
        row = next((found for found in folder.metrics() if found["iteration"] == trainer.done), {})
        if sweep.file.metric in row:
            report(row, sweep.file.metric)
        while trainer.done < config.run.iterations:
            row = trainer.step()
            if sweep.file.metric in row:
                report(row, sweep.file.metric)
    finally:
        trainer.stop()


def open_folder(root: Path, trial: str, config: Config, *, share: bool) -> RunFolder:
    """The trial's run folder, created if it is missing; with `share` it copies the sweep's profile and budgets."""
    place = root / TRIALS / trial
    if (place / "run.json").is_file():
        found = RunFolder.open(place)
        found.check_importance()
        return found
    # Left by a process that died before the folder was complete.
    for path in place.iterdir() if place.is_dir() else ():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = RunFolder.create(place, config)
    if share:
        for name in (PROFILE_FILE, BUDGETS_FILE):
            if (root / name).is_file():
                shutil.copyfile(root / name, place / name)
    return folder


def report(row: Mapping[str, Any], metric: str) -> None:
    """Reports the metric of an iteration to Tune."""
    tune.report({"iteration": row["iteration"], metric: row[metric], "reward": row["reward"]})
