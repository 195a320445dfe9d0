"""Rollouts that overlap with learning: never staler than allowed, the same every time, and as hard to disturb."""

from pathlib import Path
from typing import Any

import grpo_toy
import numpy as np
import pytest
import ray
import torch
from grpo_toy import configuration, numbers, resumable

from envs.errors import UserError
from policies.controller import Controller
from policies.distribution import KnobDistribution
from policies.grpo.checkpoint import controller_from, restore_checkpoint

LAG = 2


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> None:
    grpo_toy.share_ray()


@pytest.fixture(scope="module")
def undisturbed() -> list[dict[str, float]]:
    """Five iterations that nobody disturbed."""
    algorithm = build()
    rows = [numbers(algorithm.train()) for _ in range(5)]
    algorithm.stop()
    return rows


def build(runners: int = 1, **broken: Any) -> Any:
    config = resumable(runners).training(max_policy_lag=LAG)
    return config.environment(env_config={"group_size": 4, "seed": 1, **broken}).build_algo()


def test_rollouts_are_as_stale_as_they_say_and_no_context_comes_twice() -> None:
    algorithm = build()
    versions: list[Controller] = []
    seen: list[int] = []
    staleness = []
    learn = algorithm._learn

    def checked(rollouts: Any, returns: Any, groups: Any) -> Any:
        acted = versions[max(0, algorithm.updates - LAG)]
        obs = {key: torch.as_tensor(value[:, 0].copy()) for key, value in rollouts.obs.items()}
        with torch.no_grad():
            policies = KnobDistribution(torch.from_numpy(rollouts.logits[:, 0].copy())), KnobDistribution(acted(obs))
            first, second = (policy.stage_log_probs[0].numpy() for policy in policies)
            np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
        seen.extend(np.unique(rollouts.infos["context"]).tolist())
        return learn(rollouts, returns, groups)

    algorithm._learn = checked
    for _ in range(6):
        versions.append(controller_from(ray.get(algorithm.weights()), algorithm.config.controller))
        staleness.append(algorithm.train()["grpo"]["policy_lag"])
    assert staleness == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    # Weights do move, so that the comparison above tells versions apart.
    first, last = (version.state_dict() for version in (versions[0], versions[-1]))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    rounds = [context // 100_000 for context in seen]
    assert len(seen) == len(set(seen)) == 6 * 8
    assert rounds == sorted(rounds)
    algorithm.stop()


def test_a_resumed_run_equals_the_one_left_alone(tmp_path: Path, undisturbed: list[dict[str, float]]) -> None:
    algorithm = build(2)
    assert [numbers(algorithm.train()) for _ in range(3)] == undisturbed[:3]
    saved = Path(algorithm.save_to_path(tmp_path / "three"))
    algorithm.train()
    # Back within the process, with rounds under way; then in a new algorithm.
    restore_checkpoint(algorithm, saved)
    assert [numbers(algorithm.train()) for _ in range(2)] == undisturbed[3:]
    algorithm.stop()
    again = build(1)
    restore_checkpoint(again, saved)
    assert [numbers(again.train()) for _ in range(2)] == undisturbed[3:]
    again.stop()


def test_killed_runners_change_nothing(tmp_path: Path, undisturbed: list[dict[str, float]]) -> None:
    algorithm = build(2, **{"break": "die", "break_round": 2, "once": str(tmp_path / "died")})
    results = [algorithm.train() for _ in range(3)]
    assert (tmp_path / "died").exists()
    assert sum(result["grpo"]["shards_rerun"] for result in results) == 1.0
    ray.kill(algorithm.env_runner_group._worker_manager.actors()[2], no_restart=False)
    results += [algorithm.train() for _ in range(2)]
    assert [numbers(result) for result in results] == undisturbed
    algorithm.stop()


@pytest.mark.slow
def test_reward_rises_as_it_does_without_staleness() -> None:
    rises = {}
    for staleness in (0, LAG):
        algorithm = (
            configuration(
                1, group_size=8, groups_per_iteration=32, minibatch_size=256, num_epochs=4, hidden=64, lr=1e-3,
                max_policy_lag=staleness,
            )
            .environment(grpo_toy.ENVIRONMENT, env_config={"group_size": 8})
            .env_runners(num_envs_per_env_runner=128)
            .build_algo()
        )  # fmt: skip
        rewards = [algorithm.train()["grpo"]["reward_mean"] for _ in range(40)]
        algorithm.stop()
        rises[staleness] = np.mean(rewards[-5:]) - np.mean(rewards[:5])
    print("rise of the mean reward by staleness:", rises)
    assert rises[0] > 0.2
    assert rises[LAG] > 0.2


def test_without_runners_of_its_own_it_is_refused() -> None:
    with pytest.raises(UserError, match="max_policy_lag = 1 needs remote env runners"):
        configuration(0, max_policy_lag=1).build_algo()
