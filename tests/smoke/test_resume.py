"""A run that is killed or stopped and then resumed equals the one left alone."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import LIMIT_S, fine, finish, ray_ctrl, refused, snapshot, stable_metrics, start

CRASH = Path(__file__).with_name("crash.py")


def _same(run: Path, undisturbed: Path) -> None:
    assert stable_metrics(run) == stable_metrics(undisturbed)
    for name in ("controller/controller.safetensors", "evaluation/rollouts.csv"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.parametrize(("place", "call"), [("sampling", 4), ("update", 3), ("checkpoint", 2)])
def test_killed_and_resumed_equals_undisturbed(trained: Path, tmp_path: Path, place: str, call: int) -> None:
    run = tmp_path / "run"
    died = finish(start([place, str(call), "train", "-p", "smoke", "--run-dir", run], program=(CRASH,)))
    assert died.status == -signal.SIGKILL, died.err
    assert not (run / "controller").exists()
    done = fine("train", "--resume", "--run-dir", run)
    assert "resumed after iteration 2" in done.out
    _same(run, trained)


def test_killed_before_the_first_checkpoint_starts_over(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(start(["update", "1", "train", "-p", "smoke", "--run-dir", run], program=(CRASH,)))
    fine("train", "--resume", "--run-dir", run)
    _same(run, trained)


def test_damaged_checkpoint_falls_back_to_the_one_before(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for later in ("evaluation", "controller"):
        shutil.rmtree(run / later)
    weights = max((run / "checkpoints/iteration_000004").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-7])
    damaged = snapshot(run / "checkpoints/iteration_000002")
    done = fine("train", "--resume", "--run-dir", run)
    assert "warning: checkpoint" in done.err
    assert "iteration_000004 is left out" in done.err
    assert "resumed after iteration 2" in done.out
    assert stable_metrics(run) == stable_metrics(trained)
    assert snapshot(run / "checkpoints/iteration_000002") == damaged


def test_no_good_checkpoint_left(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for folder in (run / "checkpoints").glob("iteration_*"):
        (folder / "manifest.json").unlink()
    done = ray_ctrl("train", "--resume", "--run-dir", run)
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("error: every checkpoint")
    assert len(done.err.splitlines()) == 3  # a warning for each of the two, then the error


@pytest.mark.parametrize(
    "number",
    [signal.SIGHUP, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGTERM))],
)
def test_a_requested_stop_leaves_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = start(["train", "-p", "smoke", "run.iterations=2000", "--run-dir", run])
    deadline = time.monotonic() + LIMIT_S
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text("utf-8").count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    done = finish(process)
    assert done.status == 128 + number, done.err
    assert "continue with: ray-ctrl train --resume" in done.out
    last = max((run / "checkpoints").glob("iteration_*"))
    assert int(last.name.rpartition("_")[2]) == len(stable_metrics(run))


def test_a_second_signal_ends_the_run_immediately_while_runners_sample(tmp_path: Path) -> None:
    """The driver waits for them inside Ray, whose calls only a KeyboardInterrupt ends."""
    run = tmp_path / "run"
    process = start(["train", "-p", "smoke", "run.iterations=2000", "runners.count=1", "--run-dir", run])
    deadline = time.monotonic() + LIMIT_S
    while not (run / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    done = finish(process, 60)
    assert done.status in (130, 143), done.err  # two pending signals arrive in either order
    assert "Traceback" not in done.err
    assert "continue with: ray-ctrl train --resume" in done.out
    assert done.err.splitlines()[-1] == "interrupted"


def test_resuming_refuses_what_would_make_another_run(trained: Path) -> None:
    message = refused("train", "--resume", "--run-dir", trained, "grpo.lr=0.5")
    assert "grpo.lr cannot change" in message
