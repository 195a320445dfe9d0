"""The deployment on Ray Serve: `import_path: ray_ctrl.serve.app:build`, arguments as in `ServeSettings`."""

from typing import Any

import ray
from pydantic import ValidationError
from ray import serve

from envs.errors import UserError
from ray_ctrl.serve.server import Server
from ray_ctrl.serve.settings import ReplicaSettings, ServeSettings

SENDING = 256
"""Requests that may be arriving at a replica at the same time, slow senders among them."""


def settings_of(arguments: dict[str, Any]) -> ServeSettings:
    """Checked arguments.

    Raises:
        UserError: naming the first that is wrong.
    """
    try:
        return ServeSettings(**arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        known = ", ".join(ServeSettings.model_fields)
        reason = f"there is no such key: choose among {known}" if name not in known else problem["msg"]
        raise UserError(f"{name} = {problem['input']!r} is not allowed: {reason}") from None


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application: one deployment, a replica per GPU unless configured otherwise."""
    settings = settings_of(arguments)
    cluster_gpus = int(ray.cluster_resources().get("GPU", 0))
    gpus = float(cluster_gpus > 0) if settings.gpus is None else settings.gpus
    replicas = settings.replicas or max(1, cluster_gpus if gpus else 1)
    deployment = serve.deployment(Server).options(
        name="ray-ctrl",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": gpus},
        max_ongoing_requests=settings.max_queue + SENDING,
        max_queued_requests=replicas * settings.max_queue,
        user_config={"controller": settings.controller},
        graceful_shutdown_timeout_s=30,
        health_check_timeout_s=60,
    )
    return deployment.bind({name: getattr(settings, name) for name in ReplicaSettings.model_fields})
