"""Jobs on a real head node: by `ray job submit`, by `ray-ctrl submit`, failing, and stopped."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_tools import BIN, ROOT, Head, model_folder
from conftest import finish, start

pytestmark = pytest.mark.timeout(600)
TINY = (
    "run.iterations=1", "run.checkpoint_every=1", "run.tensorboard=false", "evaluation.every=0",
    "evaluation.lookup_samples=0", "task.test_samples=1", "task.validation_samples=1", "model.max_new_tokens=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    node = Head()
    yield node.wait()
    node.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.name={model_folder(tmp_path_factory.mktemp('model') / 'tiny')}"


def scraped(head: Head, wanted: str, deadline: float) -> dict[str, str]:
    """Lines of the node's Prometheus endpoint by the metric's name, once `wanted` is among them."""
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(head.metrics, timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
            found = {line.partition("{")[0]: line for line in lines}
            if wanted in found:
                return found
        time.sleep(1.0)
    pytest.fail(f"no {wanted} at {head.metrics}")


def test_a_job_through_rays_own_command(head: Head, model: str, tmp_path: Path) -> None:
    """As in the README, with the interpreter named: Ray takes whatever `python` the head's PATH finds."""
    run = tmp_path / "run"
    arguments = ["train.py", "--preset", "smoke", *TINY, model, "--run-dir", str(run)]
    done = subprocess.run(
        [BIN / "ray", "job", "submit", "--address", head.jobs, "--working-dir", ".", "--", BIN / "python", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "controller" / "controller.safetensors").is_file()
    # It joined the cluster it was submitted to, from the copy that travelled.
    assert "working_dir_files" in (run / "run.json").read_text("utf-8") or "train.py" in (run / "run.json").read_text()


def test_submit_follows_the_log_and_returns_the_exit_status(head: Head, tmp_path: Path) -> None:
    done = finish(start(["submit", "--address", head.jobs, "--", "--preset", "smoke", "model.name=/nowhere/model"]))
    assert done.status == 2, done.out + done.err
    assert "/nowhere/model" in done.out
    assert "ended with exit status 2" in done.out


def test_ctrl_c_stops_the_job_at_a_checkpoint(head: Head, model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = [word for word in TINY if not word.startswith("run.iterations")]
    process = start(
        ["submit", "--address", head.jobs, "--stop-on-interrupt", "--submission-id", "to-be-stopped", "--",
         "--preset", "smoke", *long, "run.iterations=5000", model, "--run-dir", run]
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.status == 130, done.out + done.err
    assert "job to-be-stopped is STOPPED" in done.out
    done_iterations = (run / "metrics.jsonl").read_text("utf-8").count("\n")
    newest = max((run / "checkpoints").glob("iteration_*"))
    assert int(newest.name.rpartition("_")[2]) == done_iterations


REPORTER = """
import sys, time, ray
from pathlib import Path
from ray_ctrl.tracking import Gauges
ray.init(address=sys.argv[1], log_to_driver=False)
gauges = Gauges(Path("/runs/run"))
while True:
    gauges.log({"reward": 0.5, "time/learn_s": 1.0}, 3)
    time.sleep(1)
"""


def test_a_runs_numbers_reach_the_prometheus_endpoint(head: Head) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([BIN / "python", "-c", REPORTER, head.address], env=environment)
    try:
        numbers = scraped(head, "ray_ray_ctrl_reward", time.monotonic() + 120)
    finally:
        process.kill()
        process.wait(10)
    assert 'run="run"' in numbers["ray_ray_ctrl_reward"]
    assert {"ray_ray_ctrl_iteration", "ray_ray_ctrl_time_learn_s", "ray_node_cpu_count"} <= set(numbers)
