"""Which device a process uses, by what Ray gave it: real actors on a Ray that believes in two GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, ray
from cluster.connect import connect, worker_device
from cluster.resources import resource_plan

@ray.remote
class Runner:
    def device(self):
        return worker_device()

plan = resource_plan(runners=2, runner_cpus=0.5, runner_gpus=1, learners=0, learner_cpus=1, learner_gpus=0,
                     evaluation_runners=0)
with connect("local", plan, timeout_s=60):
    actors = [Runner.options(num_cpus=0.5, num_gpus=gpus).remote() for gpus in (0, 1, 1)]
    devices = ray.get([actor.device.remote() for actor in actors], timeout=120)
    print(json.dumps([worker_device(), *devices]))
"""


def devices(**environment: str) -> list[str | None]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "RAY_ADDRESS"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**clean, "PYTHONPATH": str(ROOT), **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_runner_has_a_gpu_of_its_own_and_others_have_none() -> None:
    driver, without, *runners = devices()
    assert driver is None, "the driver is not one of Ray's workers: it looks for itself"
    assert without == "cpu", "it sees all GPUs, and none was given to it"
    assert runners == ["cuda:0", "cuda:0"], "Ray narrows what each sees to its own"


def test_a_preset_of_visible_gpus_does_not_pile_runners_on_one() -> None:
    """As Slurm sets it, with Ray configured not to change it."""
    variables = {"CUDA_VISIBLE_DEVICES": "4,5", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    _, without, *runners = devices(**variables)
    assert without == "cpu"
    assert sorted(map(str, runners)) == ["cuda:0", "cuda:1"]
