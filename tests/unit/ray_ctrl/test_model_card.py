"""An exported controller describes itself: a model card with what it was trained on and how it did."""

import json
from pathlib import Path
from typing import Any

import pytest

from policies.controller import CARD_FILE, Controller
from ray_ctrl.controllers import controller_folder
from ray_ctrl.model_card import describe_export

METADATA: dict[str, Any] = {
    "fingerprint": "abcdef0123456789",
    "config": {"model": {"name": "embedded"}, "task": {"name": "scenes"}, "latency": {"source": "profiled"}},
    "budgets": {"low_ms": 20.0, "high_ms": 61.25},
    "device": "a laptop, 2 cores",
    "reference_ms": 80.0,
    "guardrail": {"confidence": 0.95},
    "iteration": 90,
    "validation_score": 0.71,
    "versions": {"torch": "2.11"},
}
ROW = {"accuracy": 0.75, "accuracy_error": 0.02, "violations": 0.014, "latency_ms": 33.0, "latency_p95_ms": 41.0}
SUMMARY = {
    "per_budget": {"controller": [{"budget_ms": 30.0, **ROW}]},
    "methods": {"full plan": ROW | {"accuracy": 0.8}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Controller(6, 8).save(tmp_path / "controller", METADATA)


def test_the_card_says_what_was_trained(folder: Path) -> None:
    describe_export(folder)
    card = (folder / "README.md").read_text("utf-8")
    for words in (
        "abcdef012345`",
        "task `scenes`, 90 iterations",
        "a laptop, 2 cores",
        "20.0 to 61.2 ms",
        "95%",
        "0.710",
    ):
        assert words in card
    assert "Not evaluated yet" in card
    assert "base_model" not in card
    assert card.startswith("---\nlibrary_name: ray-ctrl\n")


def test_the_held_out_table_is_stored_and_printed(folder: Path) -> None:
    describe_export(folder, SUMMARY)
    _, metadata = Controller.load(folder)
    assert metadata["held_out"][0] == {"method": "controller", "budget_ms": 30.0, **ROW}
    card = (folder / "README.md").read_text("utf-8")
    assert "| controller | 30.0 | 0.750 | 1.4% | 33.0 | 41.0 |" in card
    assert "| full plan | all | 0.800 |" in card
    describe_export(folder)
    assert (folder / "README.md").read_text("utf-8") == card


def test_a_model_of_the_hub_is_the_base_model(folder: Path) -> None:
    content = json.loads((folder / CARD_FILE).read_text("utf-8"))
    content["metadata"]["config"]["model"]["name"] = "allenai/MolmoE-1B-0924"
    (folder / CARD_FILE).write_text(json.dumps(content))
    describe_export(folder)
    assert "\nbase_model: allenai/MolmoE-1B-0924\n" in (folder / "README.md").read_text("utf-8")


def test_a_controller_comes_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, **more: Any) -> Any:
        asked.append((name, more["allow_patterns"]))
        return [] if more.get("dry_run") else str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert controller_folder("someone/controller") == folder
    assert asked[-1] == ("someone/controller", ["controller.json", "controller.safetensors", "README.md"])
    assert controller_folder(folder) == folder
    assert controller_folder(folder.parent) == folder
