"""Building a world from its settings."""

import pickle

import pytest
import torch

from envs.budgets import BudgetDistribution
from envs.errors import UserError
from envs.reward import RewardConfig
from envs.world import WorldConfig, resolve_device


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
        limit=7, reward=RewardConfig(overrun=3.0), budgets=BudgetDistribution.over(5.0, 50.0), threads=2
    )
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.budgets.held_out() == config.budgets.held_out()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_devices_that_are_not_there_are_named(device):
    with pytest.raises(UserError, match=f"device {device!r} cannot be used"):
        resolve_device(device)


def test_auto_takes_what_there_is():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
