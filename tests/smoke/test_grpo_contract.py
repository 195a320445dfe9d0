"""What RLlib users expect of an algorithm: configuration by dict, repeatable errors, callbacks, usual metrics."""

import sys
from pathlib import Path
from typing import Any

import grpo_toy
import msgpack
import msgpack_numpy
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from grpo_toy import SAMPLES, configuration, numbers, resumable
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from envs.errors import UserError
from policies.grpo.algorithm import GRPO, GRPOConfig
from policies.grpo.checkpoint import fingerprint, state_checksum
from policies.grpo.config import VALIDATED_MODULE
from policies.grpo.evaluation import evaluate_contexts
from policies.grpo.rllib_adapter import each_learner

CONTEXTS = [(sample, budget) for sample in range(SAMPLES) for budget in (30.0, 90.0)]


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> None:
    grpo_toy.share_ray()
    # Runners cannot import a module of the tests: they get the callbacks by value.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def evaluating(config: GRPOConfig) -> GRPOConfig:
    return config.evaluation(evaluation_contexts=CONTEXTS, evaluation_config={"env_config": {}})


# 1. Configuration.


def test_a_configuration_survives_its_own_dict() -> None:
    config = evaluating(resumable(0)).training(lr=2e-4, clip_high=0.4)
    again = GRPOConfig().update_from_dict(config.to_dict())
    assert (again.grpo, again.controller, again.timeouts) == (config.grpo, config.controller, config.timeouts)
    assert again.evaluation_contexts == tuple(CONTEXTS)
    assert again.has_evaluation_runners
    changed = GRPOConfig().update_from_dict({"lr": np.float64(0.01), "group_size": np.int64(4), "num_epochs": 7})
    assert (changed.grpo.lr, changed.grpo.group_size, changed.grpo.epochs) == (0.01, 4, 7)
    with pytest.raises(UserError, match=r"clip_low = 2\.0 is not allowed"):
        GRPOConfig().update_from_dict({"clip_low": 2.0})


def test_the_algorithm_is_built_from_a_dict() -> None:
    config = evaluating(configuration())
    rows = []
    for algorithm in (config.copy(copy_frozen=False).build_algo(), GRPO(config=config.to_dict())):
        rows.append(numbers(algorithm.train()))
        algorithm.stop()
    assert rows[0] == rows[1]


# 2. Errors and interrupts.


@pytest.mark.parametrize("runners", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_the_iteration_is_repeated_with_the_same_numbers(
    runners: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = resumable(runners).build_algo()
    undisturbed = [numbers(algorithm.train()) for _ in range(3)]
    algorithm.stop()
    algorithm = resumable(runners).build_algo()
    assert numbers(algorithm.train()) == undisturbed[0]

    def held() -> list[str]:
        return [algorithm.updates, *each_learner(algorithm.learner_group, lambda one: one.state_checksum())]

    begun = held()
    update, calls = algorithm.learner_group.update, []

    def second_epoch_fails(**given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise error("between epochs")
        return update(**given)

    with monkeypatch.context() as patch:
        patch.setattr(algorithm.learner_group, "update", second_epoch_fails)
        with pytest.raises(error):
            algorithm.train()
    assert held() == begun
    with monkeypatch.context() as patch:
        patch.setattr(algorithm.sampler.dispatcher, "collect", lambda tasks: (_ for _ in ()).throw(error("sampling")))
        with pytest.raises(error):
            algorithm.train()
    assert held() == begun
    assert [numbers(algorithm.train()) for _ in range(2)] == undisturbed[1:]
    algorithm.stop()


# 3. Callbacks and what is refused.


class Recorder(RLlibCallback):
    def on_episode_created(self, *, episode: Any, **given: Any) -> None:
        assert episode.t == 0

    def on_episode_start(self, *, metrics_logger: Any, **given: Any) -> None:
        metrics_logger.log_value("started", 1, reduce="sum")

    def on_episode_step(self, *, metrics_logger: Any, **given: Any) -> None:
        metrics_logger.log_value("stepped", 1, reduce="sum")

    def on_episode_end(self, *, episode: Any, metrics_logger: Any, **given: Any) -> None:
        assert episode.is_done
        metrics_logger.log_value("budget_seen", episode.get_infos(-1)["budget_ms"], window=1000)
        metrics_logger.log_value("return_seen", episode.get_return(), window=1000)

    def on_sample_end(self, *, samples: Any, metrics_logger: Any, **given: Any) -> None:
        metrics_logger.log_value("sampled", len(samples), reduce="sum")


class Uniform(TorchRLModule):
    """A module of another distribution."""


@pytest.mark.parametrize("runners", [0, 1])
def test_callbacks_and_their_metrics_are_honoured(runners: int) -> None:
    algorithm = configuration(runners).callbacks(Recorder).build_algo()
    result = algorithm.train()
    found = result["env_runners"]
    assert (found["started"], found["stepped"], found["sampled"]) == (32, 64, 32)
    assert found["return_seen"] == pytest.approx(result["grpo"]["reward_mean"])
    assert found["budget_seen"] == pytest.approx(result["grpo"]["budget_ms_mean"])
    algorithm.stop()


@pytest.mark.parametrize("runners", [0, 1])
def test_episodes_are_written_once_as_rllib_reads_them(runners: int, tmp_path: Path) -> None:
    algorithm = configuration(runners).offline_data(output=str(tmp_path / "episodes")).build_algo()
    rewards = [algorithm.train()["grpo"]["reward_mean"] for _ in range(2)]
    algorithm.sampler.collect(1, algorithm.weights())  # shards that are run again write the same files
    algorithm.stop()
    files = sorted((tmp_path / "episodes").iterdir())
    assert [path.name for path in files] == [
        f"iteration_{iteration:06d}-shard_{shard:05d}.parquet" for iteration in (0, 1) for shard in (0, 1)
    ]
    states = [state for path in files for state in pq.read_table(path)["item"].to_pylist()]
    unpacked = [msgpack.unpackb(state, object_hook=msgpack_numpy.decode) for state in states]
    episodes = [SingleAgentEpisode.from_state(state) for state in unpacked]
    assert len(episodes) == 64
    assert all(episode.is_terminated and len(episode) == 2 for episode in episodes)
    assert np.mean([episode.get_return() for episode in episodes[:32]]) == pytest.approx(rewards[0])
    assert episodes[0].get_observations(0)["language_feature"].shape == (grpo_toy.WIDTH,)


def test_without_exploration_the_most_likely_actions_are_taken() -> None:
    algorithm = configuration().env_runners(explore=False).build_algo()
    rollouts, *_ = algorithm._sample()
    groups = rollouts.actions.reshape(-1, 4, 2, 4)
    assert (groups == groups[:, :1]).all()
    algorithm.stop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.env_runners(observation_filter="MeanStdFilter"), "observation_filter"),
        (lambda config: config.env_runners(env_to_module_connector=lambda *_: None), "_env_to_module_connector"),
        (lambda config: config.env_runners(module_to_env_connector=lambda *_: None), "_module_to_env_connector"),
        (lambda config: config.training(learner_connector=lambda *_: None), "_learner_connector"),
        (lambda config: config.training(train_batch_size_per_learner=500), "train_batch_size_per_learner"),
        (lambda config: config.offline_data(output="/nowhere", output_write_episodes=False), "output_write_episodes"),
        (
            lambda config: config.environment(env_config={"no_contexts": True}).evaluation(evaluation_interval=1),
            "no contexts to evaluate, and the environment has no held_out_contexts",
        ),
        (lambda config: config.environment(env_config={"group_size": 2}), "group_size = 2 in env_config is not the 4"),
        (
            lambda config: evaluating(config).evaluation(
                evaluation_parallel_to_training=True, evaluation_duration="auto", evaluation_num_env_runners=1
            ),
            "evaluation_parallel_to_training = True has no effect",
        ),
        (lambda config: config.rl_module(rl_module_spec=RLModuleSpec(module_class=Uniform)), "RLModule Uniform"),
    ],
)
def test_what_would_be_ignored_is_refused(change: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        change(configuration()).build_algo()
    assert "\n" not in caught.value.message


# 4. Usual metrics.


def test_results_have_the_usual_keys() -> None:
    algorithm = evaluating(configuration()).evaluation(evaluation_interval=1).build_algo()
    result = algorithm.train()
    episodes, row = result["env_runners"], result["grpo"]
    assert episodes["episode_return_mean"] == pytest.approx(row["reward_mean"])
    assert episodes["episode_return_min"] < row["reward_mean"] < episodes["episode_return_max"]
    assert episodes["episode_len_mean"] == episodes["episode_len_min"] == episodes["episode_len_max"] == 2
    evaluated = result["evaluation"]["env_runners"]
    assert evaluated["episode_return_mean"] == pytest.approx(evaluated["reward_mean"])
    assert evaluated["episode_len_mean"] == 2
    algorithm.stop()


# 5. One controller.


def test_get_module_and_the_checkpoints_module_are_the_controller_that_was_validated(tmp_path: Path) -> None:
    algorithm = evaluating(configuration(ema_decay=0.9)).build_algo()
    for _ in range(2):
        algorithm.train()
    exported = {f"controller.{name}": value.numpy() for name, value in algorithm.controller().state_dict().items()}
    assert fingerprint(algorithm.get_module().get_state()) == fingerprint(exported)
    algorithm.save_to_path(tmp_path / "saved")
    module = RLModule.from_checkpoint(tmp_path / "saved" / VALIDATED_MODULE)
    assert fingerprint(module.get_state()) == fingerprint(exported)
    before = evaluate_contexts(algorithm, CONTEXTS)
    algorithm.stop()
    restored = evaluating(configuration(ema_decay=0.9)).build_algo()
    restored.restore_from_path(tmp_path / "saved")
    assert fingerprint(restored.get_module().get_state()) == fingerprint(exported)
    assert evaluate_contexts(restored, CONTEXTS) == before
    restored.stop()


# 6. Schedules.


def test_schedules_count_monotone_steps_when_groups_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = configuration(skip_uniform_groups=True, lr=[[0, 1e-3], [640, 1e-4]]).build_algo()
    steps, rates = [], []
    update = algorithm.learner_group.update

    def watched(**given: Any) -> Any:
        steps.append(given["timesteps"]["num_env_steps_sampled_lifetime"])
        return update(**given)

    monkeypatch.setattr(algorithm.learner_group, "update", watched)
    for iteration in range(4):
        result = algorithm.train()
        rates.append(result["learners"]["default_policy"]["default_optimizer_learning_rate"])
        assert steps[-1] == (iteration + 1) * 64
    assert steps == sorted(steps)
    assert rates == pytest.approx([1e-3 - 9e-4 * 64 * done / 640 for done in (1, 2, 3, 4)])
    algorithm.stop()


# 7. Draws by group.


def test_metrics_are_the_same_at_any_number_of_runners_and_environments() -> None:
    rows = {}
    for runners, envs in ((0, 48), (0, 8), (1, 48), (2, 24), (3, 16)):
        config = resumable(runners).training(groups_per_iteration=12)
        config.env_runners(num_envs_per_env_runner=envs, num_cpus_per_env_runner=0.3)
        algorithm = config.build_algo()
        rows[runners, envs] = [numbers(algorithm.train()) for _ in range(2)]
        rows[runners, envs].append(state_checksum(algorithm.controller().state_dict()))
        algorithm.stop()
    first = next(iter(rows.values()))
    assert all(row == first for row in rows.values()), {key: row[-1] for key, row in rows.items()}
