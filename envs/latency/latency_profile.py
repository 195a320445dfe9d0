"""The profile: measured latencies of requests, with the identity of device, model and software."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import TypeAdapter, ValidationError

from envs.errors import UserError
from envs.files import atomic_write
from envs.knobs import ExecutionPlan
from envs.latency.record import LatencyRecord, RequestShape

if TYPE_CHECKING:
    from envs.contracts import Engine

FORMAT_VERSION: Final = 1
_PACKAGES: Final = ("torch", "numpy", "pillow")


@dataclass(frozen=True)
class Identity:
    """What latency depends on apart from the request; a profile is valid for one identity.

    Attributes:
        device: name of the processor or GPU.
        model: fingerprint of weights and configuration.
        versions: of Python and the packages that run the model.
    """

    device: str
    model: str
    dtype: str
    threads: int
    versions: Mapping[str, str]

    @classmethod
    def of(cls, engine: "Engine") -> "Identity":
        """The identity of this process running `engine`'s model."""
        import torch

        parameter = next(iter(engine.model.parameters()))
        return cls(
            device=device_name(str(parameter.device)),
            model=engine.model.fingerprint,
            dtype=str(parameter.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            versions={"python": platform.python_version(), **{p: metadata.version(p) for p in _PACKAGES}},
        )

    def difference(self, other: "Identity") -> str | None:
        """The first difference as `field: ours against theirs`; None if the identities are equal."""
        for what in ("device", "model", "dtype", "threads"):
            if getattr(self, what) != getattr(other, what):
                return f"{what}: {_short(getattr(self, what))} against {_short(getattr(other, what))}"
        for package in sorted({*self.versions, *other.versions}):
            ours, theirs = self.versions.get(package), other.versions.get(package)
            if ours != theirs:
                return f"{package} version: {ours} against {theirs}"
        return None


@dataclass(frozen=True)
class Cell:
    """One (request, plan) measured several times.

    Attributes:
        median: median of every stage, ms.
        totals_ms: latency of every repeat, ms.
    """

    shape: RequestShape
    plan: ExecutionPlan
    new_tokens: int
    median: LatencyRecord
    totals_ms: tuple[float, ...]


@dataclass(frozen=True)
class LatencyProfile:
    """Cells of one identity, with the sizes of the model's reference request; stored as JSON."""

    identity: Identity
    reference: RequestShape
    cells: tuple[Cell, ...]

    def check(self, identity: Identity) -> None:
        """Raise a UserError that names the first difference from `identity`."""
        difference = self.identity.difference(identity)
        if difference is not None:
            raise UserError(
                f"the profile has another identity ({difference} here): measure this device with `ray-ctrl "
                f"profile`, or leave it to the run (latency.profile=null)"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON to `path` atomically."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "LatencyProfile":
        """Read a profile; a UserError if the file is missing, damaged or of another format version."""
        advice = "measure a new one with `ray-ctrl profile`"
        try:
            body = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read profile {path}: {error.strerror}; {advice}") from None
        except ValueError as error:
            raise UserError(f"profile {path} is not valid JSON: {error}; {advice}") from None
        if not isinstance(body, dict) or body.get("format_version") != FORMAT_VERSION:
            seen = body.get("format_version") if isinstance(body, dict) else type(body).__name__
            raise UserError(f"profile {path} has format {seen!r}, this version reads {FORMAT_VERSION}; {advice}")
        try:
            return TypeAdapter(cls).validate_python({key: body.get(key) for key in ("identity", "reference", "cells")})
        except (ValidationError, UserError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"profile {path} is damaged ({reason}); {advice}") from None


@lru_cache(maxsize=8)
def device_name(device: str) -> str:
    """Readable name of a torch device: the GPU's, or the CPU's model and core count."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(torch.device(device))
    if device != "cpu":
        return f"{device} on {platform.machine()}"
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
