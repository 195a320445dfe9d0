"""Environment resources from their configuration."""

import inspect
import pickle
from pathlib import Path

import pytest
import torch
from doubles import EngineDouble, make_resources

from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from envs.budgets import BudgetDistribution
from envs.config import BudgetSettings, LatencySettings, ModelSettings, RewardSettings, TaskSettings
from envs.contracts import Engine, VectorEnvironment
from envs.engine import RolloutEngine
from envs.env_resources import EnvConfig
from envs.errors import UserError
from envs.latency import ProfiledClock, profile
from envs.model.device import resolve_device, resolve_dtype


def test_the_profiled_source_needs_a_profile():
    with pytest.raises(UserError, match="needs a profile"):
        EnvConfig(latency=LatencySettings(source="profiled"))


def _config(**budgets):
    return EnvConfig(latency=LatencySettings(source="roofline"), budgets=BudgetSettings(**budgets))


def test_relative_paths_are_those_of_the_process_that_describes_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cluster's workers run in the folder in which Ray was started."""
    (tmp_path / "mine.jsonl").touch()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    latency = LatencySettings(source="roofline", profile="p.json")
    for config in (
        EnvConfig(latency=latency, model=ModelSettings(name="model"), task=TaskSettings(name="mine.jsonl")),
        EnvConfig.model_validate({"latency": latency, "model": {"name": "model"}, "task": {"name": "mine.jsonl"}}),
    ):
        assert config.store.path == str(tmp_path / "runs/outcomes.sqlite")
        assert config.latency.profile == str(tmp_path / "p.json")
        assert config.model.name == str(tmp_path / "model")
        assert config.task.name == str(tmp_path / "mine.jsonl")


def test_settings_travel_to_workers():
    config = EnvConfig(
        latency=LatencySettings(source="roofline"),
        task=TaskSettings(train_samples=7),
        reward=RewardSettings(penalty=3.0),
        distribution=BudgetDistribution.over(5.0, 50.0),
    )
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.distribution.held_out() == config.distribution.held_out()


def test_budgets_in_ms_are_independent_of_the_device():
    found = _config(low_ms=170, high_ms=380)._budgets(None, None, None, ())
    assert (found.low_ms, found.high_ms) == (170, 380)


def test_one_end_in_ms_leaves_the_other_to_the_device(monkeypatch):
    monkeypatch.setattr("envs.env_resources.budget_range", lambda *_: (20.0, 80.0))
    low = _config(low_ms=30, high_factor=2.0)._budgets(None, None, None, ())
    high = _config(high_ms=60, low_factor=1.5)._budgets(None, None, None, ())
    assert (low.low_ms, low.high_ms, high.low_ms, high.high_ms) == (30, 160, 30, 60)


@pytest.mark.parametrize(
    ("noise", "noisy"), [("evaluation", {"validation", "test"}), ("always", None), ("never", set())]
)
def test_noise_is_for_evaluation_unless_configured_otherwise(noise, noisy):
    resources = make_resources()
    clock = ProfiledClock(
        profile(EngineDouble(resources.engine.model.config), resources.samples, repeats=2, per_tiling=8)
    )
    splits = {"train", "validation", "test"}
    configs = {
        split: EnvConfig(latency=LatencySettings(profile="p.json", noise=noise), split=split) for split in splits
    }
    assert {split for split in splits if configs[split]._noise(clock)} == (splits if noisy is None else noisy)
    assert LatencySettings().noise == "evaluation"
    assert configs["test"]._noise(resources.clock) is None  # the roofline source has none


@pytest.mark.parametrize(
    ("protocol", "kinds"),
    [(Engine, (RolloutEngine, EngineDouble)), (VectorEnvironment, (AdaptiveVQAVectorEnv,))],
)
def test_contracts_are_kept_by_what_stands_behind_them(protocol, kinds):
    methods = {name: value for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}
    assert len(methods) >= 6
    for kind in kinds:
        for name, method in methods.items():
            wanted = list(inspect.signature(method).parameters)
            assert list(inspect.signature(getattr(kind, name)).parameters)[: len(wanted)] == wanted, (kind, name)


def test_the_number_format_follows_the_device():
    assert resolve_dtype(None, torch.device("cpu")) == torch.float32
    assert resolve_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_devices_that_are_not_there_are_named(device):
    with pytest.raises(UserError, match=f"device {device!r} cannot be used"):
        resolve_device(device)


def test_auto_takes_what_there_is():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
