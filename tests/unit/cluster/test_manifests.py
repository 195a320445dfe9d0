"""The files for clusters: well-formed, fitting the run that they start; scripts are run with stand-ins."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ray_ctrl.load_config import load_config
from ray_ctrl.preflight import plan_layout
from ray_ctrl.serve.app import settings_of

FOLDER = Path(__file__).resolve().parents[3] / "cluster" / "manifests"
SHIPPED = ("raycluster.yaml", "rayjob.yaml", "ray-up.yaml")


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


def _cluster(name: str) -> dict[str, Any]:
    spec = _documents(name)[-1]["spec"]
    return dict(spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec)))


def _gpus(name: str) -> int:
    """GPUs that a cluster may grow to without a change to its file."""
    if name == "ray-up.yaml":
        kind = _documents(name)[0]["available_node_types"]["gpu"]
        return int(kind["max_workers"] * kind["resources"]["GPU"])
    groups = _cluster(name)["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    return sum(group["replicas"] * int(limit["nvidia.com/gpu"]) for group, limit in zip(groups, limits, strict=True))


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"])
def test_pods_and_claims_are_kubernetes_own(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    cluster = _cluster(name)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]} for group in groups]
    for document in [*_documents(name)[:-1], *pods]:
        validate.validate(document, validate.latest_version(), strict=True)
    for pod in pods:
        mounted = {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["spec"]["volumes"]}


def test_ray_up_file_is_rays_own() -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text("utf-8"))
    document = _documents("ray-up.yaml")[0]
    jsonschema.validate(document, schema)
    assert document["head_node_type"] in document["available_node_types"]


def test_versions_are_those_tested_together() -> None:
    tested = re.search(r"^ray==(.+)$", (FOLDER.parents[1] / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert tested
    for name in ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml"):
        assert _cluster(name)["rayVersion"] == tested[1]
    assert f"rayproject/ray:{tested[1]}-" in (FOLDER / "Dockerfile").read_text("utf-8")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_run_that_a_file_names_fits_its_cluster(name: str) -> None:
    """GPUs of the runners and the driver's own; token authentication on both sides; the store on the mounted disk."""
    text = (FOLDER / name).read_text("utf-8")
    words = re.findall(
        r"[a-z_.]+=[\w./-]+", " ".join(re.findall(r"--preset molmoe-1b[^;]*?store.path=\S+", text, re.DOTALL))
    )
    config = load_config("molmoe-1b", None, [*(word.rstrip(";") for word in words), "runners.address=head:6379"])
    assert config.runners.count >= 1
    assert plan_layout(config).resources.roles
    assert config.runners.count * config.runners.gpus + 1 <= _gpus(name)
    assert str(config.store.path).startswith("/store/")
    if name == "rayjob.yaml":
        assert _documents(name)[-1]["spec"]["entrypointNumGpus"] == 1
    else:
        assert "ray-ctrl submit --address http://127.0.0.1:8265 --auth token --gpus 1" in text
    assert "token" in (str(_cluster(name)["authOptions"]) if name != "ray-up.yaml" else text)


@pytest.mark.parametrize(("status", "starts"), [(0, 1), (2, 1), (143, 1), (1, 3)])
def test_a_job_continues_after_a_crash_but_not_after_a_mistake(tmp_path: Path, status: int, starts: int) -> None:
    program = tmp_path / "ray-ctrl"
    program.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ntouch {tmp_path}/run.json\nexit {status}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    spec = _documents("rayjob.yaml")[-1]["spec"]
    assert spec["backoffLimit"] == 0
    entrypoint = spec["entrypoint"].replace("/shared/runs/first", str(tmp_path))
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", entrypoint], env=path, timeout=30, check=False)
    calls = (tmp_path / "calls").read_text("utf-8").splitlines()
    assert (done.returncode, len(calls)) == (status, starts)
    assert calls[0].startswith("train --preset molmoe-1b")
    assert all(call.startswith("train --resume") for call in calls[1:])


def test_slurm_script_starts_ray_trains_and_queues_itself_again_when_called_to_stop(tmp_path: Path) -> None:
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
    called = calls.read_text("utf-8")
    assert "ray start --head --port=24711 --num-cpus=16 --num-gpus=4 --block" in called
    assert "runners.address=127.0.0.1:24711" in called
    assert "--preset molmoe-1b runners.count=7 grpo.groups_per_iteration=56" in called
    assert f"store.path={tmp_path}/store/outcomes.sqlite" in called
    assert called.rstrip().endswith("scontrol requeue 4711")
    assert (tmp_path / "store").is_dir()


def test_serve_files_are_serves_own_and_agree() -> None:
    from ray.serve.schema import ServeDeploySchema

    alone = _documents("serve.yaml")[0]
    on_kubernetes = yaml.safe_load(_documents("rayservice.yaml")[0]["spec"]["serveConfigV2"])
    assert alone == on_kubernetes
    (application,) = ServeDeploySchema.model_validate(alone).applications
    assert application.import_path == "ray_ctrl.serve.app:build"
    assert settings_of(application.args).late == "refuse"


def test_the_dashboard_shows_metrics_that_exist() -> None:
    import ray_ctrl.serve.monitoring as monitoring

    source = Path(monitoring.__file__).read_text("utf-8")
    text = (FOLDER / "grafana.json").read_text("utf-8")
    plotted = set(re.findall(r"ray_ray_ctrl_serve_(\w+?)(?:_total|_bucket)?\b", text))
    assert len(json.loads(text)["panels"]) == 8
    assert {f'"{name}"' in source for name in plotted} == {True}
    assert plotted >= {"requests", "violations", "plans", "latency_ms", "queue_ms", "pending", "drift_ratio"}
