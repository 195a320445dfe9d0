"""Experiment trackers by one setting, `run.tracker`, through Ray's own integrations; and Ray's Prometheus endpoint.

`mlflow:URI` (a server, `sqlite:///FILE` or `file:///FOLDER`) or `wandb:PROJECT`. A resumed run continues its
entry; iterations done again after a crash are logged again.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from envs.errors import UserError
from envs.files import write_json

FILE = "tracking.json"
FORM = r"^(mlflow|wandb):\S+$"


class Tracker(Protocol):
    """Where rows go besides metrics.jsonl."""

    def log(self, row: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def open_tracker(track: str | None, settings: Mapping[str, Any], folder: Path) -> Tracker | None:
    """The tracker of a run; None where none is set.

    Args:
        settings: the run's configuration, logged as parameters.
        folder: the run folder; keeps the tracker's own id of the run.

    Raises:
        UserError: the tracker's package is missing, or it cannot be reached.
    """
    if track is None:
        return None
    kind, _, target = track.partition(":")
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    try:
        return _MLflow(target, flat, folder) if kind == "mlflow" else _WandB(target, flat, folder)
    except ImportError as error:
        package = "mlflow-skinny" if kind == "mlflow" else "wandb"
        raise UserError(
            f"run.tracker = {track!r} needs a package that is not there ({error}): pip install {package}"
        ) from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"run.tracker = {track!r} cannot be used ({reason}): check it, or set run.tracker=null"
        ) from error


class Gauges:
    """An iteration's numbers as gauges `ray_ctrl_<number>`, tagged with the run, at Ray's Prometheus endpoint.

    Slashes in a number's name become underscores. Ray adds a prefix of its own, `ray_`.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.gauges: dict[str, Any] = {}

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Show `row`, and `step` as `ray_ctrl_iteration`."""
        from ray.util.metrics import Gauge

        for key, value in {**row, "iteration": float(step)}.items():
            name = "ray_ctrl_" + re.sub(r"\W", "_", key)
            if name not in self.gauges:
                self.gauges[name] = Gauge(name, description=f"{key} of the last iteration", tag_keys=("run",))
            self.gauges[name].set(float(value), tags={"run": self.run})

    def close(self) -> None:
        """Nothing is held; Ray drops the numbers of processes that ended."""


def _known(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / FILE).read_text("utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _MLflow:
    def __init__(self, uri: str, settings: Mapping[str, Any], folder: Path) -> None:
        if uri.startswith(("file:", "/")):
            # MLflow asks for this word since it prefers databases to folders.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        known = _known(folder)
        if known is not None:
            import mlflow

            mlflow.set_tracking_uri(uri)
            mlflow.start_run(run_id=known)
            self.mlflow: Any = mlflow
            return
        try:
            from ray.air.integrations.mlflow import setup_mlflow

            self.mlflow = setup_mlflow(
                dict(settings),
                tracking_uri=uri,
                experiment_name="ray-ctrl",
                run_name=folder.name,
                create_experiment_if_not_exists=True,
                rank_zero_only=False,
            )
        except RuntimeError as error:
            if "not found" in str(error):
                raise ImportError(str(error)) from None
            raise
        write_json(folder / FILE, {"id": self.mlflow.active_run().info.run_id})

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(row), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class _WandB:
    def __init__(self, project: str, settings: Mapping[str, Any], folder: Path) -> None:
        from ray.air.integrations.wandb import setup_wandb

        known = _known(folder)
        try:
            self.run: Any = setup_wandb(
                dict(settings),
                project=project,
                name=folder.name,
                dir=str(folder),
                rank_zero_only=False,
                **({"id": known, "resume": "must"} if known else {}),
            )
        except RuntimeError as error:
            if "not found" in str(error):
                raise ImportError(str(error)) from None
            raise
        write_json(folder / FILE, {"id": self.run.id})

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.run.log(dict(row), step=step)

    def close(self) -> None:
        self.run.finish()
