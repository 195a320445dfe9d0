"""GRPO on RLlib learns, is deterministic, and continues from a checkpoint as an uninterrupted run would."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpo_toy
import numpy as np
import pytest
import ray
from grpo_toy import configuration, numbers, resumable, two_more

from envs.config import RewardSettings
from envs.errors import UserError
from policies.baselines import FixedKnobs, RandomKnobs
from policies.controller import Controller
from policies.grpo.checkpoint import fingerprint, restore_checkpoint
from policies.grpo.evaluation import evaluate_contexts
from policies.grpo.lagrangian import MIN_EFFECTIVE
from policies.grpo.rllib_adapter import each_learner


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> None:
    grpo_toy.share_ray()


def train(algorithm: Any, iterations: int) -> list[dict[str, float]]:
    return [numbers(algorithm.train()) for _ in range(iterations)]


def test_reward_rises_above_every_baseline(tmp_path: Path) -> None:
    algorithm = (
        configuration(group_size=8, groups_per_iteration=32, minibatch_size=256, num_epochs=4, hidden=64, lr=1e-3)
        .environment(grpo_toy.ENVIRONMENT, env_config={"group_size": 8})
        .env_runners(num_envs_per_env_runner=128)
        .evaluation(evaluation_config={"env_config": {"group_size": 1}})
        .build_algo()
    )
    rows = train(algorithm, 30)
    rewards = [row["reward_mean"] for row in rows]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert rows[-1]["entropy_tier"] < rows[0]["entropy_tier"]
    contexts = [(sample, budget) for sample in range(grpo_toy.SAMPLES) for budget in (30.0, 50.0, 70.0, 90.0, 120.0)]

    def reward(baseline: Any = None) -> float:
        return float(np.mean([row["reward"] for row in evaluate_contexts(algorithm, contexts, baseline=baseline)]))

    trained = reward()
    assert (
        trained > max(reward(FixedKnobs((2, 0, 4, 4))), reward(FixedKnobs((0, 0, 0, 0))), reward(RandomKnobs())) + 0.1
    )

    # The exported controller acts as the evaluation did, without Ray.
    folder = algorithm.controller().save(tmp_path / "controller", {"fingerprint": "toy"})
    controller, _ = Controller.load(folder, d_model=grpo_toy.WIDTH)
    assert abs(act_alone(controller, contexts) - trained) < 1e-9
    algorithm.stop()


def act_alone(controller: Controller, contexts: list[tuple[int, float]]) -> float:
    import torch

    env = grpo_toy.ToyVectorEnv({"num_envs": len(contexts)})
    env.set_contexts(contexts)
    observation, _ = env.reset()
    for _ in range(2):
        action = controller.act({key: torch.as_tensor(value) for key, value in observation.items()})
        observation, reward, *_ = env.step(action.numpy())
    return float(reward.mean())


def test_resumed_runs_equal_uninterrupted_ones(tmp_path: Path) -> None:
    expected, first = {}, {}
    for runners in (0, 1, 2):
        algorithm = resumable(runners).build_algo()
        first[runners] = train(algorithm, 2)
        algorithm.save_to_path(tmp_path / str(runners))
        expected[str(runners)] = two_more(algorithm)
        algorithm.stop()
    json.dumps([first, expected], allow_nan=False)
    # One thread each: shards make the numbers independent of how many runners there are.
    assert first[0] == first[1] == first[2]
    assert expected["0"] == expected["1"] == expected["2"]
    assert first[0] != expected["0"]["numbers"]
    command = [sys.executable, grpo_toy.__file__, str(tmp_path), "0", "1", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    assert json.loads(lines[0].removeprefix("RESULT ")) == expected


def test_an_older_checkpoint_is_taken_back_to_by_learner_and_runners(tmp_path: Path) -> None:
    algorithm = resumable(1).build_algo()
    train(algorithm, 1)
    algorithm.save_to_path(tmp_path / "one")
    expected = train(algorithm, 2)
    restore_checkpoint(algorithm, tmp_path / "one")
    wanted = fingerprint(ray.get(algorithm.weights()))
    held = algorithm.env_runner_group.foreach_env_runner(lambda runner: fingerprint(runner.module.get_state()))
    assert held == [wanted] * len(held)
    assert train(algorithm, 2) == expected
    algorithm.stop()


def test_the_average_of_weights_is_evaluated_and_exported() -> None:
    algorithm = (
        configuration(ema_decay=0.5).evaluation(evaluation_config={"env_config": {"group_size": 1}}).build_algo()
    )
    average = None
    for _ in range(3):
        algorithm.train()
        latest = algorithm._latest()
        # 1 of 1, 1 of 2, then half of the past.
        average = latest if average is None else {name: (average[name] + latest[name]) / 2 for name in latest}
    exported = algorithm.controller()
    for name, value in ray.get(algorithm.evaluated_weights()).items():
        np.testing.assert_allclose(value, average[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert fingerprint(average) != fingerprint(latest)
    contexts = [(sample, budget) for sample in range(grpo_toy.SAMPLES) for budget in (30.0, 70.0)]
    rewards = [row["reward"] for row in evaluate_contexts(algorithm, contexts)]
    assert abs(act_alone(exported, contexts) - float(np.mean(rewards))) < 1e-9
    algorithm.stop()


def test_several_learners_are_allowed() -> None:
    configuration().learners(num_learners=2).validate()


@pytest.mark.slow
def test_two_learners_give_the_update_of_one() -> None:
    weights = []
    for learners in (0, 2):
        algorithm = configuration(kl_coef=0.1).learners(num_learners=learners, num_gpus_per_learner=0).build_algo()
        train(algorithm, 2)
        weights.append(algorithm.controller().state_dict())
        algorithm.stop()
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=2e-5, err_msg=name)


def test_checkpoints_are_whole_or_refused(tmp_path: Path) -> None:
    algorithm = resumable(0).build_algo()
    train(algorithm, 1)
    folder = Path(algorithm.save_to_path(tmp_path / "good"))
    before = fingerprint(ray.get(algorithm.weights()))

    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
            path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                restore_checkpoint(algorithm, folder)
            assert "\n" not in caught.value.message
        path.unlink()
        with pytest.raises(UserError):
            restore_checkpoint(algorithm, folder)
        path.write_bytes(content)
    with pytest.raises(UserError, match="not complete"):
        restore_checkpoint(algorithm, tmp_path / "nowhere")
    assert fingerprint(ray.get(algorithm.weights())) == before
    restore_checkpoint(algorithm, folder)

    # Another shape, other penalty bins: refused as well.
    for other in (resumable(0).training(hidden=16), configuration(0)):
        foreign = other.build_algo()
        with pytest.raises(UserError, match=r"does not fit|penalty bins"):
            restore_checkpoint(foreign, folder)
        foreign.stop()
    algorithm.stop()


def test_a_checkpoint_that_could_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = resumable(0).build_algo()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("policies.grpo.algorithm.write_manifest", full)
    with pytest.raises(OSError, match="No space left on device"):
        algorithm.save_to_path(tmp_path / "full")
    with pytest.raises(UserError, match="not complete"):
        restore_checkpoint(algorithm, tmp_path / "full")
    algorithm.stop()


def test_a_remote_learner_that_cannot_write_its_part_is_an_error(tmp_path: Path) -> None:
    algorithm = resumable(0).learners(num_learners=1, num_gpus_per_learner=0).build_algo()
    train(algorithm, 1)

    def break_disk(learner: Any) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        learner.module.save_to_path = full

    def repair_disk(learner: Any) -> None:
        del learner.module.save_to_path

    each_learner(algorithm.learner_group, break_disk)
    with pytest.raises(OSError, match=r"a learner could not write.*No space left on device"):
        algorithm.save_to_path(tmp_path / "full")
    with pytest.raises(UserError, match="not complete"):
        restore_checkpoint(algorithm, tmp_path / "full")
    # It was the disk: the learner itself is as good as before.
    each_learner(algorithm.learner_group, repair_disk)
    folder = Path(algorithm.save_to_path(tmp_path / "good"))
    expected = train(algorithm, 1)
    restore_checkpoint(algorithm, folder)
    assert train(algorithm, 1) == expected

    def deaf(learner: Any) -> None:
        learner.restore_from_path = lambda *_, **__: None

    each_learner(algorithm.learner_group, deaf)
    with pytest.raises(UserError, match="learners 0 do not contain what is in checkpoint"):
        restore_checkpoint(algorithm, folder)
    algorithm.stop()


def test_the_entropy_bonus_of_a_round_reaches_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = configuration(entropy_coef=0.1, total_iterations=4).build_algo()
    sent = []
    update = algorithm.learner_group.update

    def watched(batch: Any, **given: Any) -> Any:
        sent.append({float(share) for share in batch.policy_batches["default_policy"]["entropy_shares"]})
        return update(batch=batch, **given)

    monkeypatch.setattr(algorithm.learner_group, "update", watched)
    train(algorithm, 5)
    algorithm.stop()
    shares = [1.0, 0.75, 0.5, 0.25, 0.0]
    epochs = len(sent) // len(shares)
    assert sent == [{share} for share in shares for _ in range(epochs)]


def test_multipliers_move_by_themselves() -> None:
    """A controller that hardly ever takes its most likely actions, and budgets that those violate."""
    tight = RewardSettings(mode="lagrangian", max_violation_rate=0.02, penalty_lr=0.3)
    algorithm = configuration(
        groups_per_iteration=512, minibatch_size=None, num_epochs=1, lr=1e-5, lagrangian=tight, penalty_bins=3
    )
    algorithm = algorithm.env_runners(num_envs_per_env_runner=2048).build_algo()
    for _ in range(4):
        algorithm.train()
    moved = algorithm.multipliers
    known = moved.effective >= MIN_EFFECTIVE
    assert known.any()
    assert (moved.values[known] != tight.penalty_init).any()
    assert (moved.values[~known] == tight.penalty_init).all()
    sampled, *_ = algorithm._sample()  # the environments score by them
    assert (sampled.infos["multiplier"] == moved.values[sampled.infos["budget_bin"].astype(int)]).all()
    algorithm.stop()


def test_equal_groups_can_be_dropped_and_everything_equal_is_survived() -> None:
    algorithm = configuration(skip_uniform_groups=True).build_algo()
    row = train(algorithm, 1)[0]
    assert row["groups"] == 8.0
    sampled, *_ = algorithm._sample()
    from policies.grpo.objective import group_advantages

    before = fingerprint(ray.get(algorithm.weights()))
    returns = np.ones((8, 4))
    algorithm._learn(sampled, returns.reshape(-1), group_advantages(returns, normalize_by_std=False))
    assert fingerprint(ray.get(algorithm.weights())) == before
    algorithm.stop()


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"group_size": 1}, "group_size = 1 is not allowed: input should be greater than or equal to 2"),
        ({"group_size": 6}, "does not divide the 16 environments"),
        ({"groups_per_iteration": 6}, "multiple of 4 groups"),
        ({"clip_low": 1.5}, "clip_low = 1.5"),
        ({"entropy_coef": -1.0}, "entropy_coef = -1.0"),
        ({"entropy_coeff": 0.1}, "'entropy_coef' now"),
        ({"ema_decay": 1.0}, "ema_decay = 1.0"),
        ({"total_iterations": -1}, "total_iterations = -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_starts(training: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        configuration(**training).build_algo()


def test_the_reward_that_is_learned_is_the_one_environments_return_at_moving_multipliers() -> None:
    algorithm = resumable(1).build_algo()
    for turn in range(2):
        values = np.array([0.2, 0.7, 1.9]) * (1 + turn)
        algorithm.multipliers = replace(algorithm.multipliers, values=values)
        sampled, *_ = algorithm._sample()
        infos = sampled.infos
        assert (infos["multiplier"] == values[infos["budget_bin"].astype(int)]).all()
        cost = grpo_toy.penalty(infos["latency_ms"], infos["budget_ms"])
        np.testing.assert_allclose(sampled.rewards, infos["accuracy"] - infos["multiplier"] * cost)
        assert (algorithm._returns(sampled) == sampled.rewards).all()
        row = algorithm.train()["grpo"]  # samples the same round again, under the same multipliers
        assert row["reward_mean"] == pytest.approx(sampled.rewards.mean())
    algorithm.stop()
