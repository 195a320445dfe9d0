"""`ray-ctrl serve`: a controller behind HTTP on Ray Serve, here or on a running cluster."""

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from ray import serve

from cluster.connect import connect, is_local
from cluster.resources import ResourcePlan, Role
from envs.errors import UserError
from ray_ctrl.console import console
from ray_ctrl.controllers import controller_folder
from ray_ctrl.serve.app import build, settings_of

NAME = "ray-ctrl"


def run(path: Path, overrides: Sequence[str], host: str, port: int, address: str) -> None:
    """Serves until interrupted.

    Raises:
        UserError: no controller at `path`, a wrong key or value, no Ray, or a port in use.
    """
    place = str(path.absolute() if path.exists() else path)
    arguments = {"controller": place} | dict(map(_override, overrides))
    settings = settings_of(arguments)
    controller_folder(settings.controller)
    there = torch.cuda.device_count() if is_local(address) else 0
    gpus = float(there > 0) if settings.gpus is None else settings.gpus
    plan = ResourcePlan((Role("replica", settings.replicas or max(1, there), settings.cpus, gpus),))
    with connect(address, plan, timeout_s=60.0):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(build(arguments), name=NAME, route_prefix="/")
            node = next(node for node in ray.nodes() if node["Alive"])
            metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            console.print(
                f"serving {path} at http://{host}:{port}/ until Ctrl-C\nmetrics at {metrics}",
                markup=False,
            )
            signal.pause()
        finally:
            if is_local(address):
                serve.shutdown()
            else:
                serve.delete(NAME)


def _override(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{word!r} is no KEY=VALUE: keys are in docs/serving.md")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{word!r} is no KEY=VALUE: quote the value") from None
