"""Building a world from its settings."""

import pickle

import pytest
import torch

from envs.budgets import BudgetDistribution
from envs.env_resources import WorldConfig, resolve_device
from envs.errors import UserError
from envs.reward import RewardSettings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"clock": "sundial"}, "'sundial'.*profiled, roofline, measured"),
        ({"dtype": "float8"}, "'float8'.*float32"),
        ({"clock": "profiled"}, "needs a profile table"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        WorldConfig(**settings)


def test_settings_travel_to_workers():
    config = WorldConfig(
        limit=7, reward=RewardSettings(penalty=3.0), budgets=BudgetDistribution.over(5.0, 50.0), threads=2
    )
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.budgets.held_out() == config.budgets.held_out()


def test_budgets_in_ms_hold_on_any_device():
    both = WorldConfig(budget_low_ms=170, budget_high_ms=380)
    found = both._budgets(None, None, None, ())
    assert (found.low_ms, found.high_ms) == (170, 380)


def test_one_end_in_ms_leaves_the_other_to_the_device(monkeypatch):
    monkeypatch.setattr("envs.env_resources.budget_range", lambda *_: (20.0, 80.0))
    low = WorldConfig(budget_low_ms=30, budget_high=2.0)._budgets(None, None, None, ())
    high = WorldConfig(budget_high_ms=60, budget_low=1.5)._budgets(None, None, None, ())
    assert (low.low_ms, low.high_ms, high.low_ms, high.high_ms) == (30, 160, 30, 60)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_devices_that_are_not_there_are_named(device):
    with pytest.raises(UserError, match=f"device {device!r} cannot be used"):
        resolve_device(device)


def test_auto_takes_what_there_is():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
