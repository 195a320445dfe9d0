"""One line per trial's validation, and each trial's status as Ray Tune last saw it."""

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ray import tune

from envs.files import write_json
from ray_ctrl.console import console
from ray_ctrl.tune.sweep import Sweep

DONE = ("TERMINATED", "ERROR")


class Progress(tune.Callback):
    """What the user sees of a sweep while it runs; passes on the wish to stop.

    Args:
        asked: whether the user wants the sweep to stop.
    """

    def __init__(self, sweep: Sweep, root: Path, asked: Callable[[], bool] = lambda: False) -> None:
        self.sweep = sweep
        self.root = root
        self.asked = asked
        self.stopping = False
        self.best: float | None = None
        self.trials: list[Any] = []
        self.ended: set[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"trials": [], "ended": None, "asked": None}

    def statuses(self) -> dict[str, str]:
        """Trial to Tune's word for its state; an interrupted trial, which Tune counts as terminated, is UNFINISHED."""
        ended = self.ended or set()
        return {
            trial.trial_id: "UNFINISHED"
            if str(trial.status) in DONE and trial.trial_id not in ended
            else str(trial.status)
            for trial in self.trials
        }

    def recall(self, scores: Iterable[float]) -> None:
        """Takes up what a resumed sweep reached before, so that "best so far" means the whole of it."""
        self.best = (max if self.sweep.file.mode == "max" else min)(scores, default=None)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = list(trials)
        if self.ended is None:  # a resumed sweep begins with those that ended before
            self.ended = {trial.trial_id for trial in trials if str(trial.status) in DONE}
        if self.asked() and not self.stopping:
            self.stopping = True
            # Ray Tune saves its state and leaves on this signal; by now its handler is there.
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if self.ended is None:  # nothing was left to run
            self.trials = list(trials)
            self.ended = {trial.trial_id for trial in trials if str(trial.status) in DONE}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.trials = list(trials)
        file = self.sweep.file
        score = result.get(file.metric)
        if score is None or result["iteration"] <= (trial.last_result or {}).get("iteration", 0):  # or told again
            return
        better = self.best is None or (score > self.best if file.mode == "max" else score < self.best)
        self.best = score if better else self.best
        total = self.sweep.base.run.iterations
        line = f"{self._name(trial)} iteration {result['iteration']:>4}/{total}  {file.metric} {score:+.4f}"
        console.print(line + ("  best so far" if better else ""), markup=False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.trials = list(trials)
        self._end(trial)
        console.print(f"{self._name(trial)} ended  ({len(self.ended or ())} of {self.sweep.trials})", markup=False)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        console.print(f"{self._name(trial)} died and goes on from its last checkpoint: {cause(trial)}", markup=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.trials = list(trials)
        self._end(trial)
        console.print(f"{self._name(trial)} failed: {cause(trial)}", markup=False)
        write_json(self.root / f"failed-{trial.trial_id}.json", {"trial": trial.trial_id, "cause": cause(trial)})

    def _end(self, trial: Any) -> None:
        self.ended = (self.ended or set()) | {trial.trial_id}

    def _name(self, trial: Any) -> str:
        return f"trial {trial.trial_id}"


def cause(trial: Any) -> str:
    """The line of a trial's error that names the exception."""
    file = getattr(trial, "error_file", None)
    try:
        text = Path(file).read_text("utf-8") if file else ""
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "its process died without a word"
