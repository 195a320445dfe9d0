"""A run that takes itself back to its last checkpoint: each iteration is recorded once, wherever it is recorded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.budgets import BudgetDistribution
from policies.grpo.learner import LearnerDied
from ray_ctrl import trainer as training
from ray_ctrl.load_config import load_config
from ray_ctrl.run_folder import RunFolder
from ray_ctrl.signals import Stopper

LOST = (4, 5)  # iterations in which a learner dies at first


class Algorithm:
    """Its reward is the iteration, plus 100 before the last loss."""

    def __init__(self, left: list[int]) -> None:
        self.left, self.iteration = left, 0

    def train(self) -> dict[str, Any]:
        self.iteration += 1
        if self.left and self.iteration == self.left[0]:
            self.left.pop(0)
            raise LearnerDied("a learner died")
        numbers = {"accuracy_mean": 0.5, "latency_ms_mean": 10.0, "violation_rate": 0.0}
        return {"grpo": {"reward_mean": self.iteration + 100.0 * bool(self.left)} | numbers}

    def engine_stats(self) -> dict[str, float]:
        return {}

    def save_to_path(self, place: Path) -> None:
        place.mkdir(exist_ok=True)
        (place / "iteration").write_text(str(self.iteration), encoding="utf-8")

    def controller(self) -> Any:
        return SimpleNamespace(save=lambda place, metadata: place.mkdir())

    def stop(self) -> None:
        pass


def restore(algorithm: Algorithm, place: Path) -> None:
    algorithm.iteration = int((place / "iteration").read_text("utf-8"))


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> training.Trainer:
    overrides = ["run.iterations=6", "run.checkpoint_every=2", "evaluation.every=0"]
    config = load_config("smoke", None, overrides)
    lost = list(LOST)
    resources = SimpleNamespace(samples=[0])
    context: Any = SimpleNamespace(
        build=lambda split: resources, budgets=BudgetDistribution.over(10.0, 80.0), metadata=dict, inputs={}
    )
    monkeypatch.setattr(training, "describe_export", lambda controller: None)
    monkeypatch.setattr("ray_ctrl.rllib_setup.build_algorithm", lambda *given: Algorithm(lost))
    monkeypatch.setattr("policies.grpo.checkpoint.restore_checkpoint", restore)
    monkeypatch.setattr("cluster.connect.wait_for", lambda *given: {})
    monkeypatch.setattr("ray_ctrl.trainer.describe_export", lambda *given: None)
    layout: Any = SimpleNamespace(envs=4, resources=None)
    return training.Trainer(config, RunFolder.create(tmp_path / "run", config), context, layout)


def test_tensorboard_shows_each_iteration_once(trainer: training.Trainer) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Stopper() as stopper:
        assert trainer.train(stopper)
    trainer.stop()
    rows = [(row["iteration"], row["reward"]) for row in trainer.folder.metrics()]
    assert [iteration for iteration, _ in rows] == [1, 2, 3, 4, 5, 6]
    place = trainer.folder.root / "tensorboard"
    recorded = accumulators.EventAccumulator(str(place)).Reload()
    assert [(event.step, event.value) for event in recorded.Scalars("train/reward")] == rows
    assert all("/" in tag for tag in recorded.Tags()["scalars"]), "tags are in groups"
