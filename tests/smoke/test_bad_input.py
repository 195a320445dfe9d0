"""Every mistake a user can make: one clear line, exit status 2, nothing overwritten."""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import LIMIT_S, finish, ray_ctrl, refused, snapshot, start
from PIL import Image

SMOKE = ("train", "--preset", "smoke")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grpo.grup_size=4"], "the nearest valid key is 'grpo.group_size'"),
        (["grpo.group_size=4", "runners.envs_per_runner=6"], "does not divide runners.envs_per_runner = 6"),
        (["runners.count=999", "grpo.groups_per_iteration=999"], "999 CPUs needed"),
        (["model.name=/no/such/model"], "/no/such/model"),
        (["task.name=nothing"], "nothing"),
        (["latency.device=abacus"], "abacus"),
        (["latency.source=profiled", "latency.profile=/no/table.json"], "/no/table.json"),
        (["budgets.low_factor=50"], "empty or inverted"),
        (["budgets.low_ms=9", "budgets.high_ms=8"], "budgets.low_ms = 9 is not below budgets.high_ms = 8"),
        (["budgets.low_ms=0.001", "budgets.high_ms=0.002"], "too small for this device"),
        (["budgets.low_ms=90000", "budgets.high_ms=91000"], "too large for this device"),
        (["budgets.low_ms=90000"], "is empty or inverted: this device's own is"),
        (["budgets.high_ms=0.1"], "is empty or inverted: this device's own is"),
        (["model.revision=v1"], "only a hub id has revisions"),
        (["model.block_importance=/no/such.json"], "no file of block importance at /no/such.json"),
        (["runners.address=127.0.0.1:1"], "no Ray cluster answers"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, overrides: list[str], words: str) -> None:
    assert words in refused(*SMOKE, "--run-dir", tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists(), "a run that never began leaves nothing that blocks the next try"


def test_the_program_itself_ends_with_status_2() -> None:
    done = finish(start(["train", "--dry-run", "grpo.lrr=1"]))
    assert done.status == 2
    assert done.err == "error: unknown config key 'grpo.lrr': the nearest valid key is 'grpo.lr'\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "nonsuch"], "unknown task 'nonsuch'"),
        (["model.name=/no/such/model"], "no model folder /no/such/model"),
        (["latency.profile=/no/table.json"], "no profile at latency.profile = /no/table.json"),
        (["latency.source=roofline", "latency.device=abacus"], "roofline device 'abacus' is not known"),
        (["--run-dir", "docs"], "run folder docs exists already"),
    ],
)
def test_a_dry_run_knows_what_would_be_refused_after_showing_the_plan(arguments: list[str], words: str) -> None:
    done = ray_ctrl("train", "--dry-run", *arguments)
    assert done.status == 2
    assert "# each iteration" in done.out
    assert words in done.err


def test_existing_run_folder_is_not_overwritten(trained: Path) -> None:
    before = snapshot(trained)
    assert "exists already: continue it with --resume" in refused(*SMOKE, "--run-dir", trained)
    assert "exists already" in refused("evaluate", trained, "--out", trained / "evaluation")
    assert snapshot(trained) == before


@pytest.mark.parametrize("budget", ["0", "-5", "nan", "inf", "soon"])
def test_impossible_budgets(trained: Path, tmp_path: Path, budget: str) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    message = refused("answer", picture, "what?", f"--budget-ms={budget}", "--controller", trained)
    assert "budget" in message


def test_images_that_cannot_be_read(trained: Path, tmp_path: Path) -> None:
    complete = tmp_path / "complete.jpg"
    Image.effect_noise((300, 300), 50).convert("RGB").save(complete)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(complete.read_bytes()[: complete.stat().st_size // 2])
    text = tmp_path / "text.png"
    text.write_text("no picture", encoding="utf-8")
    for image in (cut, text, tmp_path / "none.png", tmp_path):
        assert image.name in refused("answer", image, "what?", "-b", "50", "--controller", trained)
    assert "give text" in refused("answer", complete, " ", "-b", "50", "--controller", trained)


def test_controllers_that_cannot_be_used(trained: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "controller", damaged)
    weights = damaged / "controller.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "corrupt" in refused("evaluate", damaged)
    assert "corrupt" in refused("answer", "-", "what?", "-b", "50", "--controller", damaged)
    assert "no run folder or exported controller" in refused("evaluate", tmp_path / "none")
    assert "cannot be read" in refused("evaluate", tmp_path)
    assert "is no run" in refused("inspect", tmp_path)


def test_checkpoint_of_another_shape(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    settings = run / "config.yaml"
    settings.write_text(settings.read_text("utf-8").replace("hidden: 16", "hidden: 24"), encoding="utf-8")
    message = refused("train", "--resume", "--run-dir", run, "run.iterations=6")
    assert "does not fit this run" in message


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert "not a run folder" in refused("train", "--resume", "--run-dir", tmp_path)
    assert "no run folder under" in refused("train", "--resume", f"run.folder={tmp_path}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the runner in /proc")
def test_all_runners_dead(tmp_path: Path) -> None:
    """The only runner is killed whenever it comes back, until the run gives up."""
    process = start(
        [
            *SMOKE,
            "--run-dir",
            tmp_path / "run",
            "runners.count=1",
            "run.iterations=100000",
            "runners.restart_timeout_s=20",
        ]
    )
    deadline = time.monotonic() + LIMIT_S
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text("utf-8"):
            for child in _descendants(process.pid):
                with suppress(OSError):
                    if b"RolloutRunner" in Path(f"/proc/{child}/cmdline").read_bytes():
                        os.kill(child, signal.SIGKILL)
        time.sleep(0.2)
    done = finish(process)
    assert done.status == 2, done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "runner" in last
    assert "Traceback" not in done.err


def _descendants(pid: int) -> list[int]:
    """Processes below `pid`, by /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = stat.read_text("utf-8", errors="replace").rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    found, layer = [], [pid]
    while layer:
        layer = [child for child, parent in parents.items() if parent in layer]
        found += layer
    return found
