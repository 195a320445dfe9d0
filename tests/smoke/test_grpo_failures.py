"""Runners that die, hang or fail: work is run again, nothing partial is learnt from, and the cause is told."""

import time
from pathlib import Path
from typing import Any

import grpo_toy
import pytest
import ray
from grpo_toy import configuration, numbers

from envs.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> None:
    grpo_toy.share_ray()


@pytest.fixture(scope="module")
def undisturbed() -> list[dict[str, float]]:
    algorithm = configuration(0).build_algo()
    rows = [numbers(algorithm.train()) for _ in range(3)]
    algorithm.stop()
    return rows


def run(runners: int, broken: dict[str, Any], iterations: int, **env_runners: Any) -> tuple[Any, list[dict[str, Any]]]:
    algorithm = configuration(runners, broken=broken).env_runners(**env_runners).build_algo()
    return algorithm, [algorithm.train() for _ in range(iterations)]


def test_runners_killed_during_and_between_samples_change_nothing(
    tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    algorithm, results = run(2, {"break": "die", "break_round": 1, "once": str(tmp_path / "died")}, 2)
    assert (tmp_path / "died").exists()
    assert [row["grpo"]["shards_rerun"] for row in results] == [0.0, 1.0]
    ray.kill(algorithm.env_runner_group._worker_manager.actors()[2], no_restart=False)
    results.append(algorithm.train())
    assert [numbers(result) for result in results] == undisturbed
    assert all(row["grpo"]["rollouts"] == 32 for row in results)
    # Both are at work again.
    algorithm.restore_env_runners(algorithm.env_runner_group)
    assert algorithm.env_runner_group.num_healthy_remote_env_runners() == 2
    algorithm.stop()


def test_a_stalled_runner_is_replaced(tmp_path: Path, undisturbed: list[dict[str, float]]) -> None:
    broken = {"break": "stall", "break_round": 1, "once": str(tmp_path / "stalled")}
    algorithm, results = run(1, broken, 2, sample_timeout_s=10)
    assert [numbers(result) for result in results] == undisturbed[:2]
    assert results[1]["grpo"]["shards_rerun"] == 1.0
    algorithm.stop()


def test_all_runners_dead_is_one_clear_error() -> None:
    algorithm = configuration(2).fault_tolerance(restart_failed_env_runners=False).build_algo()
    algorithm.train()
    for actor in algorithm.env_runner_group._worker_manager.actors().values():
        ray.kill(actor)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"all env runners are dead \(runners 1, 2") as caught:
        algorithm.train()
    assert time.monotonic() - started < 30
    assert "\n" not in caught.value.message
    algorithm.stop()


def test_runners_that_never_come_back_are_waited_for_no_longer_than_the_timeout() -> None:
    algorithm = configuration(1, restart_timeout_s=4).build_algo()
    ray.kill(algorithm.env_runner_group._worker_manager.actors()[1], no_restart=True)
    started = time.monotonic()
    with pytest.raises(UserError, match="all env runners are dead"):
        algorithm.train()
    assert time.monotonic() - started < 30
    algorithm.stop()


def test_bad_input_inside_a_runner_reaches_the_user_as_it_is() -> None:
    algorithm, _ = run(1, {"break": "user_error", "break_round": 1}, 1)
    with pytest.raises(UserError, match=r"^image scene-3 is truncated: replace it$"):
        algorithm.train()
    algorithm.stop()


def test_a_failure_that_repeats_is_given_up_with_its_cause() -> None:
    algorithm, _ = run(1, {"break": "bug", "break_round": 1}, 1)
    with pytest.raises(UserError, match=r"failed 3 times.*ValueError: a bug in the environment"):
        algorithm.train()
    algorithm.stop()


def test_runners_that_cannot_start_say_why() -> None:
    with pytest.raises(UserError, match=r"no env runner could start.*samples must be a number"):
        configuration(1, broken={"samples": "many"}).build_algo()


def test_groups_that_are_not_complete_are_refused() -> None:
    algorithm = configuration(0, broken={"partial": True}).build_algo()
    with pytest.raises(UserError, match=r"2 of 8 groups of 4 rollouts are not complete"):
        algorithm.train()
    algorithm.stop()
