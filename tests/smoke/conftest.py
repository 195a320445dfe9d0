"""Whole commands. One small training run, in a process of its own, is shared by the tests that only read it.

Commands that are killed, stopped or looked at from outside run as subprocesses (`start`, `finish`); the others run
through the same entry point inside this process (`ray_ctrl`), which spares each of them the imports.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_ctrl.cli import main

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240.0
# Wall times and cache counters may differ between runs of the same seed; nothing else may.
UNSTABLE = ("time/", "engine/")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    status: int
    out: str
    err: str


def start(arguments: Sequence[str | Path], program: Sequence[str | Path] = ("-m", "ray_ctrl")) -> subprocess.Popen[str]:
    """Starts a command of this checkout, as leader of its own process group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, *map(str, program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> Done:
    """Waits for a command; ends its whole group where it hangs."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{process.args} did not end within {limit_s:g} s\n{out}\n{err}")
    return Done(process.returncode, out, err)


def ray_ctrl(*arguments: str | Path) -> Done:
    """Runs `ray-ctrl ARGUMENTS` to its end in this process; an exception that escapes fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Done(status, out.getvalue(), err.getvalue())


def fine(*arguments: str | Path) -> Done:
    """Runs a command that must succeed."""
    done = ray_ctrl(*arguments)
    assert done.status == 0, f"{arguments} ended with {done.status}\n{done.out}\n{done.err}"
    return done


def refused(*arguments: str | Path) -> str:
    """Runs a command that must be refused: exit status 2 and one line on stderr, which is returned."""
    done = ray_ctrl(*arguments)
    assert done.status == 2, f"{arguments} ended with {done.status}\n{done.out}\n{done.err}"
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.out
    return lines[0]


def stable_metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what may differ between equal runs."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(UNSTABLE)} for row in rows]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, to prove that nothing was overwritten."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True, scope="module")
def _no_ray_left_behind() -> Iterator[None]:
    """Lets go of a Ray that RLlib started by itself inside this process: the next module must not find it."""
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `ray-ctrl train --preset smoke`, only to be read."""
    run = tmp_path_factory.mktemp("smoke") / "run"
    done = finish(start(["train", "--preset", "smoke", "--run-dir", run]))
    assert done.status == 0, done.out + done.err
    (run.parent / "train.out").write_text(done.out, encoding="utf-8")
    (run.parent / "train.err").write_text(done.err, encoding="utf-8")
    return run
