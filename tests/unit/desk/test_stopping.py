"""Signals: at once, or after what is under way; with the exit status of the signal and a word on going on."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ctrl import cli, train
from ray_ctrl.config import Config
from ray_ctrl.stopping import Interrupted, Stopper

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_interrupts_at_once_where_nothing_must_end_whole(number: signal.Signals) -> None:
    with Stopper() as stopper, pytest.raises(Interrupted) as told:
        os.kill(os.getpid(), number)
    assert told.value.exit_status == 128 + number
    assert not stopper.requested


@pytest.mark.parametrize("number", NUMBERS)
def test_where_it_must_the_first_is_answered_and_the_second_interrupts(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with Stopper() as stopper:
        with stopper.patient("finishing the page"):
            os.kill(os.getpid(), number)
            assert stopper.requested
            assert capfd.readouterr().err == "\nfinishing the page; once more to leave at once\n"
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as told:
            stopper.obey()
    assert told.value.exit_status == 128 + number


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with Stopper() as stopper:
        stopper.obey()
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_the_command_line_returns_the_signals_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Also through typer, which has an exit status of its own for some exceptions."""

    def interrupted(*given: Any, **more: Any) -> None:
        raise Interrupted(number)

    monkeypatch.setattr(train, "run", interrupted)
    assert cli.main(["train"]) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"


def test_the_command_line_returns_130_where_a_command_has_no_stopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", lambda *given, **more: signal.raise_signal(signal.SIGINT))
    assert cli.main(["train"]) == 130


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
    monkeypatch.setattr("ray_ctrl.setting.open_setting", lambda config: None)
    monkeypatch.setattr("cluster.connect.connect", lambda *given, **more: nullcontext())
    monkeypatch.setattr(train, "_begin", lambda *given: (folder, trainer))
    monkeypatch.setattr(train, "_run_ahead", ahead)
    monkeypatch.setattr(train, "export_best", lambda folder: SimpleNamespace(iteration=3))
    monkeypatch.setattr(train, "free_folder", lambda path: path)
    monkeypatch.setattr("ray_ctrl.evaluate.evaluate_setting", judging)
    layout: Any = SimpleNamespace(resources=None)
    if hint is None:
        assert train._train(Config(), layout, Path("RUN"), None) == 0
        assert "stopped" not in capsys.readouterr().out
        return
    with pytest.raises(Interrupted):
        train._train(Config(), layout, Path("RUN"), None)
    if loop is _signalled and last:
        hint = "the controller is ready; evaluate it with: ray-ctrl evaluate RUN"
    assert f"stopped; {hint}" in capsys.readouterr().out
