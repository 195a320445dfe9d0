"""Signals: at once, or after what is under way; with the exit status of the signal and a word on going on."""

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
from ray_ctrl.signals import Interrupted, Stopper

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def _status(work: Callable[[Stopper], None]) -> int:
    """Exit status of what interrupts `work`."""

    def inside() -> None:
        with Stopper() as stopper:
            work(stopper)

    with pytest.raises(Interrupted) as told:
        inside()
    return told.value.exit_status


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_interrupts_at_once_where_nothing_must_end_whole(number: signal.Signals) -> None:
    def work(stopper: Stopper) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("the signal was not heard")

    assert _status(work) == 128 + number


@pytest.mark.parametrize("number", NUMBERS)
def test_where_it_must_the_first_is_answered_and_the_second_interrupts(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(stopper: Stopper) -> None:
        with stopper.patient("finishing the page"):
            os.kill(os.getpid(), number)
            assert stopper.requested
            assert capfd.readouterr().err == "\nfinishing the page; once more to leave at once\n"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        stopper.obey()

    assert _status(work) == 128 + number


def test_an_answer_that_nobody_can_read_does_not_fail_what_is_under_way() -> None:
    """Ctrl-C ends a `tee` in the same pipeline as well."""
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(2)
    try:
        os.dup2(writer, 2)
        with Stopper() as stopper, stopper.patient("finishing the page"):
            os.kill(os.getpid(), signal.SIGINT)
            assert stopper.requested
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with Stopper() as stopper:
        stopper.obey()
    assert [signal.getsignal(number) for number in NUMBERS] == before


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
    ("ahead", "loop", "judging", "hint"),
    [
        (_signalled, _nothing, _nothing, "go on with: ray-ctrl train --resume --run-dir RUN"),
        (_nothing, _signalled, _nothing, "go on with: ray-ctrl train --resume --run-dir RUN"),
        (_nothing, _nothing, _signalled, "the controller is ready; evaluate it with: ray-ctrl evaluate RUN"),
        (_nothing, _nothing, _nothing, None),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_wherever_training_is_interrupted_it_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ahead: Callable[..., None],
    loop: Callable[..., None],
    judging: Callable[..., None],
    hint: str | None,
    last: bool,
) -> None:
    """`last`: whether a signal in the loop finds its last iteration under way."""
    folder = SimpleNamespace(root=Path("RUN"), controller=Path("RUN/controller"))

    def loop_patiently(stopper: Stopper) -> bool:
        with stopper.patient("finishing the iteration"):
            loop()
        return last or not stopper.requested

    trainer = SimpleNamespace(setting=None, train=loop_patiently, stop=lambda: None)
    monkeypatch.setattr("ray_ctrl.run_context.open_setting", lambda config: None)
    monkeypatch.setattr("cluster.connect.connect", lambda *given, **more: nullcontext())
    monkeypatch.setattr(train, "_begin", lambda *given: (folder, trainer))
    monkeypatch.setattr(train, "_run_ahead", ahead)
    monkeypatch.setattr(train, "export_controller", lambda folder: SimpleNamespace(iteration=3))
    monkeypatch.setattr(train, "free_folder", lambda path: path)
    monkeypatch.setattr("ray_ctrl.commands.evaluate.evaluate_setting", judging)
    layout: Any = SimpleNamespace(resources=None)
    if hint is None:
        train._train(Config(), layout, Path("RUN"), None)
        assert "stopped" not in capsys.readouterr().out
        return
    with pytest.raises(Interrupted):
        train._train(Config(), layout, Path("RUN"), None)
    if loop is _signalled and last:
        hint = "the controller is ready; evaluate it with: ray-ctrl evaluate RUN"
    assert f"stopped; {hint}" in capsys.readouterr().out


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
    """One that is resumed stays whatever happens."""

    def fail(*given: Any) -> Any:
        raise error

    monkeypatch.setattr(train, "Trainer", fail)
    setting = SimpleNamespace(with_clock=(lambda folder: setting) if profiled else fail)
    root = tmp_path / "run"
    folder = RunFolder.create(root, Config()) if resumed else None
    layout: Any = None
    with pytest.raises(type(error)):
        train._begin(Config(), layout, root, folder, setting)
    assert root.exists() == (stays or resumed)
    assert ("go on with" in capsys.readouterr().out) == hint
