"""ASHA and PBT, driven by hand: trials that report, fail, end, and come back after an interruption."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from ray_ctrl.tune.schedulers import Halving, Population, scheduler
from ray_ctrl.tune.sweep import Sweep, make_sweep

METRIC = "validation/score"
SPACE = {"grpo.lr": {"log_uniform": [1e-4, 1e-2]}}


def sweep(scheduler: str, **keys: Any) -> Sweep:
    tree = {"preset": "smoke", "trials": 3, "space": SPACE, "scheduler": scheduler}
    return make_sweep(tree | {"set": {"run.iterations": 9, "evaluation.every": 1}} | keys, Path())


class Trials:
    """Tune's controller as schedulers see it, holding trials that run and pause as they are told."""

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


def population(**keys: Any) -> Trials:
    made = scheduler(sweep("pbt", pbt={"every": 2, "quantile": 0.34}, **keys), Path())
    assert isinstance(made, Population)
    return Trials(made)


def test_a_population_is_compared_after_the_same_iterations() -> None:
    trials = population()
    a, b, c = (trials.add(name) for name in "abc")
    assert trials.report(a, 1, 0.9) == TrialScheduler.CONTINUE
    assert trials.report(a, 2, 0.3) == TrialScheduler.PAUSE
    assert trials.report(b, 2, 0.1) == TrialScheduler.PAUSE
    assert trials.next() is None, "somebody ran ahead of the comparison"
    trials.report(c, 2, 0.2)
    assert (a.origin(), b.origin(), c.origin()) == (None, "checkpoint of a", None)
    assert trials.next() is not None


def test_the_last_iteration_changes_nothing() -> None:
    trials = population()
    a, b = trials.add("a"), trials.add("b")
    for trial, score in ((a, 0.1), (b, 0.9)):
        assert trials.report(trial, 9, score) == TrialScheduler.CONTINUE
    assert (a.origin(), a.status, b.status) == (None, Trial.RUNNING, Trial.RUNNING)


def test_a_population_does_not_wait_for_a_trial_that_failed() -> None:
    trials = population()
    a, b, c = (trials.add(name) for name in "abc")
    c.status = Trial.ERROR
    trials.report(a, 2, 0.1)
    trials.report(b, 2, 0.2)
    assert a.origin() == "checkpoint of b"
    # It fails while all others wait for it: nobody is left to report.
    trials = population()
    a, b, c = (trials.add(name) for name in "abc")
    trials.report(a, 2, 0.1)
    trials.report(b, 2, 0.2)
    assert trials.next() is None
    c.status = Trial.ERROR
    assert trials.next() == "a"


def test_a_restored_population_falls_into_step() -> None:
    trials = population()
    ahead = trials.add("ahead", Trial.PENDING, {"iteration": 4, METRIC: 0.2})
    behind = trials.add("behind", Trial.PENDING, {"iteration": 3, METRIC: 0.5})
    done = trials.add("done", Trial.TERMINATED, {"iteration": 9, METRIC: 0.9})
    assert (ahead.status, behind.status, done.status) == (Trial.PAUSED, Trial.PAUSED, Trial.TERMINATED)
    assert trials.next() == "behind"
    behind.status = Trial.RUNNING
    assert trials.next() is None
    assert trials.report(behind, 4, 0.1) == TrialScheduler.NOOP  # paused to go on from the other
    assert behind.origin() == "checkpoint of ahead"
    assert trials.next() is not None


def test_a_trial_whose_process_died_keeps_its_place() -> None:
    trials = population()
    a, b = trials.add("a"), trials.add("b")
    trials.report(a, 2, 0.1)
    trials.report(b, 2, 0.2)
    b.status = Trial.PENDING
    trials.scheduler.on_trial_add(trials, b)
    assert b.status == Trial.PENDING
    assert trials.scheduler._trial_state[b].last_train_time == 2


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
