"""Runners that die, hang or fail: work is run again, nothing partial is learnt from, and the cause is told."""

import time
from pathlib import Path
from typing import Any

import grpo_toy
import pytest
import ray
from grpo_toy import configuration, numbers

from envs.errors import UserError
from policies.grpo.checkpoint import restore_checkpoint
from policies.grpo.evaluation import evaluate_contexts


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
    tmp_path: Path, undisturbed: list[dict[str, float]], capfd: pytest.CaptureFixture[str]
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
    assert "restart will fail" not in capfd.readouterr().err  # Ray's alarm about what an actor is made from
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


def test_a_runner_that_cannot_start_says_why() -> None:
    with pytest.raises(UserError, match=r"env runner 1 could not start.*samples must be a number"):
        configuration(1, broken={"samples": "many"}).build_algo()


@pytest.mark.parametrize("evaluation", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_runners_that_die_while_they_start_are_an_error_within_the_timeouts(evaluation: bool) -> None:
    broken = {"break_start": "die"}
    config = configuration(0 if evaluation else 1, broken={} if evaluation else broken, restart_timeout_s=8)
    config.env_runners(sample_timeout_s=8)
    if evaluation:
        config.evaluation(evaluation_num_env_runners=1, evaluation_config={"env_config": broken})
    started = time.monotonic()
    with pytest.raises(UserError, match=r"env runners 1 did not start within 8 s"):
        config.build_algo()
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_successor_that_fails_to_start_is_named_with_its_cause(tmp_path: Path) -> None:
    once = tmp_path / "died"
    broken = {"break": "die", "break_round": 1, "break_start": "bug", "once": str(once)}
    algorithm = configuration(1, broken=broken, restart_timeout_s=30).build_algo()
    algorithm.train()
    with pytest.raises(
        UserError, match=r"all env runners are dead.*could not start again: ValueError: a bug at the start"
    ):
        algorithm.train()
    algorithm.stop()


@pytest.mark.slow
def test_a_successor_waits_for_the_memory_of_the_only_gpu(tmp_path: Path, undisturbed: list[dict[str, float]]) -> None:
    once = tmp_path / "died"
    broken = {"break": "die", "break_round": 1, "break_start": "no_memory", "once": str(once)}
    algorithm, results = run(1, broken, 2)
    assert [numbers(result) for result in results] == undisturbed[:2]
    assert (tmp_path / "died-tries").read_text() == "xxx"
    algorithm.stop()


def test_dead_evaluation_runners_are_one_error_within_the_timeout() -> None:
    config = configuration(0, restart_timeout_s=4)
    config.evaluation(evaluation_num_env_runners=1, evaluation_config={"env_config": {"group_size": 1}})
    algorithm = config.build_algo()
    ray.kill(algorithm.eval_env_runner_group._worker_manager.actors()[1], no_restart=True)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"all evaluation runners are dead \(runners 1"):
        evaluate_contexts(algorithm, [(0, 50.0)])
    assert time.monotonic() - started < 30
    assert algorithm.train()["grpo"]["updates"] == 0.0
    algorithm.stop()


@pytest.mark.slow
def test_a_runner_without_an_answer_after_a_restore_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    algorithm = configuration(1).env_runners(sample_timeout_s=5).build_algo()
    algorithm.save_to_path(tmp_path / "saved")

    def deafen(runner: Any) -> None:
        runner.load_weights = lambda weights: time.sleep(60)

    algorithm.env_runner_group.foreach_env_runner(deafen, local_env_runner=False)
    started = time.monotonic()
    with pytest.raises(UserError, match="without an answer do not have the restored weights after 5 s"):
        restore_checkpoint(algorithm, tmp_path / "saved")
    assert time.monotonic() - started < 30
    algorithm.stop()


def test_groups_that_are_not_complete_are_refused() -> None:
    algorithm = configuration(0, broken={"partial": True}).build_algo()
    with pytest.raises(UserError, match=r"2 of 8 groups of 4 rollouts are not complete"):
        algorithm.train()
    algorithm.stop()
