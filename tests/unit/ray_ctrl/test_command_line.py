"""Small parts of the command line: error exits, progress lines, contexts, resuming, folders."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.connect import ConnectError
from envs.budgets import BudgetDistribution
from envs.errors import UserError
from ray_ctrl import cli, console, controllers, exits, lookup, pipeline, trainer
from ray_ctrl.commands import evaluate, inspect, train
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

    assert exits.guard(fail) == 2
    assert capsys.readouterr().err == "error: wrong value\n"


def test_a_programs_mistake_keeps_its_traceback() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exits.guard(fail)


def test_the_home_in_a_paths_option_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = cli._with_overrides({"run_dir": Path("~/runs/a"), "out": Path("b"), "question": "~/x"})
    assert given == {"run_dir": tmp_path / "runs" / "a", "out": Path("b"), "question": "~/x"}
    with pytest.raises(UserError, match="~nobody-here is no home"):
        cli._with_overrides({"out": Path("~nobody-here/x")})


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

    assert exits.guard(fail) == 2
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


def test_the_iteration_line_leads_with_validation() -> None:
    row = {"iteration": 3, "accuracy": 0.5, "latency_ms": 12.34, "violations": 0.05, "time/iteration_s": 1.5}
    sampled = "training: accuracy 0.500, violations 5.0%  12.3 ms  1.5 s, 1:15 left"
    assert console.iteration_line(row, 10, 75.0) == f"iteration    3/10  {sampled}"
    row |= {"validation/accuracy": 0.625, "validation/violations": 0.01}
    best = "validation: accuracy 0.625, violations 1.0%"
    assert console.iteration_line(row, 10, 75.0) == f"iteration    3/10  {best}  {sampled}"
    assert console.clock_time(3723) == "1:02:03"


@pytest.mark.parametrize(("total", "lines"), [(20, 20), (240, 25)])
def test_a_long_run_prints_its_validations_and_a_short_one_each_iteration(total: int, lines: int) -> None:
    config = with_overrides(Config(), [f"run.iterations={total}", "evaluation.every=10"])
    loop: Any = SimpleNamespace(config=config, printed=-np.inf, done=0)
    loop._validates = lambda: trainer.Trainer._validates(loop)
    printed = []
    for loop.done in range(1, total + 1):
        if trainer.Trainer._prints(loop):
            printed.append(loop.done)
    assert len(printed) == lines  # of 240 the first, and 24 validations
    assert printed[0] == 1
    assert printed[-1] == total


def test_output_that_nobody_reads_costs_nothing(tmp_path: Path) -> None:
    """`| head -1` and a terminal without the sign ± end neither the command nor its exit status."""
    code = (
        "import sys; from pathlib import Path; from ray_ctrl import cli; from ray_ctrl.console import console\n"
        "def work():\n"
        "    for _ in range(2000): console.print('0.5 ± 0.1 ' + 'x' * 100)\n"
        "    print('end'); Path(sys.argv[1]).write_text('saved')\n"
        "cli.app = lambda **given: work()\n"
        "sys.exit(cli.main([]))"
    )
    saved = tmp_path / "saved"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(saved)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"0.5 ? 0.1")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0, err
    assert saved.read_text() == "saved"
    assert err == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("redirection", "status", "words"), [(">/dev/full", 1, "output cannot be written (No space"), (">&-", 0, "")]
)
def test_an_output_that_cannot_be_written_costs_no_result(
    redirection: str, status: int, words: str, tmp_path: Path
) -> None:
    code = (
        "import os, sys; from pathlib import Path; from ray_ctrl import cli; from ray_ctrl.console import console\n"
        "def work():\n"
        "    for _ in range(3): console.print('line')\n"
        "    file = open(sys.argv[1], 'w'); os.write(1, b'from a library'); print('end'); file.write('saved')\n"
        "cli.app = lambda **given: work()\n"
        "sys.exit(cli.main([]))"
    )
    (tmp_path / "code.py").write_text(code)
    command = f"'{sys.executable}' code.py saved {redirection}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "saved").read_text() == "saved"
    assert words in done.stderr.decode()
    assert done.stderr.count(b"\n") == bool(words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "[/x]"],
        ["evaluate", "[/x]"],
        ["store", "inspect", "[/x]"],
        ["train", "-p", "smoke", "--dry-run", "--run-dir", "[/x]"],
        ["tune", "smoke", "--dry-run", "--run-dir", "[/x]"],
        ["train", "-p", "smoke", "--dry-run", "--task", "[/x]"],
        ["answer", "[/x]", "[/bold]?", "-b", "50"],
    ],
)
def test_what_looks_like_markup_is_text(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status = cli.main(arguments)
    err = capsys.readouterr().err
    assert status == 0 or (status == 2 and err.startswith("error: ") and err.count("\n") == 1), err
    with console.console.capture() as printed:
        console.console.print("[/x]", console.table(("[/y]",), [("[red]a",)], "[/z]"))
    assert all(text in printed.get() for text in ("[/x]", "[/y]", "[red]a", "[/z]"))


@pytest.mark.parametrize("question", ["\udcff what", "q\ud83d"])
def test_half_a_character_in_a_question_is_named(question: str) -> None:
    with pytest.raises(UserError, match="half a character") as caught:
        pipeline.make_sample(None, question)
    caught.value.message.encode()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_what_the_disk_refuses_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "there")

    assert exits.guard(fail) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: there: {os.strerror(number)}; ")
    assert err.count("\n") == 1


def test_checkpoints_are_chosen_by_the_objective_with_the_error_of_samples() -> None:
    per_sample = [0.0, 1.0, 1.0, 0.0]
    rows = [{"reward": 2 * a} for a in per_sample for _ in range(trainer.VALIDATION_BUDGETS)]
    score, error = trainer.validation_score(rows)
    assert score == pytest.approx(1.0)
    assert error == pytest.approx(2 * np.std(per_sample, ddof=1) / 2)
    assert trainer.validation_score(rows[: trainer.VALIDATION_BUDGETS]) == (0.0, 0.0)


def test_validation_never_sees_a_held_out_budget() -> None:
    budgets = BudgetDistribution.over(10.0, 80.0)
    contexts = trainer.validation_contexts(5, budgets)
    assert len(contexts) == len(set(contexts)) == 5 * trainer.VALIDATION_BUDGETS
    for _, ms in contexts:
        assert 10.0 <= ms <= 80.0
        assert not any(low < ms < high for low, high in budgets.bands)


def test_resuming_takes_only_what_leaves_the_results_alone(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", load_config("smoke"))
    assert train.resumed_config(folder, []) == folder.config
    assert train.resumed_config(folder, ["run.iterations=9", "runners.count=1"]).run.iterations == 9
    with pytest.raises(UserError, match=r"run\.seed cannot change"):
        train.resumed_config(folder, ["run.seed=9"])


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(tmp_path / "run", load_config("smoke"))
    folder.save_checkpoint(4, 0.5, lambda place: (place / "controller").mkdir())
    assert not folder.finished(4)
    folder.controller.mkdir()
    (folder.root / "evaluation-2").mkdir()
    (folder.root / "evaluation-2" / "summary.json").write_text("{}")
    before = sorted(folder.root.rglob("*"))
    assert cli.main(["train", "--resume", "--run-dir", str(folder.root)]) == 0
    assert "is finished: 4 iterations" in capsys.readouterr().out
    assert sorted(folder.root.rglob("*")) == before
    assert not folder.finished(5)  # with a larger run.iterations it continues


def test_free_folder(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "evaluation") == tmp_path / "evaluation"
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation-2").mkdir()
    assert free_folder(tmp_path / "evaluation") == tmp_path / "evaluation-3"


def test_finding_a_controller(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder or exported controller"):
        controllers.find_controller(tmp_path / "none")
    run = RunFolder.create(tmp_path / "run", load_config("smoke"))
    with pytest.raises(UserError, match="no checkpoint yet"):
        controllers.find_controller(run.root)
    run.save_checkpoint(2, 0.1, lambda place: (place / "controller").mkdir())
    assert controllers.find_controller(run.root) == (run.root / "checkpoints/iteration_000002/controller", run.root)
    checkpoint = run.root / "checkpoints/iteration_000002"
    (checkpoint / "controller/controller.json").touch()
    assert controllers.find_controller(checkpoint) == (checkpoint / "controller", run.root)
    run.controller.mkdir()
    assert controllers.find_controller(run.root) == (run.controller, run.root)


def test_finding_a_sweeps_controller(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").touch()
    with pytest.raises(UserError, match="exported no controller yet: continue it with ray-ctrl tune --resume"):
        controllers.find_controller(tmp_path)
    (tmp_path / "controller").mkdir()
    (tmp_path / "controller/controller.json").touch()
    assert controllers.find_controller(tmp_path) == (tmp_path / "controller", tmp_path)


def test_a_sweep_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").touch()
    inspect.run(tmp_path)
    assert "no summary yet" in capsys.readouterr().out
    trials = [
        {"trial": "a", "settings": {"grpo.lr": 0.01}, "best": [4, 0.5], "iterations": 6, "status": "TERMINATED"},
        {"trial": "b", "settings": {"grpo.lr": 0.1}, "best": None, "iterations": 0, "status": "ERROR"},
    ]
    summary = {"command": "ray-ctrl tune x", "metric": "validation/score", "trials": trials}
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    inspect.run(tmp_path)
    printed = capsys.readouterr().out
    assert "+0.5000 after iteration 4 of 6: grpo.lr=0.01" in printed
    assert "no validation after iteration - of 0: grpo.lr=0.1" in printed


def test_more_iterations_of_a_resumed_run_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that nothing says "iterations 12 of 10"."""
    folder = RunFolder.create(tmp_path / "run", load_config("smoke"))
    config = train.resumed_config(folder, ["run.iterations=12"])
    context: Any = SimpleNamespace(with_profile=lambda root: None)
    with train.open_run(folder.root, config, context, folder):
        pass
    assert RunFolder.open(folder.root).config == config
    inspect.run(folder.root)
    assert "0 of 12" in capsys.readouterr().out


def test_a_foreign_rllib_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "validated_module").mkdir()
    with pytest.raises(UserError, match="is no RLlib checkpoint of GRPO"):
        evaluate.run(tmp_path, [], None)


def test_a_moved_store_is_found_and_a_lost_one_is_not_made_anew(tmp_path: Path) -> None:
    trial = tmp_path / "sweep/trials/one"
    trial.mkdir(parents=True)
    config = with_overrides(Config(), ["store.path=/no/such/folder/outcomes.sqlite"])
    assert evaluate.with_moved_store(config, trial).store.path is None
    (tmp_path / "sweep/outcomes.sqlite").touch()
    assert evaluate.with_moved_store(config, trial).store.path == str(tmp_path / "sweep/outcomes.sqlite")
    there = with_overrides(Config(), [f"store.path={tmp_path}/new.sqlite"])
    assert evaluate.with_moved_store(there, trial) == there


@pytest.mark.parametrize(
    ("changes", "ran"),
    [
        ({}, 6),
        ({"evaluation.lookup_samples": 6}, 6),
        ({"evaluation.lookup_samples": 5}, 0),
        ({"runners.count": 1}, 0),
        ({"latency.source": "measured"}, 0),
    ],
)
def test_all_plans_are_precomputed_if_training_needs_no_others(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], ran: int
) -> None:
    asked: list[tuple[Any, Any]] = []

    def outcomes(samples: list[Any], plans: list[Any]) -> list[Any]:
        asked.extend(zip(samples, plans, strict=True))
        return plans

    space = SimpleNamespace(distinct=("expensive", "cheap"), plan=lambda knobs: f"{knobs} plan")
    resources = SimpleNamespace(samples=range(6), space=space, engine=SimpleNamespace(outcomes=outcomes))
    monkeypatch.setattr("ray_ctrl.all_plans.BATCH", 4)  # two samples a batch
    monkeypatch.setattr(lookup, "fill_store", lambda config, what: resources)
    config = with_overrides(Config(), ["task.train_samples=6", *(f"{key}={value}" for key, value in changes.items())])
    lookup.precompute(SimpleNamespace(config=config, env_config=lambda split: None))  # type: ignore[arg-type]
    assert asked == [(sample, f"{knobs} plan") for sample in range(ran) for knobs in ("expensive", "cheap")]


def test_lookup_samples_are_all_or_drawn_at_random() -> None:
    def drawn(*overrides: str) -> list[int]:
        return lookup.lookup_samples(with_overrides(Config(), overrides), range(100))

    assert drawn() == drawn("evaluation.lookup_samples=100") == list(range(100))
    ten = drawn("evaluation.lookup_samples=10")
    assert len(set(ten)) == 10
    assert ten == drawn("evaluation.lookup_samples=10") != drawn("evaluation.lookup_samples=10", "run.seed=1")
    assert max(ten) > 20  # not the first ones
    assert drawn("evaluation.lookup_samples=0") == []


@pytest.mark.parametrize(
    ("missing", "words"), [("ray.tune", r"needs ray: pip install 'ray-ctrl\[train\]'"), ("envs.x", "")]
)
def test_a_package_of_an_extra_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str, words: str
) -> None:
    def run(**options: object) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(evaluate, "run", run)
    if not words:
        with pytest.raises(ModuleNotFoundError):
            cli.main(["evaluate", "somewhere"])
        return
    assert cli.main(["evaluate", "somewhere"]) == 2
    assert re.search(words, capsys.readouterr().err)
