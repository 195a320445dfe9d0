"""What `ray-ctrl importance` shows, where it writes, and what follows for controllers; nothing is measured here."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from envs.budgets import BudgetDistribution
from envs.errors import UserError
from envs.model.block_importance import PUBLISHED_IMPORTANCE, Importance
from envs.model.config import MolmoEConfig, VisionConfig
from ray_ctrl import run_context as settings
from ray_ctrl.commands import importance as room
from ray_ctrl.commands import inspect as inspection
from ray_ctrl.console import console
from ray_ctrl.load_config import load_config

VISION = VisionConfig(336, 14, 1024, 23, 16, 64, 4096, 1e-5, (-2, -9), (2, 2))
FULL = MolmoEConfig(2048, 16, 16, 64, 1024, 50280, 50304, 128, 1e-5, 1e4, 4096, 50279, 1, 1024, 12, (4, 4), VISION)
SCORES = (9.0, *(float(16 - block) for block in range(1, 16)))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Importance(SCORES, (0.0, *(0.5,) * 15), "cross_entropy", 1.25, 12, "high")
    engine = SimpleNamespace(model=SimpleNamespace(config=FULL, fingerprint="abc"))
    monkeypatch.setattr(room, "measure", lambda *_: (found, engine))


def run(overrides: list[str], out: Path | None = None, split: str = "validation") -> str:
    with console.capture() as shown:
        room.run("laptop", None, overrides, samples=12, split=split, by="cross_entropy", out=out)
    return shown.get()


@pytest.mark.usefixtures("measured")
def test_a_full_size_model_is_compared_with_the_published_scores(tmp_path: Path) -> None:
    shown = run([f"model.name={tmp_path}"])
    assert "left out first: blocks 15, 14, 13, 12" in shown
    assert "published: blocks 4, 13, 10, 2 first; rank correlation over blocks 1 to 15" in shown
    assert "used from now on" in shown
    content = json.loads((tmp_path / "importance.json").read_text())
    assert content["importance"] == list(SCORES)
    assert content["compared_with"]["published"]["importance"] == list(PUBLISHED_IMPORTANCE)
    with pytest.raises(UserError, match="exists already"):
        run([f"model.name={tmp_path}"])
    again = run([f"model.name={tmp_path}"], tmp_path / "other.json")
    assert "in use: blocks 15, 14, 13, 12 first; rank correlation over blocks 1 to 15 1.000" in again
    assert f"use it with model.block_importance={tmp_path / 'other.json'}" in again.replace("\n", "")


@pytest.mark.usefixtures("measured")
def test_there_must_be_a_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="someone/model is no local folder; give a file"):
        run(["model.name=someone/model"])
    with pytest.raises(UserError, match="there is no folder"):
        run([], tmp_path / "no" / "file.json")
    with pytest.raises(UserError, match="test samples choose nothing"):
        run([], tmp_path / "file.json", split="test")


@pytest.mark.usefixtures("measured")
def test_an_importance_file_is_inspected(tmp_path: Path) -> None:
    run([], tmp_path / "scores.json")
    with console.capture() as shown:
        inspection.run(tmp_path / "scores.json")
    assert "left out first" in shown.get()
    assert "blocks 15, 14, 13, 12" in shown.get()


def test_a_controller_keeps_to_the_order_it_was_trained_with() -> None:
    engine = SimpleNamespace(importance=SCORES)
    settings.check_importance(engine, {})
    settings.check_importance(engine, {"importance": [2 * score for score in SCORES]})
    # Blocks 1 and 2 are never among those left out: that they changed places changes nothing.
    settings.check_importance(engine, {"importance": [9.0, SCORES[2], SCORES[1], *SCORES[3:]]})
    with pytest.raises(UserError, match=r"blocks 4, 13, 10, 2 first, here 15, 14, 13, 12\)"):
        settings.check_importance(engine, {"importance": list(PUBLISHED_IMPORTANCE)})


@pytest.mark.parametrize(
    ("given", "words"),
    [((5, 20), "cheapest plan, 80.0 ms for the full one"), ((90, 100), "there is little to learn")],
)
def test_given_budgets_are_compared_with_the_device(
    monkeypatch: pytest.MonkeyPatch, given: tuple[float, float], words: str
) -> None:
    monkeypatch.setattr(settings, "budget_range", lambda *_: (20.0, 80.0))
    setting = settings.Setting(load_config("smoke"), engine=None)
    world = SimpleNamespace(engine=None, clock=None, space=None, samples=())
    monkeypatch.setattr(settings.Setting, "build", lambda *_: world)
    with console.capture() as shown:
        settings._compare_with_device(setting, BudgetDistribution.over(*given))
    assert words in shown.get()


def test_budgets_that_no_plan_meets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "budget_range", lambda *_: (20.0, 80.0))
    monkeypatch.setattr(settings.Setting, "build", lambda *_: SimpleNamespace(engine=0, clock=0, space=0, samples=()))
    setting = settings.Setting(load_config("smoke"), engine=None)
    with pytest.raises(UserError, match=r"too small for this device: its cheapest plan takes 20\.0 ms"):
        settings._compare_with_device(setting, BudgetDistribution.over(5, 10))
