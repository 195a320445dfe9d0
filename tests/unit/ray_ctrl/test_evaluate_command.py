"""Which controller, profile and budgets an evaluation uses, its tables, and what is left if it fails."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from envs.budgets import BudgetDistribution
from envs.errors import UserError
from policies.controller import Controller
from ray_ctrl import controllers, report
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
    """The folders of budgets and profile; nothing else is run."""
    found: list[str] = []

    def with_profile(folder: Path, profile_folder: Path | None = None) -> None:
        found.extend(ITS if place == tmp_path / "run" else OURS for place in (folder, profile_folder or folder))

    monkeypatch.setattr(
        evaluate, "open_context", lambda config: SimpleNamespace(config=config, with_profile=with_profile)
    )
    monkeypatch.setattr(evaluate, "load_controller", lambda *given: None)
    monkeypatch.setattr(evaluate, "evaluate_context", lambda *given: None)
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
def test_a_runs_profile_is_used_as_long_as_it_applies(
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
def test_an_empty_folder_is_removed_after_an_error(
    run: RunFolder, asked: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(evaluate, "open_context", lambda config: SimpleNamespace(config=config, with_profile=fail))
    before = sorted(run.root.iterdir())
    for overrides in ([], ["budgets.low_factor=1.2"]):
        with pytest.raises(type(error)):
            evaluate.run(run.root, overrides, None)
        assert sorted(run.root.iterdir()) == before


def test_files_stay_if_the_evaluation_itself_is_interrupted(
    run: RunFolder, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(context: Any, folder: Path, out: Path) -> None:
        (out / "table.csv").write_text("rows")
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_context", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(run.root, ["budgets.low_factor=1.2"], None)
    assert (run.root / "evaluation/table.csv").is_file()


def test_a_newer_run_without_a_controller_is_no_place_to_take_one_from(run: RunFolder) -> None:
    runs = run.root.parent
    newer = RunFolder.create(runs / "newer", Config())
    (newer.root / "checkpoints/iteration_000010").mkdir(parents=True)  # damaged
    assert newest_run(runs) == newer
    with pytest.warns(UserWarning, match="is left out"):
        assert controllers.newest_controller(runs) == run.controller
    newer.save_checkpoint(20, 0.5, lambda place: (place / "controller").mkdir())
    with pytest.warns(UserWarning, match="is left out"):
        assert controllers.newest_controller(runs) == newer.root / "checkpoints/iteration_000020/controller"
    with pytest.raises(UserError, match="no run with a controller"):
        controllers.newest_controller(run.root)


def test_measuring_what_was_computed_is_a_change() -> None:
    stored = with_overrides(Config(), ["latency.source=roofline"])
    home, out = Path("run"), Path("out")
    measured = with_overrides(stored, ["latency.source=measured"])
    assert evaluate.profile_folders(stored, measured, home, out) == (out, out, ["latency.source"])
    assert evaluate.profile_folders(stored, stored, home, out) == (home, home, [])
    assert evaluate.profile_folders(stored, stored, None, out) == (out, out, [])


def test_only_the_controller_observes_clamped_budgets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: dict[Any, list[Any]] = {}

    def evaluate_contexts(algorithm: Any, contexts: list[Any], *, baseline: Any) -> list[Any]:
        asked[baseline] = contexts
        return []

    trained = BudgetDistribution.over(20.0, 60.0, bands=1)
    metadata = {"budgets": asdict(trained), "reference_ms": 50.0}
    resources = SimpleNamespace(samples=["one"], clock=SimpleNamespace(reference_ms=50.0))
    context: Any = SimpleNamespace(budgets=trained, build=lambda split: resources)
    monkeypatch.setattr(evaluate, "load_controller", lambda *given: (None, metadata))
    monkeypatch.setattr(evaluate, "baselines", lambda *given: {"other": "baseline"})
    monkeypatch.setattr(evaluate, "write_report", lambda rollouts, out: {})
    monkeypatch.setattr(evaluate, "with_predictions", lambda rollouts, resources: rollouts)
    monkeypatch.setattr(report, "rollouts", lambda name, rows: pd.DataFrame())
    monkeypatch.setattr("policies.grpo.evaluation.evaluate_contexts", evaluate_contexts)
    monkeypatch.setattr("ray_ctrl.rllib_setup.build_evaluator", lambda *given: SimpleNamespace(stop=lambda: None))
    evaluate.evaluate_context(context, tmp_path, tmp_path / "out")
    low, middle, high = trained.held_out()
    assert asked == {
        None: [(0, low, 20.0), (0, middle, middle), (0, high, 60.0)],
        "baseline": [(0, low), (0, middle), (0, high)],
    }
    assert "69.0 ms is outside the training range: the controller observes 60.0 ms" in capsys.readouterr().out


@pytest.fixture
def rollouts() -> pd.DataFrame:
    """Two samples under a budget that nothing can meet and one that everything meets, by two methods."""
    rows = [
        {
            "context": context, "sample": context // 2, "budget_ms": (10.0, 50.0)[context % 2], "accuracy": 0.5,
            "latency_ms": 20.0, "reward": 0.1, "avoidable": bool(context % 2), "tier": 1, "insertion": 2, "top_k": 5,
            "blocks": 13,
        }
        for context in range(4)
    ]  # fmt: skip
    return pd.concat([report.rollouts(name, rows) for name in ("controller", "full plan")], ignore_index=True)


def test_predictions_come_with_question_answer_reference_and_family(rollouts: pd.DataFrame) -> None:
    def outcomes(samples: list[Any], plans: list[Any]) -> list[str]:
        return [f"{sample.question} {plan}" for sample, plan in zip(samples, plans, strict=True)]

    samples = [SimpleNamespace(question=f"q{i}", family=f"f{i}", answers=("a", "b", "a")) for i in (0, 1)]
    space = SimpleNamespace(plan=lambda knobs: (knobs.tier, knobs.insertion, knobs.top_k, knobs.blocks))
    engine = SimpleNamespace(outcomes=outcomes, text=str.upper)
    found = evaluate.with_predictions(rollouts, SimpleNamespace(samples=samples, space=space, engine=engine))  # type: ignore[arg-type]
    last = found.iloc[-1]
    assert (last["question"], last["family"], last["reference"]) == ("q1", "f1", "a | b")
    assert last["answer"] == "Q1 ('MEDIUM', 2, 5, 13)"


def test_results_are_saved_before_they_are_printed(
    monkeypatch: pytest.MonkeyPatch, rollouts: pd.DataFrame, tmp_path: Path
) -> None:
    class Closed(Exception):
        pass

    def closed(*given: Any, **more: Any) -> None:
        raise Closed

    monkeypatch.setattr(evaluate.console, "print", closed)
    with pytest.raises(Closed):
        evaluate.write_report(rollouts.assign(family=None, question="q", answer="a", reference="a"), tmp_path)
    names = ("table.csv", "table.md", "rollouts.csv", "summary.json", "accuracy_over_budget.png")
    assert all((tmp_path / name).stat().st_size for name in names)


def test_tables_leave_out_budgets_that_no_plan_can_meet_and_say_so(
    rollouts: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = rollouts.assign(family=["digit", "digit", "match", "match"] * 2, question="q", answer="a", reference="a")
    summary = evaluate.write_report(named, tmp_path)
    out = capsys.readouterr().out
    assert "left out: 10.0 ms, which no plan can meet" in out
    assert "digit" in out
    assert summary["methods"]["controller"]["violations"] == 0.0  # of the budget that can be met
    assert [line["violations"] for line in summary["per_budget"]["controller"]] == [1.0, 0.0]
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == summary
    assert pd.read_csv(tmp_path / "table.csv")["budget_ms"].nunique() == 2
    assert len(pd.read_csv(tmp_path / "rollouts.csv")) == 8


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    run: RunFolder, asked: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        evaluate.run(run.root, [], tmp_path / "file" / "out")
    with pytest.raises(UserError, match="File name too long"):
        evaluate.run(run.root, [], tmp_path / ("x" * 300))
    assert asked == []
