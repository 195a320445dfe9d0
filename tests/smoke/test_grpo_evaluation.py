"""Evaluation covers every context exactly once at any number of runners, and PPO trains on the same environment."""

from pathlib import Path
from typing import Any

import grpo_toy
import numpy as np
import pytest
from grpo_toy import ENVIRONMENT, SAMPLES, configuration

from envs.errors import UserError
from policies.baselines import FixedKnobs, RandomKnobs
from policies.grpo.evaluation import evaluate_contexts

CONTEXTS = [(sample, budget) for budget in (25.0, 60.0, 110.0) for sample in range(SAMPLES)]


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> None:
    grpo_toy.share_ray()


def evaluating(runners: int, **changes: Any) -> Any:
    return configuration().evaluation(
        evaluation_num_env_runners=runners,
        evaluation_config={"env_config": {"group_size": 1}, "num_envs_per_env_runner": 16, **changes},
    )


def test_each_context_once_at_any_number_of_runners(tmp_path: Path) -> None:
    tables = []
    for runners in (0, 1, 2):
        config = evaluating(runners)
        if runners == 2:  # one of them dies on the way
            config.evaluation(
                evaluation_config={"env_config": {"break": "die", "break_round": 0, "once": str(tmp_path / "died")}}
            )
        algorithm = config.build_algo()
        algorithm.train()
        rows = evaluate_contexts(algorithm, CONTEXTS)
        tables.append((rows, evaluate_contexts(algorithm, CONTEXTS, baseline=RandomKnobs(1))))
        algorithm.stop()
    assert (tmp_path / "died").exists()
    assert tables[0] == tables[1] == tables[2]
    for rows in tables[0]:
        assert [row["context"] for row in rows] == list(range(len(CONTEXTS)))
        assert [(row["sample"], row["budget_ms"]) for row in rows] == CONTEXTS
        for row in rows:
            knobs = (int(row[name]) for name in ("tier", "insertion", "top_k", "blocks"))
            assert row["latency_ms"] == grpo_toy.latency_ms(*knobs)
            assert row["log_ratio"] == pytest.approx(np.log(row["budget_ms"] / grpo_toy.REFERENCE_MS))
    # Argmax does not vary with the sample's repetition, random knobs do.
    assert len({row["blocks"] for row in tables[0][1]}) == 5


def test_fixed_knobs_and_errors() -> None:
    algorithm = evaluating(0).build_algo()
    rows = evaluate_contexts(algorithm, CONTEXTS[:5], baseline=FixedKnobs((2, 0, 4, 4)))
    assert [(row["tier"], row["insertion"], row["top_k"], row["blocks"]) for row in rows] == [(2, 1, 8, 16)] * 5
    trained = evaluate_contexts(algorithm, CONTEXTS[:5])
    assert trained != rows
    with pytest.raises(UserError, match="no contexts"):
        evaluate_contexts(algorithm, [])
    with pytest.raises(UserError, match="not allowed"):
        evaluate_contexts(algorithm, [(0, -1.0)])
    algorithm.stop()


def test_without_evaluation_runners_the_error_says_so() -> None:
    algorithm = configuration().build_algo()
    with pytest.raises(UserError, match="no evaluation runners"):
        evaluate_contexts(algorithm, CONTEXTS)
    algorithm.stop()


def test_results_carry_an_evaluation_only_when_there_was_one() -> None:
    config = evaluating(0).evaluation(evaluation_interval=2, evaluation_contexts=CONTEXTS[:20])
    algorithm = config.build_algo()
    results = [algorithm.train() for _ in range(4)]
    assert ["evaluation" in result for result in results] == [False, True, False, True]
    for result in (results[1], results[3]):
        assert result["evaluation"]["env_runners"]["contexts"] == 20
    assert (
        results[1]["evaluation"]["env_runners"]["reward_mean"] != results[3]["evaluation"]["env_runners"]["reward_mean"]
    )
    algorithm.stop()


def test_without_contexts_the_environments_own_are_evaluated() -> None:
    algorithm = configuration().evaluation(evaluation_interval=1, evaluation_duration=9).build_algo()
    assert algorithm.train()["evaluation"]["env_runners"]["contexts"] == 9
    assert [(row["sample"], row["budget_ms"]) for row in algorithm.evaluation_rows] == [(i, 55.0) for i in range(9)]
    assert algorithm.evaluate()["env_runners"]["contexts"] == 9
    algorithm.stop()


@pytest.mark.parametrize(("duration", "unit"), [(7, "episodes"), (14, "timesteps")])
def test_evaluation_duration_counts_the_held_out_contexts(duration: int, unit: str) -> None:
    config = evaluating(0).evaluation(
        evaluation_interval=1,
        evaluation_contexts=CONTEXTS[:20],
        evaluation_duration=duration,
        evaluation_duration_unit=unit,
    )
    algorithm = config.build_algo()
    assert algorithm.train()["evaluation"]["env_runners"]["contexts"] == 7
    assert [(row["sample"], row["budget_ms"]) for row in algorithm.evaluation_rows] == CONTEXTS[:7]
    algorithm.stop()


def test_ppo_trains_on_the_same_environment() -> None:
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    from policies.grpo.rl_module import ControllerWithValue

    algorithm = (
        PPOConfig()
        .environment(ENVIRONMENT, env_config={"group_size": 1})
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=64,
            batch_mode="complete_episodes",
            gym_env_vectorize_mode="vector_entry_point",
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=ControllerWithValue, model_config={"hidden": 32}))
        .training(train_batch_size_per_learner=512, minibatch_size=128, num_epochs=4, lr=1e-3, gamma=1.0)
        .debugging(seed=0)
        .build_algo()
    )
    returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(12)]
    assert np.isfinite(returns).all()
    assert np.mean(returns[-3:]) > np.mean(returns[:3]) + 0.1
    algorithm.stop()
