"""One line per validation of a trial, and each trial's status as Ray Tune last reported it."""

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ray import tune

from ray_ctrl.console import console
from ray_ctrl.tune.sweep import Sweep

ENDED = ("TERMINATED", "ERROR")


class Progress(tune.Callback):
    """Prints a sweep's progress and forwards the user's request to stop.

    Args:
        stop_requested: whether the user wants the sweep to stop.
    """

    def __init__(self, sweep: Sweep, stop_requested: Callable[[], bool] = lambda: False) -> None:
        self.sweep = sweep
        self.stop_requested = stop_requested
        self.stop_sent = False
        self.best: float | None = None
        self.trials: list[Any] = []
        self.ended: set[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"trials": [], "ended": None, "stop_requested": None}

    def statuses(self) -> dict[str, str]:
        """Trial to Tune's status; an interrupted trial, which Tune counts as terminated, is UNFINISHED."""
        found = {trial.trial_id: str(trial.status) for trial in self.trials}
        ended = self.ended or set()
        return {name: "UNFINISHED" if was in ENDED and name not in ended else was for name, was in found.items()}

    def recall(self, scores: Iterable[float]) -> None:
        """Takes the scores from before a resume, so that "best so far" is about all of the sweep."""
        self.best = (max if self.sweep.file.mode == "max" else min)(scores, default=None)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._see(trials)
        if self.stop_requested() and not self.stop_sent:
            self.stop_sent = True
            # Ray Tune saves its state and exits on this signal; by now its handler is installed.
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._see(trials)

    def _see(self, trials: list[Any]) -> None:
        self.trials = list(trials)
        if self.ended is None:  # the first call: these ended before a resume
            self.ended = {trial.trial_id for trial in trials if str(trial.status) in ENDED}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        file, score = self.sweep.file, result.get(self.sweep.file.metric)
        if score is None or result["iteration"] <= (trial.last_result or {}).get("iteration", 0):  # reported before
            return
        better = self.best is None or (score > self.best if file.mode == "max" else score < self.best)
        self.best = score if better else self.best
        at = f"iteration {result['iteration']:>4}/{self.sweep.base.run.iterations}"
        self._print(trial, f"{at}  {file.metric} {score:+.4f}" + ("  best so far" if better else ""))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial)
        self._print(trial, f"ended  ({len(self.ended or ())} of {self.sweep.trials})")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._print(trial, f"died and continues from its last checkpoint: {cause(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial)
        self._print(trial, f"failed: {cause(trial)}")

    def _end(self, trial: Any) -> None:
        self.ended = (self.ended or set()) | {trial.trial_id}

    def _print(self, trial: Any, text: str) -> None:
        console.print(f"trial {trial.trial_id} {text}")


def cause(trial: Any) -> str:
    """The line of a trial's error file that names the exception."""
    file = getattr(trial, "error_file", None)
    try:
        text = Path(file).read_text("utf-8") if file else ""
    except OSError:
        text = ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "its process died silently")
