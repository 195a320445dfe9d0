"""Train, evaluate, answer, inspect: what a user types, from start to end."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import fine, finish, refused, snapshot, stable_metrics, start
from PIL import Image

from ray_ctrl.load_config import load_config

CONFIG = load_config("smoke")


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (168, 168, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_run_leaves_everything_it_promises(trained: Path) -> None:
    assert len(stable_metrics(trained)) == CONFIG.run.iterations
    for name in (
        "config.yaml",
        "run.json",
        "learning_curve.png",
        "controller/controller.safetensors",
        "evaluation/table.csv",
        "evaluation/table.md",
        "evaluation/summary.json",
        "evaluation/accuracy_over_budget.png",
        "evaluation/latency_over_budget.png",
    ):
        assert (trained / name).stat().st_size > 0, name
    assert list((trained / "tensorboard").iterdir())


def test_the_console_is_quiet_and_has_one_line_an_iteration(trained: Path) -> None:
    out = (trained.parent / "train.out").read_text("utf-8")
    assert sum(line.startswith("iteration ") for line in out.splitlines()) == CONFIG.run.iterations
    assert (trained.parent / "train.err").read_text("utf-8") == ""
    assert "warn" not in out.lower()


def test_every_context_is_evaluated_once_at_any_number_of_runners(trained: Path, tmp_path: Path) -> None:
    before = snapshot(trained)
    fine("evaluate", trained, "runners.eval_runners=2", "--out", tmp_path / "two")
    ours, theirs = _rows(trained / "evaluation/rollouts.csv"), _rows(tmp_path / "two/rollouts.csv")
    assert ours == theirs
    pairs = [(r["sample"], r["budget_ms"]) for r in theirs if r["method"] == "controller"]
    budgets = {budget for _, budget in pairs}
    assert len(pairs) == len(set(pairs)) == CONFIG.task.test_samples * len(budgets)
    assert len(budgets) == CONFIG.budgets.held_out_bands + 2
    assert {r["method"] for r in theirs} == {
        "controller", "lookup table", "random knobs", "full plan", "cheapest plan",
    }  # fmt: skip
    assert snapshot(trained) == before


def test_an_exported_controller_is_enough(trained: Path, tmp_path: Path, picture: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    for file in (trained / "controller").iterdir():
        (export / file.name).write_bytes(file.read_bytes())
    fine("evaluate", export)
    assert _rows(tmp_path / "evaluation/table.csv") == _rows(trained / "evaluation/table.csv")
    done = fine("answer", picture, "how many objects?", "-b", "50", "--controller", export, "--json")
    assert json.loads(done.out)["budget_ms"] == 50


def test_a_plain_rllib_checkpoint_is_enough(trained: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoints/iteration_000004", checkpoint)
    shutil.rmtree(checkpoint / "controller")  # as algo.save_to_path leaves it
    fine("evaluate", checkpoint, "evaluation.lookup_samples=0", "task.test_samples=2")
    rows = _rows(tmp_path / "evaluation/rollouts.csv")
    assert {row["method"] for row in rows} == {"controller", "random knobs", "full plan", "cheapest plan"}
    assert all(row["question"] and row["reference"] for row in rows)


def test_answer_prints_plan_answer_and_stages(trained: Path, picture: Path) -> None:
    done = fine("answer", picture, "what color is the digit?", "--budget-ms", "40", "--controller", trained)
    for word in ("answer", "plan", "vision", "prefix", "suffix", "decode", "controller"):
        assert word in done.out
    done = fine("answer", picture, "what color?", "--budget-ms", "40", "--controller", trained, "--json")
    said = json.loads(done.out)
    assert said["latency_ms"] == pytest.approx(sum(said["stages_ms"].values()))
    assert said["stages_ms"]["vision"] > 0
    assert said["controller"] == str(trained / "controller")


def test_answer_without_an_image(trained: Path) -> None:
    said = json.loads(fine("answer", "-", "what?", "-b", "40", "--controller", trained, "--json").out)
    assert said["knobs"]["tier"] == "low"
    assert said["stages_ms"]["vision"] < 0.1 * said["latency_ms"]


def test_inspect(trained: Path) -> None:
    assert "4 of 4" in fine("inspect", trained).out
    assert "fingerprint" in fine("inspect", trained / "controller").out


def test_same_seed_same_metrics_and_another_seed_others(trained: Path, tmp_path: Path) -> None:
    fine("train", "--preset", "smoke", "--run-dir", tmp_path / "again")
    assert stable_metrics(tmp_path / "again") == stable_metrics(trained)
    assert _rows(tmp_path / "again/evaluation/rollouts.csv") == _rows(trained / "evaluation/rollouts.csv")
    fine("train", "--preset", "smoke", "--seed", "1", "run.iterations=1", "--run-dir", tmp_path / "other")
    assert stable_metrics(tmp_path / "other")[0] != stable_metrics(trained)[0]


def test_dry_run_shows_settings_and_resources_and_writes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = fine("train", "-p", "smoke", "--dry-run", "--run-dir", run, "grpo.lr=3e-4")
    assert "lr: 0.0003" in done.out
    assert "placed by Ray" in done.out
    assert not run.exists()


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["profile"], ["answer"], ["inspect"], ["store"]])
def test_help_explains(command: list[str]) -> None:
    done = fine(*command, "--help")
    assert "Usage: ray-ctrl" in done.out
    assert len(done.out.splitlines()) > 8


def test_train_py_takes_the_same_arguments(tmp_path: Path) -> None:
    done = finish(start(["-p", "smoke", "--dry-run", "run.seed=7"], program=("train.py",)))
    assert done.status == 0, done.err
    assert "seed: 7" in done.out


def test_profile_writes_a_table_that_training_takes(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    fine("profile", "-p", "smoke", "latency.profile_samples=2", "latency.profile_repeats=1", "--out", table)
    assert "reference" in fine("inspect", table).out
    assert "exists already" in refused("profile", "-p", "smoke", "--out", table)
    run = tmp_path / "run"
    settings = [
        "latency.source=profiled",
        f"latency.profile={table}",
        "run.iterations=1",
        "evaluation.lookup_samples=0",
    ]
    fine("train", "-p", "smoke", *settings, "--run-dir", run)
    summary = json.loads((run / "evaluation/summary.json").read_text("utf-8"))
    assert set(summary["methods"]) == {"controller", "random knobs", "full plan", "cheapest plan"}
    measured = ["latency.source=measured", "task.test_samples=1", "evaluation.lookup_samples=2"]
    fine("evaluate", run, *measured, "--out", tmp_path / "measured")
    there = json.loads((tmp_path / "measured/summary.json").read_text("utf-8"))
    assert set(there["methods"]) == {*summary["methods"], "static plan at 90%"}
    budgets = [[line["budget_ms"] for line in found["per_budget"]["controller"]] for found in (summary, there)]
    assert budgets[0] == budgets[1]
