"""ASHA, driven by hand: trials that report, fail, end, and come back after an interruption."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from ray_ctrl.tune.search import Halving, scheduler
from ray_ctrl.tune.sweep import Sweep, make_sweep

METRIC = "validation/score"
SPACE = {"grpo.lr": {"log_uniform": [1e-4, 1e-2]}}


def sweep(scheduler: str, **keys: Any) -> Sweep:
    tree = {"preset": "smoke", "trials": 3, "space": SPACE, "scheduler": scheduler}
    return make_sweep(tree | {"set": {"run.iterations": 9, "evaluation.every": 1}} | keys, Path())


class Trials:
    """Tune's controller as schedulers see it, with trials that run and pause on request."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.search_alg = None
        self.trials: list[Any] = []
        self.moved: list[str] = []

    def add(self, name: str, status: str = Trial.RUNNING, result: dict[str, Any] | None = None) -> Any:
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=6), _latest_checkpoint_result=None)
        trial = Made(
            trial_id=name,
            status=status,
            experiment_tag=name,
            config={"grpo.lr": 0.001},
            last_result=result or {},
            checkpoint=f"checkpoint of {name}",
            run_metadata=SimpleNamespace(checkpoint_manager=manager),
            temporary_state=SimpleNamespace(saving_to=None),
        )
        self.trials.append(trial)
        self.scheduler.on_trial_add(self, trial)
        return trial

    def report(self, trial: Any, iteration: int, score: float) -> str:
        decision = self.scheduler.on_trial_result(self, trial, {"iteration": iteration, METRIC: score})
        if decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
        return str(decision)

    def get_trials(self) -> list[Any]:
        return self.trials

    def get_live_trials(self) -> list[Any]:
        # As Tune has it: one that failed for good still counts.
        return [trial for trial in self.trials if trial.status != Trial.TERMINATED]

    def pause_trial(self, trial: Any, should_checkpoint: bool) -> None:
        trial.status = Trial.PAUSED

    def _schedule_trial_save(self, trial: Any, result: Any) -> Any:
        return trial.checkpoint

    def next(self) -> str | None:
        chosen = self.scheduler.choose_trial_to_run(self)
        return chosen.trial_id if chosen else None


class Made(SimpleNamespace):
    """A trial."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    def set_status(self, status: str) -> None:
        self.status = status

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def origin(self) -> str | None:
        result = self.run_metadata.checkpoint_manager._latest_checkpoint_result
        return result.checkpoint if result else None


def test_halving_counts_what_was_reached_before_an_interruption(tmp_path: Path) -> None:
    known = tmp_path / "trials" / "old"
    known.mkdir(parents=True)
    rows = [{"iteration": 1, "reward": 0.0}, {"iteration": 2, METRIC: 0.8}]
    (known / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = sweep("asha", asha={"grace": 2, "reduction": 2})
    for place, decision in ((tmp_path / "empty", TrialScheduler.CONTINUE), (tmp_path, TrialScheduler.STOP)):
        made = scheduler(found, place)
        assert isinstance(made, Halving)
        trials = Trials(made)
        trials.add("old", result={"iteration": 2})
        assert trials.report(trials.add("new"), 2, 0.7) == decision
