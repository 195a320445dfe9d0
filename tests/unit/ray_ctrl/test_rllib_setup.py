"""From a configuration to the algorithm's settings, without making the algorithm."""

from types import SimpleNamespace
from typing import Any

import pytest

from envs.budgets import BudgetDistribution
from policies.grpo.algorithm import GRPOConfig
from ray_ctrl import rllib_setup
from ray_ctrl.load_config import load_config


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(GRPOConfig, "build_algo", lambda self: self)

    def build(*overrides: str) -> Any:
        config = load_config("smoke", None, overrides)
        budgets = BudgetDistribution.over(10.0, 40.0)
        context = SimpleNamespace(config=config, budgets=budgets, env_config=lambda split: split)
        return rllib_setup.build_algorithm(context, envs=8, contexts=4)  # type: ignore[arg-type]

    return build


def test_the_entropy_bonus_falls_over_the_complete_run_or_not_at_all(built: Any) -> None:
    assert built("grpo.anneal_entropy=true", "run.iterations=40").entropy_share(10) == 0.75
    assert built("grpo.anneal_entropy=false", "run.iterations=40").entropy_share(10) == 1.0


def test_settings_arrive_under_the_names_of_the_algorithm(built: Any) -> None:
    settings = built(
        "grpo.clip_low=0.1", "grpo.clip_high=0.3", "grpo.kl_coef=0.02", "grpo.entropy_coef=0.07",
        "grpo.max_grad_norm=0.6", "grpo.lr=0.0002", "grpo.epochs=3",
    )  # fmt: skip
    assert (settings.clip_low, settings.clip_high, settings.kl_coef) == (0.1, 0.3, 0.02)
    assert (settings.entropy_coef, settings.grad_clip, settings.lr, settings.num_epochs) == (0.07, 0.6, 0.0002, 3)


def test_multipliers_move_only_in_lagrangian_mode(built: Any) -> None:
    settings = built("reward.mode=lagrangian", "reward.penalty_init=9", "reward.penalty_max=4")
    assert settings.penalty_bins == load_config("smoke").budgets.penalty_bins
    assert (settings.lagrangian.penalty_init, settings.lagrangian.penalty_max) == (9.0, 4.0)
    assert built("reward.mode=fixed").lagrangian is None
