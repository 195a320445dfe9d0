"""Settings of a deployment: arguments of serve.yaml, and overrides of `ray-ctrl serve`."""

from typing import Literal

from pydantic import Field

from envs.section import Int, Section


class ReplicaSettings(Section):
    """What a replica does with requests."""

    model: str | None = Field(default=None, description="Model; `null` takes the one the controller was trained on.")
    late: Literal["refuse", "cheapest"] = Field(
        default="refuse",
        description="Requests that no plan can answer within the budget any more: `refuse` answers 503 immediately, "
        "`cheapest` runs the cheapest plan.",
    )
    max_queue: Int = Field(
        default=16, ge=1, le=10_000, description="Requests that a replica accepts before it has answered; then 503."
    )
    max_budget_ms: float = Field(default=60_000.0, gt=0, le=3.6e6, description="Largest budget accepted, ms.")
    reserve_ms: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Taken off every budget for the way through Ray Serve's proxy and the network, ms.",
    )
    max_body_mb: float = Field(default=20.0, gt=0, le=1024, description="Largest request body, MB.")
    max_megapixels: float = Field(default=25.0, gt=0, le=89, description="Largest image, millions of pixels.")
    read_timeout_s: float = Field(default=10.0, gt=0, le=600, description="Time a client has to send its request, s.")
    drift_tolerance: float = Field(
        default=0.25,
        gt=0,
        le=10,
        description="Warns when the median of measured / predicted latency leaves 1 by more than this factor.",
    )
    reload_s: float = Field(
        default=2.0, gt=0, le=3600, description="How often a replica looks whether the controller's files changed, s."
    )


class ServeSettings(ReplicaSettings):
    """One deployment of one controller."""

    controller: str = Field(min_length=1, description="Run folder, exported controller or hub id, seen by all nodes.")
    replicas: Int | None = Field(default=None, ge=1, le=4096, description="`null` is one per GPU, without GPUs one.")
    cpus: float = Field(default=1.0, gt=0, le=1024, description="CPUs of a replica.")
    gpus: float | None = Field(
        default=None, ge=0, le=8, description="GPUs of a replica; `null` is 1 where the cluster has any."
    )
