"""Who is stopped early or changed in the middle of a sweep: Ray Tune's ASHA and PBT, made to survive an interruption.

Tune saves no scheduler: after a restore it begins without a memory. Both classes here get it back from the trials.
"""

from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from ray_ctrl.run_folder import RunFolder
from ray_ctrl.tune.search import domain
from ray_ctrl.tune.sweep import Range, Sweep
from ray_ctrl.tune.trial import TRIALS

TIME = "iteration"


def scheduler(sweep: Sweep, root: Path) -> TrialScheduler:
    """Tune's scheduler of a sweep in folder `root`; time is counted in iterations."""
    file, last = sweep.file, sweep.base.run.iterations
    if file.scheduler == "asha":
        return Halving(
            root,
            time_attr=TIME,
            max_t=last,
            grace_period=min(file.asha.grace, last),
            reduction_factor=file.asha.reduction,
            metric=file.metric,
            mode=file.mode,
        )
    if file.scheduler == "pbt":
        return Population(
            last,
            time_attr=TIME,
            metric=file.metric,
            mode=file.mode,
            perturbation_interval=file.pbt.every,
            quantile_fraction=file.pbt.quantile,
            resample_probability=file.pbt.resample,
            hyperparam_mutations={
                item.key: domain(item) if item.is_range else list(item.values) for item in sweep.space
            },
            custom_explore_fn=Clipped(sweep.space),
            log_config=False,
            synch=True,
        )
    return FIFOScheduler()


class Halving(AsyncHyperBandScheduler):
    """ASHA that counts what trials reached before an interruption when it judges those after it."""

    def __init__(self, root: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._root = root

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        known = trial.trial_id in self._trial_info  # added again after its process died
        super().on_trial_add(tune_controller, trial)
        place = self._root / TRIALS / trial.trial_id
        if known or not place.is_dir():
            return
        told = (trial.last_result or {}).get(TIME, 0)
        for row in RunFolder(place).metrics():
            if self._metric in row and row[TIME] <= told:
                # Only remembered: whether the trial was stopped there was decided then.
                self._trial_info[trial.trial_id].on_result(trial, row[TIME], self._metric_op * row[self._metric])


class Population(PopulationBasedTraining):
    """PBT in step: trials wait for each other at every comparison, so all are judged after the same iterations.

    Out of step, as is Tune's default, a trial that is already ahead removes the checkpoint that another was told to go
    on from before that one's process has started, and the sweep loses the trial.
    """

    def __init__(self, last: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._last = last

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial in self._trial_state:  # added again after its process died: what it reached before still counts
            return
        super().on_trial_add(tune_controller, trial)
        reached = trial.last_result or {}
        if trial.is_finished() or TIME not in reached or self._metric not in reached:
            return
        # Restored. Paused rather than pending, so that it starts only when it is its turn in the step.
        trial.set_status(Trial.PAUSED)
        state = self._trial_state[trial]
        state.last_train_time = state.last_perturbation_time = (
            reached[TIME] - reached[TIME] % self._perturbation_interval
        )
        self._save_trial_state(state, state.last_train_time, reached, trial)
        self._next_perturbation_sync = self._perturbation_interval + min(
            state.last_train_time for other, state in self._trial_state.items() if not other.is_finished()
        )

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        time = result.get(TIME)
        # At the end there is nothing left to go on with: a change would only be written down, never trained.
        if time is None or time % self._perturbation_interval or time >= self._last:
            return TrialScheduler.CONTINUE
        self._excuse_finished()
        return super().on_trial_result(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        self._excuse_finished()
        chosen = super().choose_trial_to_run(tune_controller)
        if chosen is not None:
            return chosen
        left = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if left and all(trial.status == Trial.PAUSED for trial in left):
            # They wait for one that failed for good, and no result will come to end that: without a comparison, go on.
            self._next_perturbation_sync += self._perturbation_interval
            return super().choose_trial_to_run(tune_controller)
        return None

    def _excuse_finished(self) -> None:
        """Nobody waits for a trial that has ended; Tune itself would wait for ever for one that ended in an error."""
        for trial, state in self._trial_state.items():
            if trial.is_finished():
                state.last_train_time = max(state.last_train_time, self._next_perturbation_sync)


class Clipped:
    """PBT multiplies numbers freely; this moves them back into their ranges. Picklable, as Tune stores it."""

    def __init__(self, space: tuple[Range, ...]) -> None:
        self.space = space

    def __call__(self, chosen: dict[str, Any]) -> dict[str, Any]:
        return {**chosen, **{item.key: item.clipped(chosen[item.key]) for item in self.space if item.key in chosen}}
