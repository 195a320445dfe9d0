"""Experiment trackers (`run.tracker`) through Ray's own integrations, and Ray's Prometheus endpoint.

`mlflow:URI` (a server or `sqlite:///FILE`) or `wandb:PROJECT`. A resumed run continues its entry: iterations of
metrics.jsonl that never arrived are sent, and those repeated after a crash, with the same numbers, are not sent twice.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from envs.errors import UserError, first_line
from envs.files import write_json
from ray_ctrl.load_config import flat

FILE = "tracking.json"


class Tracker(Protocol):
    """Receives each row of metrics.jsonl."""

    def log(self, row: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def open_tracker(
    track: str | None, config: Mapping[str, Any], folder: Path, rows: Iterable[Mapping[str, Any]] = ()
) -> Tracker | None:
    """The tracker of a run; None if none is configured.

    Args:
        config: the run's configuration, logged as parameters.
        folder: the run folder, where the tracker's id of the run is stored.
        rows: metrics.jsonl of a resumed run.

    Raises:
        UserError: the tracker's package is missing, or it cannot be reached.
    """
    if track is None:
        return None
    kind, _, target = track.partition(":")
    try:
        return (_MLflow if kind == "mlflow" else _WandB)(target, flat(config), folder, rows)
    except ImportError as error:
        package = "mlflow-skinny" if kind == "mlflow" else "wandb"
        raise UserError(
            f"run.tracker = {track!r} needs a package that is not installed ({error}): pip install {package}"
        ) from None
    except Exception as error:
        raise UserError(
            f"run.tracker = {track!r} cannot be used ({first_line(error)}): check it, or set run.tracker=null"
        ) from error


class _Entry(ABC):
    """A run's entry in a tracker, which has every step up to `last_step` once.

    Args:
        missing: rows of metrics.jsonl so far; those that the entry does not have are sent.
    """

    last_step: int

    def __init__(self, target: str, config: Mapping[str, Any], folder: Path, missing: Iterable[Mapping[str, Any]]):
        self._open(target, config, folder, _known(folder))
        for row in missing:
            self.log({key: value for key, value in row.items() if key != "iteration"}, row["iteration"])

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Sends a row unless the entry has it."""
        if step > self.last_step:
            self._send(dict(row), step)
            self.last_step = step

    @abstractmethod
    def _open(self, target: str, config: Mapping[str, Any], folder: Path, known: str | None) -> None: ...

    @abstractmethod
    def _send(self, row: dict[str, float], step: int) -> None: ...


class Gauges:
    """An iteration's metrics as gauges `ray_ctrl_<metric>` at Ray's Prometheus endpoint.

    Slashes become underscores, and Ray adds its prefix `ray_`. The label `run` is the run folder's name, `folder` its
    path: runs of the same name in different folders are different series.
    """

    def __init__(self, folder: Path) -> None:
        self.tags = {"run": folder.name, "folder": str(folder.absolute())}
        self.gauges: dict[str, Any] = {}

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Exports `row`, and `step` as `ray_ctrl_iteration`."""
        from ray.util.metrics import Gauge

        for key, value in {**row, "iteration": float(step)}.items():
            name = "ray_ctrl_" + re.sub(r"\W", "_", key)
            if name not in self.gauges:
                self.gauges[name] = Gauge(name, description=f"{key} of the last iteration", tag_keys=tuple(self.tags))
            self.gauges[name].set(float(value), tags=self.tags)

    def close(self) -> None:
        """Nothing to do: Ray drops the gauges of processes that ended."""


def _known(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / FILE).read_text("utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# A dead server is an error after half a minute instead of the hour that MLflow's default retries take.
_MLFLOW_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class _MLflow(_Entry):
    def _open(self, uri: str, config: Mapping[str, Any], folder: Path, known: str | None) -> None:
        for name, value in _MLFLOW_RETRIES.items():
            os.environ.setdefault(name, value)
        if uri.startswith(("file:", "/")):
            # Folders are deprecated; MLflow requires this variable to use one.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.last_step = -1
        if known is not None:
            import mlflow

            mlflow.set_tracking_uri(uri)
            mlflow.start_run(run_id=known)
            self.mlflow: Any = mlflow
            self.last_step = _last_step(mlflow.MlflowClient(uri), known)
            return
        from ray.air.integrations.mlflow import setup_mlflow

        with _missing_package():
            self.mlflow = setup_mlflow(
                dict(config),
                tracking_uri=uri,
                experiment_name="ray-ctrl",
                run_name=folder.name,
                create_experiment_if_not_exists=True,
                rank_zero_only=False,
            )
        write_json(folder / FILE, {"id": self.mlflow.active_run().info.run_id})

    def _send(self, row: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(row, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


def _last_step(client: Any, run_id: str) -> int:
    """The last step logged to the entry; -1 without any."""
    keys = client.get_run(run_id).data.metrics
    steps = [max(point.step for point in client.get_metric_history(run_id, key)) for key in keys]
    return max(steps, default=-1)


class _WandB(_Entry):
    def _open(self, project: str, config: Mapping[str, Any], folder: Path, known: str | None) -> None:
        from ray.air.integrations.wandb import setup_wandb

        with _missing_package():
            self.run: Any = setup_wandb(
                dict(config),
                project=project,
                name=folder.name,
                dir=str(folder),
                rank_zero_only=False,
                **({"id": known, "resume": "must"} if known else {}),
            )
        self.last_step = self.run.step - 1
        write_json(folder / FILE, {"id": self.run.id})

    def _send(self, row: dict[str, float], step: int) -> None:
        # Without `commit` W&B keeps the row until the next one comes, and loses it if the process is killed before.
        self.run.log(row, step=step, commit=True)

    def close(self) -> None:
        self.run.finish()


@contextmanager
def _missing_package() -> Iterator[None]:
    """Ray's integrations raise a RuntimeError for a package that is not installed."""
    try:
        yield
    except RuntimeError as error:
        if "not found" in str(error):
            raise ImportError(str(error)) from None
        raise
