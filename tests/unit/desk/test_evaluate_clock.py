"""Whose profile and budgets an evaluation goes by, and what is left where it fails."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.errors import UserError
from policies.controller import Controller
from ray_ctrl import evaluate
from ray_ctrl.config import Config
from ray_ctrl.runs import RunFolder
from ray_ctrl.settings import with_overrides

OURS, ITS = "the evaluation's folder", "the run's folder"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with a controller."""
    folder = RunFolder.create(tmp_path / "run", Config())
    Controller(8, 8).save(folder.controller, {"config": Config().model_dump(mode="json")})
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Where the clock's budgets and its table were asked of; nothing else is run."""
    found: list[str] = []

    def with_clock(folder: Path, tables: Path) -> None:
        found.extend(ITS if place == tmp_path / "run" else OURS for place in (folder, tables))

    setting = SimpleNamespace(with_clock=with_clock)
    monkeypatch.setattr(evaluate, "open_setting", lambda config: setting)
    monkeypatch.setattr(evaluate, "load_controller", lambda *given: None)
    monkeypatch.setattr(evaluate, "evaluate_setting", lambda *given: None)
    monkeypatch.setattr("cluster.connect.connect", lambda *given, **more: nullcontext())
    return found


@pytest.mark.parametrize(
    ("overrides", "budgets", "table", "said"),
    [
        ([], ITS, ITS, ""),
        (["task.test_samples=9", "store.path=other.sqlite"], ITS, ITS, ""),
        (["clock.kind=measured"], ITS, ITS, ""),
        (["budgets.low=1.2"], OURS, ITS, ""),
        (["task.train_samples=9"], OURS, ITS, ""),
        (["model.threads=2"], OURS, OURS, "the run's profile does not hold, model.threads being another"),
        (["task.seed=1", "model.encoder_seed=3"], OURS, OURS, "model.encoder_seed, task.seed being another"),
        (["clock.kind=roofline"], OURS, OURS, ""),
        (["clock.table=given.json"], OURS, OURS, ""),
    ],
)
def test_a_runs_profile_is_used_as_long_as_it_holds(
    run: RunFolder,
    asked: list[str],
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    budgets: str,
    table: str,
    said: str,
) -> None:
    evaluate.run(run.root, overrides, None)
    assert asked == [budgets, table]
    out = capsys.readouterr().out
    assert said in out
    assert ("profiling this device" in out) == bool(said)


def test_a_controller_without_its_run_has_the_device_profiled(
    run: RunFolder, asked: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run.controller.rename(tmp_path / "export")
    evaluate.run(tmp_path / "export", [], tmp_path / "tables")
    assert asked == [OURS, OURS]
    assert "there is no run folder around the controller" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UserError("budgets too small"), KeyboardInterrupt()])
def test_a_folder_made_for_nothing_is_taken_away(
    run: RunFolder, asked: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(evaluate, "evaluate_setting", fail)
    before = sorted(run.root.iterdir())
    for overrides in ([], ["budgets.low=1.2"]):
        with pytest.raises(type(error)):
            evaluate.run(run.root, overrides, None)
        assert sorted(run.root.iterdir()) == before


def test_a_newer_run_without_a_controller_is_no_place_to_take_one_from(run: RunFolder) -> None:
    from ray_ctrl.runs import newest_run

    runs = run.root.parent
    RunFolder.create(runs / "newer", Config())
    assert newest_run(runs).root == runs / "newer"
    assert newest_run(runs, trained=True).root == run.root
    (runs / "newer/checkpoints/iteration_000010").mkdir(parents=True)
    assert newest_run(runs, trained=True).root == runs / "newer"
    with pytest.raises(UserError, match="no run with a controller"):
        newest_run(run.root, trained=True)


def test_configurations_with_other_clocks_are_told_apart() -> None:
    stored = with_overrides(Config(), ["clock.kind=roofline"])
    assert evaluate._changed(stored, with_overrides(stored, ["clock.kind=measured"])) == ["clock.kind"]
    assert evaluate._changed(stored, stored) == []
