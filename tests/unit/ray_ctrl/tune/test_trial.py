"""What a trial does apart from training: ending before Tune's timeout, reporting, forwarding a stop."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.errors import UserError
from envs.files import atomic_write
from ray_ctrl.load_config import load_config
from ray_ctrl.run_folder import RunFolder, locked
from ray_ctrl.tune.summary import read_results, write_summary
from ray_ctrl.tune.sweep import Sweep, dump, make_sweep

METRIC = "validation/score"
SPACE = {"grpo.lr": {"log_uniform": [1e-4, 1e-1]}}


def sweep(**keys: Any) -> Sweep:
    return make_sweep({"preset": "smoke", "trials": 2, "space": SPACE} | keys, Path())


def run(root: Path, name: str, scores: dict[int, float], lr: float) -> RunFolder:
    """A trial's folder with a checkpoint for every score."""
    folder = RunFolder.create(root / "trials" / name, load_config("smoke", None, [f"grpo.lr={lr}"]))
    for iteration, score in scores.items():
        advance(folder, iteration, score)
    return folder


def advance(folder: RunFolder, iteration: int, score: float) -> None:
    def write(temporary: Path) -> None:
        (temporary / "controller").mkdir()
        (temporary / "controller" / "name").write_text(f"{folder.root.name} {iteration}", encoding="utf-8")

    folder.append_metrics({"iteration": iteration, METRIC: score, "reward": score})
    folder.save_checkpoint(iteration, score, write)


def named(folder: RunFolder) -> dict[int, str]:
    return {c.iteration: (c.path / "controller" / "name").read_text("utf-8") for c in folder.checkpoints()}


def test_the_summary_has_a_row_for_each_trial(tmp_path: Path) -> None:
    run(tmp_path, "a", {1: 0.1}, lr=0.01)
    run(tmp_path, "b", {1: 0.2}, lr=0.001)
    results = read_results(sweep(), tmp_path, {"a": "TERMINATED"})
    write_summary(sweep(), results, tmp_path, {"command": "test", "hardware": "none"})
    lines = (tmp_path / "summary.md").read_text("utf-8").splitlines()
    assert lines[2].startswith("| trial | score |")
    assert set(lines[3]) == {"|", "-"}
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| b", "| a"]
    assert lines[3].count("|") == lines[4].count("|")


def test_a_process_that_ends_a_trial_slowly_still_takes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune gives a stopped trial 2 s to end, then fails the trial that was to have its process."""
    from ray.train._internal import storage as storing
    from ray.tune.trainable.function_trainable import wrap_function

    from ray_ctrl.commands import train
    from ray_ctrl.tune import trial

    class Slow(SimpleNamespace):
        done = 0

        def step(self) -> dict[str, Any]:
            self.done += 1
            return {"iteration": self.done, METRIC: 0.5, "reward": 0.5}

        def stop(self) -> None:
            time.sleep(2.5)

    monkeypatch.delenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", raising=False)
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    monkeypatch.setattr(train, "Trainer", lambda *given: Slow())
    monkeypatch.setattr(trial, "open_context", lambda config: SimpleNamespace(with_profile=lambda place: None))
    found = sweep()
    monkeypatch.setattr(storing, "_get_ray_train_session_dir", lambda: str(tmp_path / "session"))
    storage = storing.StorageContext(storage_path=str(tmp_path), experiment_dir_name="tune", trial_dir_name="one")
    storage.storage_filesystem.create_dir(storage.experiment_fs_path)

    def function(config: dict[str, Any]) -> None:
        partial(trial.train_trial, sweep=found, root=str(tmp_path))(config)

    made = wrap_function(function)(config={"grpo.lr": 0.01}, storage=storage)
    try:
        assert made.train()[METRIC] == 0.5
        assert made.reset({"grpo.lr": 0.02}, storage=storage)
    finally:
        made.stop()
        os.environ.pop("TUNE_FUNCTION_THREAD_TIMEOUT_S", None)


def test_what_tune_may_have_missed_is_reported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iteration that was written down, but not reported before the interruption."""
    from ray_ctrl.commands import train
    from ray_ctrl.tune import trial

    folder = run(tmp_path, "me", {1: 0.1, 2: 0.2}, lr=0.01)
    folder.append_metrics({"iteration": 3, METRIC: 0.3, "reward": 0.3})

    def step() -> dict[str, Any]:
        trainer.done = 3
        return {"iteration": 3, METRIC: 0.4, "reward": 0.4}

    trainer = SimpleNamespace(done=2, step=step, stop=lambda: None)
    monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "1")
    monkeypatch.setattr(train, "Trainer", lambda *given: trainer)
    monkeypatch.setattr(trial, "open_context", lambda config: SimpleNamespace(with_profile=lambda place: None))
    monkeypatch.setattr(trial.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "me"))
    reported: list[int] = []
    monkeypatch.setattr(trial.tune, "report", lambda numbers, **more: reported.append(numbers["iteration"]))
    found = sweep(set={"run.iterations": 3})
    trial.train_trial({"grpo.lr": 0.01}, sweep=found, root=str(tmp_path))
    assert reported == [2, 3]


def test_a_trial_and_a_resumed_run_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_ctrl.commands.train import open_run
    from ray_ctrl.tune import trial

    folder = run(tmp_path, "me", {1: 0.1}, lr=0.01)
    (tmp_path / "trials" / "half").mkdir()
    (tmp_path / "trials" / "half" / "config.yaml").touch()
    tried: list[str] = []

    def train(folder: RunFolder, config: Any, found: Sweep) -> None:
        with pytest.raises(UserError, match="in use by another process"), open_run(folder.root, config, None, folder):  # type: ignore[arg-type]
            pass
        tried.append(folder.root.name)

    monkeypatch.setattr(trial, "_train", train)
    monkeypatch.setattr(trial, "LOCK_WAIT_S", 0.2)
    for name in ("me", "half"):
        monkeypatch.setattr(trial.tune, "get_context", lambda name=name: SimpleNamespace(get_trial_id=lambda: name))
        trial.train_trial({"grpo.lr": 0.01}, sweep=sweep(), root=str(tmp_path))
        with locked(tmp_path / "trials" / name), pytest.raises(UserError, match="in use by another process"):
            trial.train_trial({"grpo.lr": 0.01}, sweep=sweep(), root=str(tmp_path))
    assert tried == ["me", "half"]
    assert folder.metrics()


def test_an_interruption_before_tune_listens_is_passed_on_later() -> None:
    """SIGUSR1 would end the process as long as Tune has no handler for it."""
    from ray_ctrl.signals import Stopper
    from ray_ctrl.tune import _tune_signal_kept
    from ray_ctrl.tune.progress import Progress

    heard: list[int] = []
    # Tune leaves its handler behind in a process where a sweep has run.
    before = signal.getsignal(signal.SIGUSR1)
    with Stopper() as stopper, _tune_signal_kept(), stopper.defer_interrupt("trials stop"):
        progress = Progress(sweep(), lambda: stopper.requested)
        progress.on_step_begin(0, [])
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.requested
        signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
        progress.on_step_begin(1, [])
        progress.on_step_begin(2, [])
        assert heard == [signal.SIGUSR1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_best_so_far_is_that_of_all_of_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    from ray_ctrl.tune.progress import Progress

    for mode, score, better in (("max", 0.7, False), ("max", 0.9, True), ("min", 0.2, False), ("min", 0.0, True)):
        progress = Progress(sweep(mode=mode))
        progress.recall([0.8, 0.1])
        progress.on_trial_result(0, [], SimpleNamespace(trial_id="a", last_result={}), {"iteration": 1, METRIC: score})
        assert ("best so far" in capsys.readouterr().out) == better
    progress.recall([])
    assert progress.best is None


def test_an_ended_sweep_says_so_and_is_finished_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if the process died between the last trial and the export: statuses are there, the controller is not."""
    from ray_ctrl import tune

    run(tmp_path, "a", {1: 0.1}, lr=0.01)
    run(tmp_path, "b", {1: 0.2}, lr=0.001)
    atomic_write(tmp_path / "sweep.yaml", dump(sweep()))
    atomic_write(tmp_path / "statuses.json", json.dumps({"a": "TERMINATED", "b": "TERMINATED"}))
    for _ in range(2):
        tune.run(None, run_dir=tmp_path, resume=True)
        assert "all 2 trials of this sweep have ended" in capsys.readouterr().out
        assert (tmp_path / "controller" / "name").read_text("utf-8") == "b 1"
    assert json.loads((tmp_path / "statuses.json").read_text("utf-8")) == {"a": "TERMINATED", "b": "TERMINATED"}


def test_a_sweep_that_runs_or_exists_is_refused(tmp_path: Path) -> None:
    from ray_ctrl import tune

    run(tmp_path, "a", {1: 0.1}, lr=0.01)
    atomic_write(tmp_path / "sweep.yaml", dump(sweep(trials=1)))
    with locked(tmp_path), pytest.raises(UserError, match="is in use by another process"):
        tune.run(None, run_dir=tmp_path, resume=True)
    with pytest.raises(UserError, match="exists already"):
        tune.run("smoke", run_dir=tmp_path)


def test_results_of_a_sweep_are_saved_before_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_ctrl import tune

    def closed(*given: Any, **more: Any) -> None:
        raise BrokenPipeError

    run(tmp_path, "a", {1: 0.1}, lr=0.01)
    monkeypatch.setattr(tune.console, "print", closed)
    with pytest.raises(BrokenPipeError):
        tune.summarize(sweep(trials=1), tmp_path, {"a": "TERMINATED"})
    with pytest.raises(BrokenPipeError):
        tune.finish(sweep(trials=1), tmp_path, read_results(sweep(), tmp_path, {"a": "TERMINATED"}))
    for name in ("statuses.json", "summary.csv", "summary.md", "sweep.png", "controller/name"):
        assert (tmp_path / name).stat().st_size


def test_statuses_are_known_if_tune_had_nothing_left_to_run(tmp_path: Path) -> None:
    from ray_ctrl import tune
    from ray_ctrl.tune.progress import Progress

    progress = Progress(sweep())
    progress.on_experiment_end([SimpleNamespace(trial_id=name, status="TERMINATED") for name in "ab"])
    assert progress.statuses() == {"a": "TERMINATED", "b": "TERMINATED"}
    atomic_write(tmp_path / "statuses.json", json.dumps(progress.statuses()))
    tune.summarize(sweep(), tmp_path, {})
    assert tune.recorded(tmp_path) == progress.statuses()


def test_a_sweep_names_its_own_folder_nowhere(tmp_path: Path) -> None:
    """So that a folder that was moved or copied resumes with its own store and profile."""
    from ray_ctrl import tune

    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    prepared = tune.prepare(sweep(set={"latency.source": "roofline"}), old)
    text = dump(prepared)
    assert str(old) not in text
    assert tune.with_shared_store(prepared, new).base.store.path == str(new / "outcomes.sqlite")
