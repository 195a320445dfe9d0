"""What `ray-ctrl importance` prints, where it writes, and what follows for controllers; nothing is measured here."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from envs.errors import UserError
from envs.model.block_importance import PUBLISHED_IMPORTANCE, Importance
from envs.model.config import AdaptiveMolmoEConfig
from ray_ctrl import pipeline
from ray_ctrl.cli import main
from ray_ctrl.commands import importance
from ray_ctrl.commands import inspect as inspection
from ray_ctrl.console import console

FULL = AdaptiveMolmoEConfig()
SCORES = (9.0, *(float(16 - block) for block in range(1, 16)))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Importance(SCORES, (0.0, *(0.5,) * 15), "cross_entropy", 1.25, 12, "high")
    engine = SimpleNamespace(model=SimpleNamespace(config=FULL, fingerprint="abc"))
    monkeypatch.setattr(importance, "measure", lambda *_: (found, engine))


def run(overrides: list[str], out: Path | None = None, split: str = "validation") -> str:
    with console.capture() as printed:
        importance.run("laptop", None, overrides, samples=12, split=split, by="cross_entropy", out=out)
    return printed.get()


@pytest.mark.usefixtures("measured")
def test_a_full_size_model_is_compared_with_the_published_scores(tmp_path: Path) -> None:
    printed = run([f"model.name={tmp_path}"])
    assert "left out first: blocks 15, 14, 13, 12" in printed
    assert "published: blocks 4, 13, 10, 2 first; rank correlation over blocks 1 to 15" in printed
    assert "used from now on" in printed
    content = json.loads((tmp_path / "importance.json").read_text())
    assert content["importance"] == list(SCORES)
    assert content["compared_with"]["published"]["importance"] == list(PUBLISHED_IMPORTANCE)
    with pytest.raises(UserError, match="exists already"):
        run([f"model.name={tmp_path}"])
    again = run([f"model.name={tmp_path}"], tmp_path / "other.json")
    assert "in use: blocks 15, 14, 13, 12 first; rank correlation over blocks 1 to 15 1.000" in again
    assert f"use it with model.block_importance={tmp_path / 'other.json'}" in again.replace("\n", "")


@pytest.mark.usefixtures("measured")
def test_scores_are_saved_before_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*given: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(importance.console, "print", closed)
    with pytest.raises(BrokenPipeError):
        run([f"model.name={tmp_path}"])
    assert json.loads((tmp_path / "importance.json").read_text())["importance"] == list(SCORES)


@pytest.mark.parametrize("command", ["profile", "importance"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(folder: Path) -> None:
        raise UserError(f"cannot write {folder}: Read-only file system")

    monkeypatch.setattr(f"ray_ctrl.commands.{command}.check_writable", read_only)
    monkeypatch.setattr("envs.env_resources.EnvConfig.build_engine", lambda *given: pytest.fail("worked first"))
    assert main([command, "--out", str(tmp_path / "out.json")]) == 2
    assert "Read-only file system" in capsys.readouterr().err


@pytest.mark.usefixtures("measured")
def test_there_must_be_a_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="someone/model is no local folder; give a file"):
        run(["model.name=someone/model"])
    with pytest.raises(UserError, match="there is no folder"):
        run([], tmp_path / "no" / "file.json")
    with pytest.raises(UserError, match="test samples must choose nothing"):
        run([], tmp_path / "file.json", split="test")


@pytest.mark.usefixtures("measured")
def test_an_importance_file_is_inspected(tmp_path: Path) -> None:
    run([], tmp_path / "scores.json")
    with console.capture() as printed:
        inspection.run(tmp_path / "scores.json")
    assert "left out first" in printed.get()
    assert "blocks 15, 14, 13, 12" in printed.get()


def test_a_controller_requires_the_order_it_was_trained_with() -> None:
    engine = SimpleNamespace(importance=SCORES)
    pipeline.check_importance(engine, {})
    pipeline.check_importance(engine, {"importance": [2 * score for score in SCORES]})
    # Blocks 1 and 2 are never among those left out: that they changed places changes nothing.
    pipeline.check_importance(engine, {"importance": [9.0, SCORES[2], SCORES[1], *SCORES[3:]]})
    with pytest.raises(UserError, match=r"blocks 4, 13, 10, 2 first, here 15, 14, 13, 12\)"):
        pipeline.check_importance(engine, {"importance": list(PUBLISHED_IMPORTANCE)})
