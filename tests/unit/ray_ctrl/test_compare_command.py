"""Which runs `ray-ctrl compare` compares, and under which labels."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from envs.errors import UserError
from ray_ctrl.commands import compare


@pytest.fixture(autouse=True)
def _controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(grpo=SimpleNamespace(advantages="known"))
    monkeypatch.setattr(compare, "find_controller", lambda path: (path / "controller", path))
    monkeypatch.setattr(compare, "controller_config", lambda metadata, folder: config)
    monkeypatch.setattr(compare.Controller, "load", lambda folder: (None, {}))


def labels(*given: str) -> list[tuple[str, int, str]]:
    return [(run.label, run.seed, str(run.home)) for run in compare.named(given, ())]


def test_runs_of_one_label_are_its_seeds() -> None:
    assert labels("ours=a", "b", "ours=c") == [("ours", 0, "a"), ("GRPO, known", 0, "b"), ("ours", 1, "c")]


def test_paths_may_contain_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lr=0.1").mkdir(parents=True)
    assert labels("runs/lr=0.1") == [("GRPO, known", 0, "runs/lr=0.1")]
    assert labels("ours=runs/lr=0.1") == [("ours", 0, "runs/lr=0.1")]


@pytest.mark.parametrize("label", ["ridge", "ridge + mask", "one plan per budget", "tier alone", "without the mask"])
def test_labels_of_other_rows_are_refused(label: str) -> None:
    with pytest.raises(UserError, match=r"label .* is that of another row .* choose another"):
        labels(f"{label}=a")
