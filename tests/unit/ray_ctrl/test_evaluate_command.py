"""Whose controller, profile and budgets an evaluation goes by, what it shows, and what is left where it fails."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.budgets import BudgetDistribution
from envs.errors import UserError
from policies.controller import Controller
from ray_ctrl.commands import evaluate
from ray_ctrl.config import Config
from ray_ctrl.load_config import with_overrides
from ray_ctrl.run_folder import RunFolder, newest_run

OURS, ITS = "the evaluation's folder", "the run's folder"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with a controller."""
    folder = RunFolder.create(tmp_path / "run", Config())
    Controller(8, 8).save(folder.controller, {"config": Config().model_dump(mode="json")})
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Where budgets and profile table were asked of; nothing else is run."""
    found: list[str] = []

    def with_clock(folder: Path, table_folder: Path | None = None) -> None:
        found.extend(ITS if place == tmp_path / "run" else OURS for place in (folder, table_folder or folder))

    monkeypatch.setattr(evaluate, "open_setting", lambda config: SimpleNamespace(config=config, with_clock=with_clock))
    monkeypatch.setattr(evaluate, "load_controller", lambda *given: None)
    monkeypatch.setattr(evaluate, "evaluate_setting", lambda *given: None)
    monkeypatch.setattr("cluster.connect.connect", lambda *given, **more: nullcontext())
    return found


@pytest.mark.parametrize(
    ("overrides", "budgets", "table", "said"),
    [
        ([], ITS, ITS, ""),
        (["task.test_samples=9", "store.path=other.sqlite"], ITS, ITS, ""),
        (["latency.source=measured"], ITS, ITS, ""),
        (["budgets.low_factor=1.2"], OURS, ITS, ""),
        (["task.train_samples=9"], OURS, ITS, ""),
        (["model.threads=2"], OURS, ITS, ""),
        (["task.seed=1"], OURS, OURS, "the run's profile is not used, settings differ: task.seed"),
        (["latency.profile=given.json", "task.name=mine"], OURS, OURS, "settings differ: latency.profile, task.name"),
        (["latency.source=roofline"], OURS, OURS, ""),
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
    assert ("is not used" in out) == bool(said)


def test_a_controller_without_its_run_has_none(run: RunFolder, asked: list[str], tmp_path: Path) -> None:
    run.controller.rename(tmp_path / "export")
    evaluate.run(tmp_path / "export", [], tmp_path / "tables")
    assert asked == [OURS, OURS]


@pytest.mark.parametrize("error", [UserError("budgets too small"), KeyboardInterrupt()])
def test_a_folder_made_for_nothing_is_taken_away(
    run: RunFolder, asked: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(evaluate, "open_setting", lambda config: SimpleNamespace(config=config, with_clock=fail))
    before = sorted(run.root.iterdir())
    for overrides in ([], ["budgets.low_factor=1.2"]):
        with pytest.raises(type(error)):
            evaluate.run(run.root, overrides, None)
        assert sorted(run.root.iterdir()) == before


def test_what_was_made_stays_where_the_evaluation_itself_is_interrupted(
    run: RunFolder, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(setting: Any, folder: Path, out: Path) -> None:
        (out / "table.csv").write_text("rows")
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_setting", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(run.root, ["budgets.low_factor=1.2"], None)
    assert (run.root / "evaluation/table.csv").is_file()


def test_a_newer_run_without_a_controller_is_no_place_to_take_one_from(run: RunFolder) -> None:
    runs = run.root.parent
    newer = RunFolder.create(runs / "newer", Config())
    (newer.root / "checkpoints/iteration_000010").mkdir(parents=True)  # damaged
    assert newest_run(runs) == newer
    with pytest.warns(UserWarning, match="is left out"):
        assert evaluate.newest_controller(runs) == run.controller
    newer.save_checkpoint(20, 0.5, lambda aside: (aside / "controller").mkdir())
    with pytest.warns(UserWarning, match="is left out"):
        assert evaluate.newest_controller(runs) == newer.root / "checkpoints/iteration_000020/controller"
    with pytest.raises(UserError, match="no run with a controller"):
        evaluate.newest_controller(run.root)


def test_measuring_what_was_computed_is_a_change() -> None:
    stored = with_overrides(Config(), ["latency.source=roofline"])
    assert evaluate._changed(stored, with_overrides(stored, ["latency.source=measured"])) == ["latency.source"]
    assert evaluate._changed(stored, stored) == []


def test_only_the_controller_is_shown_other_budgets_than_it_is_judged_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: dict[Any, list[Any]] = {}

    def evaluate_contexts(algorithm: Any, contexts: list[Any], *, baseline: Any) -> list[Any]:
        asked[baseline] = contexts
        return []

    trained = BudgetDistribution.over(20.0, 60.0, bands=1)
    metadata = {"budgets": asdict(trained), "reference_ms": 50.0}
    world = SimpleNamespace(samples=["one"], clock=SimpleNamespace(reference_ms=50.0))
    setting: Any = SimpleNamespace(budgets=trained, build=lambda split: world)
    monkeypatch.setattr(evaluate, "load_controller", lambda *given: (None, metadata))
    monkeypatch.setattr(evaluate, "baselines", lambda *given: {"other": "baseline"})
    monkeypatch.setattr(evaluate, "write_report", lambda methods, out: {})
    monkeypatch.setattr(evaluate.Rollouts, "of", lambda name, rows: None)
    monkeypatch.setattr("policies.grpo.evaluation.evaluate_contexts", evaluate_contexts)
    monkeypatch.setattr("ray_ctrl.rllib_setup.build_evaluator", lambda *given: SimpleNamespace(stop=lambda: None))
    evaluate.evaluate_setting(setting, tmp_path, tmp_path / "out")
    low, middle, high = trained.held_out()
    assert asked == {
        None: [(0, low, 20.0), (0, middle, middle), (0, high, 60.0)],
        "baseline": [(0, low), (0, middle), (0, high)],
    }
    assert "69.0 ms is beyond the budgets trained for: the controller is shown 60.0 ms" in capsys.readouterr().out
