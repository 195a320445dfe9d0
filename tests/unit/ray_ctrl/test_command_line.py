"""Small parts of the desk: error exits, progress lines, contexts, resuming, folders."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.connect import ConnectError
from envs.budgets import BudgetDistribution
from envs.errors import UserError
from ray_ctrl import cli, console
from ray_ctrl.commands import evaluate, train
from ray_ctrl.config import Config
from ray_ctrl.load_config import load_config, with_overrides
from ray_ctrl.run_folder import RunFolder, free_folder


class _Wrapped(Exception):
    """As Ray wraps what a worker raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a long remote\ntraceback")
        self.cause = cause


@pytest.mark.parametrize(
    "error",
    [UserError("wrong\nvalue"), ConnectError("wrong value"), _Wrapped(UserError("wrong value"))],
)
def test_a_users_mistake_is_one_line_and_status_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert cli._guard(fail) == 2
    assert capsys.readouterr().err == "error: wrong value\n"


def test_a_programs_mistake_keeps_its_traceback() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli._guard(fail)


@pytest.mark.parametrize("task", ["textvqa=/a b/c", "2*textvqa + 1*okvqa=d: e", 'a "quoted" \\ path', "ü #1", "[1, 2]"])
def test_a_task_given_by_option_is_taken_as_it_stands(task: str) -> None:
    config = load_config(
        "smoke", None, cli._with_overrides({"overrides": ["run.seed=1"], "seed": 7, "task": task})["overrides"]
    )
    assert config.task.name == task
    assert config.run.seed == 7


def test_debug_shows_where_a_mistake_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_CTRL_DEBUG", "1")

    def fail() -> None:
        raise UserError("wrong value")

    assert cli._guard(fail) == 2
    assert "in fail" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "No such command"),
        (["train", "--nothing"], "No such option"),
        (["answer", "a.png", "what?", "--budget-ms", "soon"], "--budget-ms"),
        (["answer", "a.png", "what?"], "--budget-ms"),
        (["train", "--dry-run", "grpo.lrr=1"], "nearest valid key is 'grpo.lr'"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", "-p", "smoke", "--dry-run", "--seed", "5", "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "seed: 5" in out
    assert "4 groups of 4 = 16 rollouts" in out
    assert not (tmp_path / "run").exists()


def test_iteration_line_and_clock_time() -> None:
    row = {
        "iteration": 3,
        "reward": 0.25,
        "accuracy": 0.5,
        "latency_ms": 12.34,
        "violations": 0.05,
        "validation/score": 0.3,
        "time/iteration_s": 1.5,
    }
    line = console.iteration_line(row, 10, 75.0)
    for words in ("3/10", "reward +0.250", "12.3 ms", "5.0%", "validation score +0.300", "1:15 left"):
        assert words in line
    assert console.clock_time(3723) == "1:02:03"


def test_checkpoints_are_chosen_by_the_objective_with_the_error_of_samples() -> None:
    per_sample = [0.0, 1.0, 1.0, 0.0]
    rows = [{"reward": 2 * a} for a in per_sample for _ in range(train.VALIDATION_BUDGETS)]
    score, error = train.validation_score(rows)
    assert score == pytest.approx(1.0)
    assert error == pytest.approx(2 * np.std(per_sample, ddof=1) / 2)
    assert train.validation_score(rows[: train.VALIDATION_BUDGETS]) == (0.0, 0.0)


def test_validation_never_sees_a_held_out_budget() -> None:
    budgets = BudgetDistribution.over(10.0, 80.0)
    contexts = train.validation_contexts(5, budgets)
    assert len(contexts) == len(set(contexts)) == 5 * train.VALIDATION_BUDGETS
    for _, ms in contexts:
        assert 10.0 <= ms <= 80.0
        assert not any(low < ms < high for low, high in budgets.bands)


def test_resuming_takes_only_what_leaves_the_results_alone(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", load_config("smoke"))
    assert train.resumed_config(folder, []) == folder.config
    assert train.resumed_config(folder, ["run.iterations=9", "runners.count=1"]).run.iterations == 9
    with pytest.raises(UserError, match=r"run\.seed cannot change"):
        train.resumed_config(folder, ["run.seed=9"])


def test_free_folder(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "evaluation") == tmp_path / "evaluation"
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation-2").mkdir()
    assert free_folder(tmp_path / "evaluation") == tmp_path / "evaluation-3"


def test_finding_a_controller(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder or exported controller"):
        evaluate.find_controller(tmp_path / "none")
    run = RunFolder.create(tmp_path / "run", load_config("smoke"))
    with pytest.raises(UserError, match="no checkpoint yet"):
        evaluate.find_controller(run.root)
    run.save_checkpoint(2, 0.1, lambda aside: (aside / "controller").mkdir())
    assert evaluate.find_controller(run.root) == (run.root / "checkpoints/iteration_000002/controller", run.root)
    run.controller.mkdir()
    assert evaluate.find_controller(run.root) == (run.controller, run.root)


@pytest.mark.parametrize(
    ("changes", "ran"),
    [
        ({}, 6),
        ({"evaluation.lookup_samples": 5}, 0),
        ({"runners.count": 1}, 0),
        ({"latency.source": "measured"}, 0),
    ],
)
def test_all_plans_run_ahead_where_training_asks_for_no_others(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], ran: int
) -> None:
    asked: list[tuple[Any, Any]] = []

    def outcomes(samples: list[Any], plans: list[Any]) -> list[Any]:
        asked.extend(zip(samples, plans, strict=True))
        return plans

    space = SimpleNamespace(distinct=("dear", "cheap"), plan=lambda knobs: f"{knobs} plan")
    world = SimpleNamespace(samples=range(6), space=space, engine=SimpleNamespace(outcomes=outcomes))
    monkeypatch.setattr("ray_ctrl.commands.evaluate.LOOKUP_BATCH", 4)  # two samples a batch
    settings = {"task.train_samples": 6, "evaluation.lookup_samples": 6} | changes
    config = with_overrides(Config(), [f"{key}={value}" for key, value in settings.items()])
    train._run_ahead(config, SimpleNamespace(build=lambda split: world))
    assert asked == [(sample, f"{knobs} plan") for sample in range(ran) for knobs in ("dear", "cheap")]
