"""Which trials are stopped early: Ray Tune's ASHA, with its memory restored after an interruption.

Tune saves no scheduler; after a restore the scores come from the trials' run folders.
"""

from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from ray_ctrl.run_folder import RunFolder
from ray_ctrl.tune.sweep import Sweep
from ray_ctrl.tune.trial import TRIALS

TIME = "iteration"


def scheduler(sweep: Sweep, root: Path) -> TrialScheduler:
    """Tune's scheduler of a sweep in folder `root`; time is counted in iterations."""
    file, last = sweep.file, sweep.base.run.iterations
    if file.scheduler == "none":
        return FIFOScheduler()
    grace = min(file.asha.grace, last)
    return Halving(
        root, file.metric, file.mode, time_attr=TIME, max_t=last, grace_period=grace,
        reduction_factor=file.asha.reduction,
    )  # fmt: skip


class Halving(AsyncHyperBandScheduler):
    """ASHA that also counts the scores from before an interruption."""

    def __init__(self, root: Path, metric: str, mode: str, **options: Any) -> None:
        super().__init__(metric=metric, mode=mode, **options)
        self.root, self.score = root, metric
        self.seen: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        place = self.root / TRIALS / trial.trial_id
        if trial.trial_id in self.seen or not place.is_dir():  # or added again after its process died
            return
        self.seen.add(trial.trial_id)
        reported = (trial.last_result or {}).get(TIME, 0)
        for row in RunFolder(place).metrics():
            if self.score in row and row[TIME] <= reported:
                # Only recorded: whether the trial was stopped there was decided then.
                self.on_trial_result(tune_controller, trial, row)
