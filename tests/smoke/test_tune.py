"""Sweeps end to end through the command: interrupted, resumed, decided."""

import csv
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Done, finish, stable_metrics, start

LIMIT_S = 1800.0
pytestmark = pytest.mark.timeout(2 * LIMIT_S)
TINY = {
    "evaluation.every": 1, "evaluation.lookup_samples": 0, "run.checkpoint_every": 1, "run.tensorboard": False,
    "task.train_samples": 4, "task.validation_samples": 2, "task.test_samples": 1, "model.max_new_tokens": 4,
}  # fmt: skip
LR = {"grpo.lr": {"log_uniform": [1.0e-4, 1.0e-1]}}


def write(place: Path, iterations: int, **keys: Any) -> Path:
    """A sweep file over the learning rate."""
    sweep = {"preset": "smoke", "space": LR, "set": TINY | {"run.iterations": iterations}} | keys
    path = place / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return path


def ended(*arguments: str | Path) -> Done:
    """`ray-ctrl tune ARGUMENTS`, which must succeed."""
    done = finish(start(["tune", *arguments]), LIMIT_S)
    assert done.status == 0, done.out + done.err
    return done


def interrupted(path: Path, root: Path, after: int) -> Done:
    """The sweep of `path`, sent SIGINT once `after` iterations are written down, over all trials."""
    process = start(["tune", path, "--run-dir", root])
    deadline = time.monotonic() + LIMIT_S
    while sum(len(rows) for rows in written(root).values()) < after:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    return finish(process, LIMIT_S)


def written(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Metrics of each trial that has any."""
    return {path.parent.name: stable_metrics(path.parent) for path in sorted(root.glob("trials/*/metrics.jsonl"))}


def decided(root: Path, trials: int, iterations: int | None) -> Mapping[str, Any]:
    """Checks what a finished sweep must leave behind; returns its summary."""
    summary = json.loads((root / "summary.json").read_text("utf-8"))
    entries = summary["trials"]
    assert len(entries) == trials
    assert {entry["status"] for entry in entries} == {"TERMINATED"}
    scores = [entry["best"][1] for entry in entries]
    assert scores == sorted(scores, reverse=True)
    for trial, rows in written(root).items():
        assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1)), trial
        assert iterations is None or len(rows) == iterations
    with (root / "summary.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["trial"] for row in table] == [entry["trial"] for entry in entries]
    assert len({float(row["grpo.lr"]) for row in table}) == trials
    assert (root / "summary.md").read_text("utf-8").count("\n| ") == trials + 1
    assert (root / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # The exported controller is the one of the best trial's best checkpoint.
    best = root / "trials" / entries[0]["trial"] / "checkpoints" / f"iteration_{entries[0]['best'][0]:06d}"
    exported = (root / "controller" / "controller.safetensors").read_bytes()
    assert exported == (best / "controller" / "controller.safetensors").read_bytes()
    return summary


@pytest.mark.slow
def test_a_sweep_is_interrupted_resumed_and_decided(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    stopped = interrupted(write(tmp_path, iterations=3, search="random", trials=3), root, after=2)
    assert stopped.status == 130, stopped.out + stopped.err
    assert "the trials stop at their last checkpoints" in stopped.err
    assert "continue with: ray-ctrl tune --resume" in stopped.out
    before = {trial: rows[:-1] for trial, rows in written(root).items()}
    done = ended("--resume", "--run-dir", root)
    decided(root, trials=3, iterations=3)
    assert "best: trial" in done.out
    # What was reached before is kept, and trials share one store.
    after = written(root)
    assert all(after[trial][: len(rows)] == rows for trial, rows in before.items())
    assert (root / "outcomes.sqlite").is_file()


@pytest.mark.slow
def test_twelve_trials_are_halved_interrupted_once_and_name_the_best(tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    started = time.monotonic()
    asha = {"grace": 1, "reduction": 3}
    path = write(tmp_path, iterations=9, scheduler="asha", trials=12, asha=asha, search="random")
    stopped = interrupted(path, root, after=12)
    assert stopped.status == 130, stopped.out + stopped.err
    half = {trial: len(rows) for trial, rows in written(root).items()}
    ended("--resume", "--run-dir", root)
    summary = decided(root, trials=12, iterations=None)
    lengths = [entry["iterations"] for entry in summary["trials"]]
    assert max(lengths) == 9
    assert min(lengths) < 9, "no trial was stopped early"
    best = summary["trials"][0]
    print(
        f"12 trials on {os.cpu_count()} CPUs in {time.monotonic() - started:.0f} s; iterations {sorted(lengths)}; "
        f"interrupted with {sum(half.values())} of {sum(lengths)} iterations done in {len(half)} trials; best "
        f"{best['trial']} with {best['best'][1]:+.4f} and {best['settings']}"
    )
