"""GRPO on RLlib, the complete loop in one file.

One iteration: sample shards of complete groups -> advantages within groups -> epochs of minibatches on the
learners -> moving average of the weights -> penalty multipliers -> reference. Everything random is derived from (seed,
iteration), and the count of iterations is part of the checkpoint, so a resumed run repeats the undisturbed one. With
`max_policy_lag` above 0, runners sample the next iterations meanwhile, under weights that old at most.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EVALUATION_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)

from envs.errors import UserError
from envs.files import write_manifest
from policies.controller import Controller
from policies.distribution import KnobDistribution
from policies.grpo import checkpoint
from policies.grpo.algorithm_config import GRPOConfig
from policies.grpo.config import VALIDATED_MODULE
from policies.grpo.decisions import ENTROPY_SHARES, WEIGHTS, executions_used, known_decisions, sampled_decisions, take
from policies.grpo.ema import WeightAverage, Weights
from policies.grpo.env_runner import MULTIPLIERS, STEPS, Rollouts
from policies.grpo.evaluation import EvaluationRequest, Row, standing_contexts
from policies.grpo.lagrangian import FloatArray, PenaltyMultipliers, greedy_violation_sums
from policies.grpo.learner import kill_on_timeout, learner_errors
from policies.grpo.metrics import as_runner_results, episode_metrics, learner_metrics, rollout_metrics
from policies.grpo.objective import GroupAdvantages, group_advantages, minibatches
from policies.grpo.rllib_adapter import QuietAlgorithm, RunnerPool, each_learner
from policies.grpo.sampling import Dispatcher, Sampler, summed

STATE: Final = "grpo"
__all__ = ["GRPO", "GRPOConfig"]


class GRPO(QuietAlgorithm):
    """The training loop. `train()` adds a flat dict of this iteration's numbers, `result["grpo"]`, to RLlib's.

    Attributes:
        updates: iterations completed since the run began, over all its processes; part of the checkpoint.
    """

    config: GRPOConfig

    @classmethod
    def get_default_config(cls) -> GRPOConfig:
        return GRPOConfig()

    def setup(self, config: Any) -> None:
        self.updates = 0
        lagrangian, bins = self.config.lagrangian, self.config.penalty_bins
        self.multipliers = PenaltyMultipliers.start(lagrangian, bins) if lagrangian else None
        self.average = WeightAverage(self.config.grpo.ema_decay)
        self.executions = np.empty(0, np.int64)
        self.evaluation_request: EvaluationRequest | None = None
        self.evaluation_rows: list[Row] = []
        self._row: dict[str, float] = {}
        super().setup(config)
        if self.config.evaluation_interval:
            standing_contexts(self)  # without any, better now than after the first iteration
        self.sampler = self._sampler()
        self._publish()

    def _sampler(self) -> Sampler:
        config = self.config
        runners = RunnerPool(self.env_runner_group, "env", restarts=config.restart_failed_env_runners)
        dispatcher = Dispatcher(
            runners,
            "sample_shard",
            timeout_s=config.timeouts.sample_timeout_s,
            restart_timeout_s=config.timeouts.restart_timeout_s,
        )
        return Sampler(
            dispatcher,
            shards=config.shards_per_iteration,
            group_size=config.grpo.group_size,
            max_policy_lag=config.grpo.max_policy_lag,
        )

    def step(self) -> dict[str, Any]:
        with learner_errors(self.updates):
            result: dict[str, Any] = super().step()
        evaluated = self.config.evaluation_interval and (self.iteration + 1) % self.config.evaluation_interval == 0
        if not evaluated:
            result.pop(EVALUATION_RESULTS, None)  # RLlib repeats the last one otherwise
        result[STATE] = dict(self._row)
        return result

    def training_step(self) -> None:
        """One iteration of GRPO."""
        with self._all_or_nothing():
            started = time.perf_counter()
            rollouts, runner_metrics, counts = self._sample()
            sampled = time.perf_counter()
            returns = self._returns(rollouts)
            groups = group_advantages(
                returns.reshape(-1, self.config.grpo.group_size), normalize_by_std=self.config.grpo.normalize_by_std
            )
            learner_results = self._learn(rollouts, returns, groups)
            if self.average.decay:
                self.average = self.average.updated(self._latest())
            row = rollout_metrics(rollouts, groups, self.multipliers) | self._count_executions(rollouts)
            if self.multipliers is not None:
                self.multipliers = self.multipliers.updated(_violation_sums(rollouts, self.config.penalty_bins))
            self._refresh_reference()
            self._publish()
            episodes = as_runner_results(episode_metrics(returns, STEPS))
            self.metrics.aggregate([*runner_metrics, episodes], key=ENV_RUNNER_RESULTS)
            self.metrics.aggregate(learner_results, key=LEARNER_RESULTS)
            seconds = {"seconds_sample": sampled - started, "seconds_learn": time.perf_counter() - sampled}
            self._row = {"updates": float(self.updates)} | row | learner_metrics(self.metrics) | counts | seconds
            self.updates += 1

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Return to the beginning of the iteration when anything is raised, an interrupt included.

        The next `train()` then repeats the iteration with the same numbers: what is drawn depends on (seed, iteration),
        and the sampler samples again under the same weights and multipliers.
        """
        begun = self.multipliers, self.average, self.updates, self.executions
        self._each_learner(lambda learner: learner.remember())
        try:
            yield
        except BaseException:
            self.multipliers, self.average, self.updates, self.executions = begun
            with suppress(ray.exceptions.RayError, UserError):  # a learner that died cannot, and was the error
                self._each_learner(lambda learner: learner.roll_back())
            raise

    def _each_learner(self, ask: Callable[[Any], Any]) -> None:
        with kill_on_timeout(self.learner_group, self.config.timeouts.learner_timeout_s):
            each_learner(self.learner_group, ask)

    def _refresh_reference(self) -> None:
        interval = self.config.grpo.reference_interval
        if self.config.grpo.kl_coef > 0 and interval and (self.updates + 1) % interval == 0:
            self._each_learner(lambda learner: learner.refresh_reference())

    def _publish(self) -> None:
        """Give the local runner the controller that is evaluated: `get_module()` and the checkpoint's module."""
        if self.env_runner is not None:
            self.env_runner.load_weights(self._evaluated())

    def _sample(self) -> tuple[Rollouts, list[Any], dict[str, float]]:
        """Complete groups of this iteration; when they are here, the iterations ahead are in the runners' queues."""
        return self.sampler.collect(self.updates, self.weights())

    def _returns(self, rollouts: Rollouts) -> npt.NDArray[np.float64]:
        """What is learned, (N,): the environment's reward, under the multipliers that traveled with the weights.

        Raises:
            UserError: a reward that is not finite.
        """
        returns = np.asarray(rollouts.rewards, np.float64)
        if not np.isfinite(returns).all():
            raise UserError(
                f"{int((~np.isfinite(returns)).sum())} of {len(returns)} rewards are not finite: check the environment"
            )
        return returns

    def _count_executions(self, rollouts: Rollouts) -> dict[str, float]:
        """Distinct model executions that the run has learned from so far, whoever ran them."""
        if "execution" not in rollouts.infos:
            return {}
        self.executions = np.union1d(self.executions, executions_used(rollouts, self.config.grpo.group_size))
        return {"model_executions": float(self.executions.size)}

    def _decisions(
        self, rollouts: Rollouts, returns: npt.NDArray[np.float64], groups: GroupAdvantages
    ) -> dict[str, Any]:
        """The rows to learn from."""
        grpo = self.config.grpo
        if grpo.advantages == "known":
            return known_decisions(rollouts, returns.reshape(-1, grpo.group_size))
        if not grpo.skip_uniform_groups:
            return sampled_decisions(rollouts, groups.values.reshape(-1))
        rows = np.arange(len(rollouts)).reshape(groups.uniform.size, -1)[~groups.uniform].reshape(-1)
        return sampled_decisions(rollouts.take(rows), groups.values.reshape(-1)[rows])

    def _learn(self, rollouts: Rollouts, returns: npt.NDArray[np.float64], groups: GroupAdvantages) -> list[Any]:
        """Epochs of minibatches over all decisions."""
        columns = self._decisions(rollouts, returns, groups)
        count = len(columns[WEIGHTS])
        if not count:
            return []
        # Schedules count decisions sampled, not those that are left after skipping: they never run backwards.
        decisions = (self.updates + 1) * self.config.rollouts_per_iteration * STEPS
        columns[ENTROPY_SHARES] = np.full(count, self.config.entropy_share(self.updates), np.float32)
        learners = max(1, self.config.num_learners)
        results: list[Any] = []
        for epoch in range(self.config.grpo.epochs):
            generator = np.random.default_rng([self.config.seed, self.updates, epoch])
            order, weights, size = minibatches(count, self.config.grpo.minibatch_size or count, learners, generator)
            rows = take(columns, order)
            batch = SampleBatch(rows | {WEIGHTS: weights * rows[WEIGHTS]})
            with kill_on_timeout(self.learner_group, self.config.timeouts.learner_timeout_s):
                results += self.learner_group.update(
                    batch=MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(order)),
                    timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: decisions},
                    minibatch_size=size // learners,
                    num_epochs=1,
                )
        return results

    def weights(self) -> Any:
        """The latest weights, by which rollouts are sampled, as runners take them.

        The multipliers travel with them: rollouts are scored by those in force when they were ordered.
        """
        multipliers = None if self.multipliers is None else self.multipliers.values
        return _shared({**self._latest(), MULTIPLIERS: multipliers})

    def evaluated_weights(self) -> Any:
        """What is evaluated and exported, as runners take it: the average, or the latest weights if none is kept."""
        return _shared(self._evaluated())

    def _evaluated(self) -> Weights:
        return self._latest() if self.average.weights is None else self.average.weights

    def _latest(self) -> Weights:
        with kill_on_timeout(self.learner_group, self.config.timeouts.learner_timeout_s):
            state: Weights = self.learner_group.get_state(
                components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=True
            )[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        return state

    def engine_stats(self) -> dict[str, float]:
        """Cumulative counters of the engines that sample, summed over runners, as of their last shards."""
        return summed(list(self.sampler.stats.values()))

    def controller(self) -> Controller:
        """A copy of the controller as evaluated now, on the CPU, ready for `Controller.save`."""
        return checkpoint.controller_from(self._evaluated(), self.config.controller)

    # Checkpoints: RLlib saves weights, optimizer, reference and its counters; the rest is added here.

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().get_state(*args, **kwargs)
        state[STATE] = {
            "updates": self.updates,
            "seed": self.config.seed,
            "multipliers": self.multipliers and self.multipliers.state(),
            "sampler": self.sampler.state(self.updates),
            "average": self.average.state(),
            "executions": self.executions,
        }
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.sampler.forget()
        super().set_state(state)
        if STATE in state:
            self.sampler.restore(state[STATE]["sampler"])
            self.updates = int(state[STATE]["updates"])
            stored = state[STATE]["multipliers"]
            if (stored is None) != (self.multipliers is None):
                raise UserError(
                    "checkpoint and configuration differ in whether penalty bins have multipliers of their own: resume "
                    "with the reward.mode of the run"
                )
            if self.multipliers is not None:
                self.multipliers = self.multipliers.restored(stored)
            self.average = self.average.restored(state[STATE]["average"])
            self.executions = np.asarray(state[STATE]["executions"], np.int64)

    def save_to_path(self, path: Any = None, **kwargs: Any) -> str:
        with kill_on_timeout(self.learner_group, self.config.timeouts.learner_timeout_s):
            written = super().save_to_path(path, **kwargs)
            checkpoint.check_written(self.learner_group, Path(written))
        if self.env_runner is not None:
            self.get_module().save_to_path(Path(written) / VALIDATED_MODULE)
        write_manifest(Path(written))
        return str(written)

    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        checkpoint.verify(Path(path))
        with learner_errors(self.updates), kill_on_timeout(self.learner_group, self.config.timeouts.learner_timeout_s):
            with checkpoint.explained(Path(path)):
                super().restore_from_path(path, *args, **kwargs)
            checkpoint.check_learners(self.learner_group, Path(path))
        checkpoint.check_runners(self)
        self._publish()


def _shared(state: Mapping[str, Any]) -> Any:
    """Weights as runners take them: in the object store if they are remote."""
    return ray.put(state) if ray.is_initialized() else state


def _violation_sums(rollouts: Rollouts, bins: int) -> FloatArray:
    """`greedy_violation_sums` of an iteration's rollouts."""
    infos = rollouts.infos
    best = KnobDistribution(torch.from_numpy(rollouts.logits.reshape(-1, rollouts.logits.shape[-1]))).argmax().numpy()
    greedy = (best.reshape(rollouts.actions.shape) == rollouts.actions).all(axis=(1, 2))
    violation = infos["latency_ms"] > infos["budget_ms"]
    log_prob = rollouts.log_probs.sum(axis=1)
    return greedy_violation_sums(infos["budget_bin"], violation, greedy, log_prob, infos["avoidable"], bins)
