"""PPO and GRPO on the real environment (its engine replaced by arithmetic), which neither of them changes."""

import sys
from pathlib import Path
from typing import Any

import grpo_toy
import numpy as np
import pytest
import ray
from ray.tune import register_env

from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from policies.baselines import FixedKnobs
from policies.grpo.evaluation import evaluate_contexts

sys.path.append(str(Path(__file__).parents[1] / "unit" / "resources"))
import doubles

ENVIRONMENT = "grpo-resources"


@pytest.fixture(scope="module", autouse=True)
def resources() -> Any:
    grpo_toy.share_ray()
    ray.cloudpickle.register_pickle_by_value(doubles)
    resources = doubles.make_resources(12)
    register_env(ENVIRONMENT, lambda config: AdaptiveVQAVectorEnv({**config, "resources": resources}))
    return resources


def test_ppo_trains_on_it() -> None:
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    from policies.grpo.rl_module import ControllerWithValue

    algorithm = (
        PPOConfig()
        .environment(ENVIRONMENT, env_config={})
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=64,
            batch_mode="complete_episodes",
            gym_env_vectorize_mode="vector_entry_point",
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=ControllerWithValue, model_config={"hidden": 32}))
        .training(train_batch_size_per_learner=256, minibatch_size=128, num_epochs=4, lr=1e-3, gamma=1.0)
        .debugging(seed=0)
        .build_algo()
    )
    before = [value.copy() for value in algorithm.get_module().get_state().values()]
    returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(4)]
    after = list(algorithm.get_module().get_state().values())
    assert np.isfinite(returns).all()
    assert len(set(returns)) > 1
    assert any((old != new).any() for old, new in zip(before, after, strict=True))
    algorithm.stop()


def test_known_plans_complete_the_groups_and_count_as_executions() -> None:
    rows = {}
    for advantages in ("sampled", "known"):
        algorithm = (
            grpo_toy.configuration(advantages=advantages)
            .environment(ENVIRONMENT, env_config={"group_size": 4, "seed": 1}, clip_actions=False)
            .build_algo()
        )
        rows[advantages] = [algorithm.train()["grpo"] for _ in range(3)]
        algorithm.stop()
    assert rows["known"][0]["reward_mean"] == rows["sampled"][0]["reward_mean"]
    assert rows["known"][1]["loss_policy"] != rows["sampled"][1]["loss_policy"]
    counts = [row["model_executions"] for row in rows["sampled"]]
    assert 0 < counts[0] < counts[1] < counts[2] <= 3 * 8 * 4
    assert rows["known"][0]["model_executions"] > 3 * 8 * 4


def test_grpo_trains_and_evaluates_on_it(resources: Any) -> None:
    algorithm = (
        grpo_toy.configuration()
        .environment(ENVIRONMENT, env_config={"group_size": 4, "seed": 1}, clip_actions=False)
        .evaluation(evaluation_config={"env_config": {"group_size": 1}})
        .build_algo()
    )
    row = algorithm.train()["grpo"]
    assert row["groups"] == 8.0
    contexts = [(sample, budget) for sample in range(12) for budget in resources.budgets.held_out()]
    rows = evaluate_contexts(algorithm, contexts, baseline=FixedKnobs((2, 0, 4, 4)))
    assert [(row["sample"], row["budget_ms"]) for row in rows] == contexts
    assert {row["blocks"] for row in rows} == {16}
    assert len(evaluate_contexts(algorithm, contexts)) == len(contexts)
    algorithm.stop()
