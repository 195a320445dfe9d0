"""The shipped manifests pass the check; each way to break one is found by the same check."""

import copy
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.manifests import FOLDER, SHIPPED, check

Document = dict[str, Any]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_fine(name: str) -> None:
    assert check(FOLDER / name) == []


def test_pod_templates_are_held_to_kubernetes_own_schema(tmp_path: Path) -> None:
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate carries Kubernetes' schemas")

    def misspell(document: Document) -> None:
        document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []

    assert "volumeMount" in " ".join(_broken(tmp_path, "raycluster.yaml", misspell))


def _head(document: Document) -> Document:
    return document["spec"]["headGroupSpec"]


def _worker(document: Document) -> Document:
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    return spec["workerGroupSpecs"][0]


def _container(document: Document) -> Document:
    return _worker(document)["template"]["spec"]["containers"][0]


BREAKAGES: list[tuple[str, Callable[[Document], Any], str]] = [
    ("raycluster.yaml", lambda d: d["spec"].pop("headGroupSpec"), "headGroupSpec"),
    ("raycluster.yaml", lambda d: _head(d).update(rayStartParam={}), "rayStartParam"),
    ("raycluster.yaml", lambda d: _head(d)["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
    ("raycluster.yaml", lambda d: d.update(apiVersion="ray.io/v2"), "apiVersion"),
    ("raycluster.yaml", lambda d: d["spec"]["authOptions"].update(mode="none"), "authOptions.mode"),
    ("raycluster.yaml", lambda d: _worker(d).pop("groupName"), "groupName"),
    ("raycluster.yaml", lambda d: _worker(d).update(replicas=99), "lies outside"),
    ("raycluster.yaml", lambda d: _worker(d).update(replicas="2"), "replicas"),
    ("raycluster.yaml", lambda d: _container(d).pop("image"), "image"),
    ("raycluster.yaml", lambda d: _container(d)["volumeMounts"][0].update(name="nowhere"), "no volume of the pod"),
    ("raycluster.yaml", lambda d: _container(d)["resources"]["limits"].pop("nvidia.com/gpu"), "both must be equal"),
    ("raycluster.yaml", lambda d: _container(d)["resources"]["limits"].update(memory="48 GB"), "48 GB"),
    ("rayjob.yaml", lambda d: d["spec"].pop("entrypoint"), "entrypoint"),
    ("rayjob.yaml", lambda d: d["spec"].update(submissionMode="Kubectl"), "submissionMode"),
    ("rayjob.yaml", lambda d: d["spec"].update(entrypointNumGpus="one"), "entrypointNumGpus"),
    ("rayjob.yaml", lambda d: _worker(d)["template"].pop("spec"), "spec"),
    ("ray-up.yaml", lambda d: d.pop("cluster_name"), "apiVersion and kind"),
    ("ray-up.yaml", lambda d: d.pop("provider"), "provider"),
    ("ray-up.yaml", lambda d: d.update(max_worker=3), "max_worker"),
    ("ray-up.yaml", lambda d: d["available_node_types"]["gpu"]["resources"].update(GPU="1"), "GPU"),
    ("ray-up.yaml", lambda d: d.update(head_node_type="boss"), "none of available_node_types"),
    ("ray-up.yaml", lambda d: d.update(max_workers=0), "less than the sum"),
]


def _broken(folder: Path, name: str, change: Callable[[Document], Any]) -> list[str]:
    """Problems of a shipped file after `change` to its last document."""
    documents = list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))
    before = copy.deepcopy(documents)
    change(documents[-1])
    assert documents != before, "the breakage changed nothing"
    path = folder / name
    path.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    return check(path)


@pytest.mark.parametrize(("name", "change", "word"), BREAKAGES)
def test_broken_manifests_are_rejected(tmp_path: Path, name: str, change: Callable[[Document], Any], word: str) -> None:
    problems = _broken(tmp_path, name, change)
    assert any(word in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("--time=24:00:00", "--time=a day", "--time"),
        ("--nodes=2", "--node=2", "'--node' is not known"),
        ("#SBATCH --output=ray-ctrl-%j.log\n", "", "--output is missing"),
        ("set -euo pipefail", "set -e\n#SBATCH --mem=1G", "after the first command"),
        ("--signal=B:TERM@600", "--signal=TERM@600", "--signal"),
        ("\nfi\nexit", "\nexit", "syntax error"),
    ],
)
def test_broken_slurm_scripts_are_rejected(tmp_path: Path, old: str, new: str, word: str) -> None:
    text = (FOLDER / "slurm.sh").read_text("utf-8")
    assert old in text
    path = tmp_path / "slurm.sh"
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert any(word in problem for problem in check(path)), check(path)


def test_gpu_workers_shared_models_and_a_store_are_there() -> None:
    for name in ("raycluster.yaml", "rayjob.yaml"):
        document = list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))[-1]
        container = _container(document)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/shared", "/store"}
    up = yaml.safe_load((FOLDER / "ray-up.yaml").read_text("utf-8"))
    assert up["available_node_types"]["gpu"]["resources"]["GPU"] == 1
    assert {"-v /shared:/shared", "-v /var/lib/ray-ctrl/store:/store"} <= set(up["docker"]["run_options"])


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kind: RayCluster\napiVersion: ray.io/v1\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "cluster.manifests", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "'metadata' is a required property" in done.stdout


def test_slurm_script_starts_ray_trains_and_queues_itself_again_when_told_to_stop(tmp_path: Path) -> None:
    """With stand-ins for srun, scontrol, ray and ray-ctrl that write down how they were called."""
    calls = tmp_path / "calls"
    listen = "import socket,sys,time; s=socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"
    scripts = {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then echo 127.0.0.1; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_NODEID=0 exec "$@"',
        "ray": f'echo "ray $*" >> "$CALLS"; exec {sys.executable} -c "{listen}" "$PORT"',
        "ray-ctrl": 'echo "ray-ctrl $*" >> "$CALLS"; trap "sleep 0.3; exit 143" TERM; kill -TERM $BATCH; '
        "while :; do sleep 0.05; done",
    }
    for name, body in scripts.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CALLS": str(calls),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "4",
        "RAY_CTRL_SHARED": str(tmp_path / "shared"),
        "RAY_CTRL_STORE": str(tmp_path / "store"),
    }
    starter = f'export BATCH=$$; exec bash "{FOLDER / "slurm.sh"}"'
    done = subprocess.run(
        ["bash", "-c", starter], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 143, done.stderr
    told = calls.read_text("utf-8")
    assert "ray start --head --port=24711 --num-cpus=16 --num-gpus=4 --block" in told
    assert "runners.address=127.0.0.1:24711" in told
    assert "--preset molmoe-1b runners.count=7 grpo.groups_per_iteration=56" in told
    assert f"store.path={tmp_path}/store/outcomes.sqlite" in told
    assert told.rstrip().endswith("scontrol requeue 4711")
    assert (tmp_path / "store").is_dir()
