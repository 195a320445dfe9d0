"""Signals: immediate, or deferred; with the exit status of the signal and a hint on how to continue."""

import os
import pickle
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.errors import UserError
from ray_ctrl import cli
from ray_ctrl.commands import evaluate, train
from ray_ctrl.config import Config
from ray_ctrl.run_folder import RunFolder
from ray_ctrl.signals import Interrupted, Stopper, hint_on_interrupt

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _status(work: Callable[[Stopper], None]) -> int:
    """Exit status of what interrupts `work`."""

    def inside() -> None:
        with Stopper() as stopper:
            work(stopper)

    with pytest.raises(Interrupted) as caught:
        inside()
    return caught.value.exit_status


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_interrupts_immediately_by_default(number: signal.Signals) -> None:
    def work(stopper: Stopper) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("the signal was not heard")

    assert _status(work) == 128 + number


@pytest.mark.parametrize("number", NUMBERS)
def test_a_deferred_signal_is_answered_and_the_second_interrupts(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(stopper: Stopper) -> None:
        with stopper.defer_interrupt("finishing the page"):
            os.kill(os.getpid(), number)
            assert stopper.requested
            assert capfd.readouterr().err == "\nfinishing the page; once more to leave immediately\n"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        stopper.raise_if_interrupted()

    assert _status(work) == 128 + number


def test_an_answer_that_nobody_can_read_fails_nothing() -> None:
    """Ctrl-C ends a `tee` in the same pipeline as well."""
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(2)
    try:
        os.dup2(writer, 2)
        with Stopper() as stopper, stopper.defer_interrupt("finishing the page"):
            os.kill(os.getpid(), signal.SIGINT)
            assert stopper.requested
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with Stopper() as stopper:
        stopper.raise_if_interrupted()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper() as stopper:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopper.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruption_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM))).exit_status == 143


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_every_command_returns_the_signals_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, command: str
) -> None:
    """Also through typer, which has an exit status of its own for a KeyboardInterrupt."""
    for module in (train, evaluate):
        monkeypatch.setattr(module, "run", lambda *given, **more: signal.raise_signal(number))
    assert cli.main([command, "somewhere"]) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"


def _nothing(*given: Any) -> None:
    """Runs to its end."""


def _signalled(*given: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("ahead", "loop", "evaluation", "hint"),
    [
        (_signalled, _nothing, _nothing, "continue with: ray-ctrl train --resume --run-dir RUN"),
        (_nothing, _signalled, _nothing, "continue with: ray-ctrl train --resume --run-dir RUN"),
        (_nothing, _nothing, _signalled, "the controller is ready; evaluate it with: ray-ctrl evaluate RUN"),
        (_nothing, _nothing, _nothing, None),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_wherever_training_is_interrupted_it_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ahead: Callable[..., None],
    loop: Callable[..., None],
    evaluation: Callable[..., None],
    hint: str | None,
    last: bool,
    tmp_path: Path,
) -> None:
    """`last`: whether a signal in the loop finds its last iteration in progress."""
    folder = SimpleNamespace(root=tmp_path, controller=tmp_path / "controller")
    context = SimpleNamespace(budgets=SimpleNamespace(high_ms=80.0))
    hint = hint and hint.replace("RUN", str(tmp_path))

    def train_loop(stopper: Stopper) -> bool:
        with stopper.defer_interrupt("finishing the iteration"):
            loop()
        return last or not stopper.requested

    trainer = SimpleNamespace(train=train_loop, stop=lambda: None)
    monkeypatch.setattr("ray_ctrl.run_context.open_context", lambda config: None)
    monkeypatch.setattr("cluster.connect.connect", lambda *given, **more: nullcontext())
    monkeypatch.setattr(train, "open_run", lambda *given: nullcontext((folder, context)))
    monkeypatch.setattr(train, "Trainer", lambda *given: trainer)
    monkeypatch.setattr("ray_ctrl.lookup.precompute", ahead)
    monkeypatch.setattr(train, "export_controller", lambda folder: SimpleNamespace(iteration=3))
    monkeypatch.setattr("ray_ctrl.commands.evaluate.evaluate_context", evaluation)
    monkeypatch.setattr("ray_ctrl.model_card.describe_export", lambda *given: None)
    (tmp_path / "config.yaml").touch()
    layout: Any = SimpleNamespace(resources=None)
    if hint is None:
        train._train(Config(), layout, tmp_path, None)
        out = capsys.readouterr().out
        assert "stopped" not in out
        assert f"next: ray-ctrl answer IMAGE QUESTION --budget-ms 80 --controller {tmp_path}" in out.replace("\n", "")
        return
    with pytest.raises(Interrupted):
        train._train(Config(), layout, tmp_path, None)
    if loop is _signalled and last:
        hint = f"the controller is ready; evaluate it with: ray-ctrl evaluate {tmp_path}"
    assert f"stopped; {hint}" in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("profiled", "error", "stays", "hint"),
    [
        (False, KeyboardInterrupt(), False, False),
        (False, UserError("impossible budgets"), False, False),
        (True, KeyboardInterrupt(), True, True),
        (True, UserError("impossible settings"), False, False),
    ],
)
def test_a_new_run_folder_stays_once_the_device_is_profiled(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    profiled: bool,
    error: BaseException,
    stays: bool,
    hint: bool,
    resumed: bool,
) -> None:
    """A resumed one stays whatever happens."""

    def fail(*given: Any) -> Any:
        raise error

    monkeypatch.setattr(train, "Trainer", fail)
    context: Any = SimpleNamespace(with_profile=(lambda folder: context) if profiled else fail)
    root = tmp_path / "run"
    folder = RunFolder.create(root, Config()) if resumed else None
    layout: Any = None

    def begin() -> None:
        with train.open_run(root, Config(), context, folder) as (opened, known), hint_on_interrupt("continue"):
            train.train(Config(), layout, opened, known, Stopper(), new=not resumed)

    with pytest.raises(type(error)):
        begin()
    assert root.exists() == (stays or resumed)
    assert ("stopped; continue" in capsys.readouterr().out) == hint
