"""`run.tracker`: rows reach MLflow's local store once, a resumed run continues its entry, errors are one line.
`run.prometheus`: the names of the exported metrics.
"""

import importlib.util
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.errors import UserError
from ray_ctrl.load_config import load_config
from ray_ctrl.tracking import Gauges, open_tracker

CONFIG = {"grpo": {"lr": 0.001}, "run": {"seed": 3}}


def test_none_is_none(tmp_path: Path) -> None:
    assert load_config("smoke").run.tracker is None
    assert open_tracker(None, CONFIG, tmp_path) is None


def test_mlflow_keeps_rows_and_settings_over_a_resume(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is a development dependency")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tmp_path / "my-run"
    run.mkdir()
    for steps in ((1, 2), (2, 3)):  # then the resumed run, which does the iteration after its last checkpoint again
        tracker = open_tracker(f"mlflow:{uri}", CONFIG, run)
        assert tracker is not None
        for step in steps:
            tracker.log({"reward": step / 10, "validation/reward": 1.0}, step)
        tracker.close()
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("ray-ctrl")
    entries = client.search_runs([experiment.experiment_id])
    assert len(entries) == 1
    assert entries[0].info.run_name == "my-run"
    assert entries[0].data.params == {"grpo.lr": "0.001", "run.seed": "3"}
    history = client.get_metric_history(entries[0].info.run_id, "reward")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert entries[0].info.status == "FINISHED"


def points_of(uri: str) -> list[tuple[int, float]]:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is a development dependency")
    client = mlflow.MlflowClient(uri)
    entries = client.search_runs([client.get_experiment_by_name("ray-ctrl").experiment_id])
    assert len(entries) == 1
    return [(point.step, point.value) for point in client.get_metric_history(entries[0].info.run_id, "reward")]


def test_mlflow_gets_what_it_missed_and_nothing_twice(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    rows = [{"iteration": step, "reward": step / 10} for step in (1, 2, 3, 4)]
    tracker = open_tracker(f"mlflow:{uri}", CONFIG, tmp_path)
    assert tracker is not None
    for step in (1, 2, 2, 1, 2):  # a learner died twice within the process, and its iterations were done again
        tracker.log({"reward": step / 10}, step)
    tracker.close()
    # Iterations 3 and 4 were written to metrics.jsonl while the tracker was away, or switched off.
    resumed = open_tracker(f"mlflow:{uri}", CONFIG, tmp_path, rows)
    assert resumed is not None
    resumed.log({"reward": 0.5}, 5)
    resumed.close()
    assert points_of(uri) == [(step, step / 10) for step in (1, 2, 3, 4, 5)]


class WandBServer:
    """What Weights & Biases keeps of a run: committed steps; a resumed run continues after the last of them."""

    def __init__(self) -> None:
        self.history: dict[int, float] = {}
        self.resumed: list[dict[str, Any]] = []

    def setup_wandb(self, config: Any, **given: Any) -> "WandBServer.Run":
        self.resumed.append({key: given[key] for key in ("id", "resume") if key in given})
        return WandBServer.Run(self)

    class Run:
        id = "entry-1"

        def __init__(self, server: "WandBServer") -> None:
            self.server, self.step = server, max(server.history, default=-1) + 1

        def log(self, row: dict[str, float], step: int, commit: bool | None = None) -> None:
            if step < self.step:  # W&B warns and drops it
                return
            self.step = step
            if commit:
                self.server.history[step] = row["reward"]
                self.step += 1

        def finish(self) -> None:
            pass


def test_wandb_gets_what_it_missed_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WandBServer()
    monkeypatch.setattr("ray.air.integrations.wandb.setup_wandb", server.setup_wandb)
    rows = [{"iteration": step, "reward": step / 10} for step in (1, 2, 3, 4)]
    tracker = open_tracker("wandb:me", CONFIG, tmp_path)
    assert tracker is not None
    for step in (1, 2):
        tracker.log({"reward": step / 10}, step)
    # Killed: nothing is closed. What was logged last is there; iterations 3 and 4 never arrived.
    assert server.history == {1: 0.1, 2: 0.2}
    resumed = open_tracker("wandb:me", CONFIG, tmp_path, rows)
    assert resumed is not None
    for step in (4, 5):
        resumed.log({"reward": step / 10}, step)
    resumed.close()
    assert server.history == {step: step / 10 for step in (1, 2, 3, 4, 5)}
    assert server.resumed == [{}, {"id": "entry-1", "resume": "must"}]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.tracker = 'wandb:me' needs a package.*pip install wandb"):
        open_tracker("wandb:me", CONFIG, tmp_path)


def test_an_unreachable_tracker_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(UserError, match=r"cannot be used.*run.tracker=null") as caught:
        open_tracker("mlflow:nonsense://x", CONFIG, tmp_path)
    assert "\n" not in caught.value.message


def test_a_dead_server_is_an_error_within_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"run.tracker = 'mlflow:http://127.0.0.1:9' cannot be used"):
        open_tracker("mlflow:http://127.0.0.1:9", CONFIG, tmp_path)
    assert time.monotonic() - begun < 60


def test_other_trackers_are_refused() -> None:
    with pytest.raises(UserError, match=r"run.tracker = 'comet:x' is not allowed"):
        load_config("smoke", overrides=["run.tracker=comet:x"])


def test_prometheus_names_are_those_of_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: dict[str, Any] = {}

    def gauge(name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        return SimpleNamespace(set=lambda value, tags: exported.update({f"ray_{name}": (value, tags)}))  # as Ray does

    monkeypatch.setattr("ray.util.metrics.Gauge", gauge)
    gauges = Gauges(Path("/shared/runs/my-run"))
    gauges.log({"reward": 0.25, "violations": 0.5, "validation/score": 0.75}, 6)
    gauges.log({"reward": 0.5}, 7)
    page = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text("utf-8")
    assert set(exported) == set(re.findall(r"`(ray_ray_ctrl_\w+)`", page))
    assert {name: value for name, (value, _) in exported.items()} == {
        "ray_ray_ctrl_reward": 0.5,
        "ray_ray_ctrl_violations": 0.5,
        "ray_ray_ctrl_validation_score": 0.75,
        "ray_ray_ctrl_iteration": 7.0,
    }
    assert all(tags == {"run": "my-run", "folder": "/shared/runs/my-run"} for _, tags in exported.values())
    assert Gauges(Path("/other/my-run")).tags != gauges.tags, "runs of one name are two series"
