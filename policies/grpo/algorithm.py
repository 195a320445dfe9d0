"""GRPO on RLlib, the whole loop in one file.

One iteration: sample whole chunks -> complete groups -> advantages within groups -> epochs of minibatches on the
learners -> average -> penalty multipliers -> reference. Everything random is derived from
(seed, round), and the round is part of the checkpoint, so a resumed run repeats the undisturbed one. With
`max_staleness` above 0, runners sample the next rounds meanwhile, under weights that old at most.
"""

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS, LEARNER_RESULTS

from envs.errors import UserError
from policies.controller import Controller
from policies.distribution import KnobDistribution
from policies.grpo import checkpoint
from policies.grpo.advantages import GroupAdvantages, group_advantages
from policies.grpo.averaging import Average, Weights
from policies.grpo.config import GRPOConfig
from policies.grpo.evaluation import EvaluationRequest, Row
from policies.grpo.lagrangian import PenaltyMultipliers, greedy_violation_rates
from policies.grpo.learner import ENTROPY_SHARES, WEIGHTS, answering, each_learner, learner_errors
from policies.grpo.metrics import learner_metrics, rollout_metrics
from policies.grpo.minibatches import minibatches
from policies.grpo.rounds import Rounds, summed
from policies.grpo.runner import MULTIPLIERS, Rollouts
from policies.grpo.spread import Spread, startup_errors, stop_runners

STATE: Final = "grpo"
__all__ = ["GRPO", "GRPOConfig"]


class GRPO(Algorithm):
    """The training loop. `train()` adds a flat dict of this iteration's numbers, `result["grpo"]`, to RLlib's."""

    config: GRPOConfig

    @classmethod
    def get_default_config(cls) -> GRPOConfig:
        return GRPOConfig()

    @classmethod
    def _should_create_evaluation_env_runners(cls, eval_config: Any) -> bool:
        # `evaluate()` is called by hand as well, so runners for it exist whenever their environment is configured.
        return eval_config.evaluation_runners or super()._should_create_evaluation_env_runners(eval_config)

    def setup(self, config: Any) -> None:
        self.round = 0
        lagrangian = self.config.lagrangian
        self.multipliers = PenaltyMultipliers.start(lagrangian) if lagrangian else None
        self.average = Average(self.config.average)
        self.evaluation_request: EvaluationRequest | None = None
        self.evaluation_rows: list[Row] = []
        self._row: dict[str, float] = {}
        with startup_errors():
            super().setup(config)
        self.spread = Spread(
            self.env_runner_group,
            "sample_chunk",
            timeout_s=self.config.sample_timeout_s,
            restart_timeout_s=self.config.restart_timeout_s,
            restore=self.restore_env_runners,
        )
        self.rounds = Rounds(
            self.spread,
            chunks=self.config.chunks_per_iteration,
            group_size=self.config.group_size,
            ahead=self.config.max_staleness,
        )

    def _setup_logdir(self) -> None:
        # RLlib would leave an empty folder in the user's home for every algorithm built.
        if self._storage:
            super()._setup_logdir()
        else:
            self._logdir = tempfile.mkdtemp(prefix="grpo-")

    def cleanup(self) -> None:
        for name in ("env_runner_group", "eval_env_runner_group"):
            stop_runners(getattr(self, name, None))
        super().cleanup()
        if not self._storage:
            shutil.rmtree(self._logdir, ignore_errors=True)

    def step(self) -> dict[str, Any]:
        with learner_errors(self.round):
            result: dict[str, Any] = super().step()
        evaluated = self.config.evaluation_interval and (self.iteration + 1) % self.config.evaluation_interval == 0
        if not evaluated:
            result.pop(EVALUATION_RESULTS, None)  # RLlib repeats the last one otherwise
        result[STATE] = dict(self._row)
        return result

    def training_step(self) -> None:
        """One iteration of GRPO."""
        started = time.perf_counter()
        rollouts, counts = self._sample()
        sampled = time.perf_counter()
        returns = self._returns(rollouts)
        groups = group_advantages(
            returns.reshape(-1, self.config.group_size), divide_by_spread=self.config.divide_by_spread
        )
        self._learn(rollouts, groups)
        if self.config.average:
            self.average = self.average.updated(self._latest())
        self._row = {"round": float(self.round)}
        self._row |= rollout_metrics(rollouts, groups, self.multipliers)
        if self.multipliers is not None:
            self.multipliers = self.multipliers.updated(*_greedy_rates(rollouts, self.multipliers.settings.bins))
        self.round += 1
        interval = self.config.reference_interval
        if self.config.kl_coeff > 0 and interval and self.round % interval == 0:
            with answering(self.learner_group, self.config.learner_timeout_s):
                each_learner(self.learner_group, lambda learner: learner.refresh_reference())
        self._row |= learner_metrics(self.metrics) | counts
        self._row["seconds_sample"] = sampled - started
        self._row["seconds_learn"] = time.perf_counter() - sampled

    def _sample(self) -> tuple[Rollouts, dict[str, float]]:
        """Complete groups of this round; when they are here, the rounds ahead are in the runners' queues."""
        # The multipliers travel with the weights: rollouts are scored by those in force when they were ordered.
        multipliers = None if self.multipliers is None else self.multipliers.values
        self.rounds.order(self.round, _shared({**self._latest(), MULTIPLIERS: multipliers}))
        rollouts, runner_metrics, counts = self.rounds.collect(self.round)
        self.spread.fill()
        self.metrics.aggregate(runner_metrics, key=ENV_RUNNER_RESULTS)
        return rollouts, counts

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

    def _learn(self, rollouts: Rollouts, groups: GroupAdvantages) -> None:
        """Epochs of minibatches over both decisions of every rollout, with the rollout's advantage given to both."""
        rows = np.arange(len(rollouts))
        if self.config.drop_equal_groups:
            rows = rows.reshape(groups.equal.size, -1)[~groups.equal].reshape(-1)
        if not rows.size:
            return
        if rows.size < len(rollouts):
            rollouts = rollouts.take(rows)
        columns = _columns(rollouts, groups.values.reshape(-1)[rows])
        columns[ENTROPY_SHARES] = np.full(2 * rows.size, self.config.entropy_share(self.round), np.float32)
        learners = max(1, self.config.num_learners)
        results: list[Any] = []
        for epoch in range(self.config.num_epochs):
            generator = np.random.default_rng([self.config.seed, self.round, epoch])
            count = 2 * rows.size
            order, weights, size = minibatches(count, self.config.minibatch_size or count, learners, generator)
            batch = SampleBatch(_take(columns, order) | {WEIGHTS: weights})
            with answering(self.learner_group, self.config.learner_timeout_s):
                results += self.learner_group.update(
                    batch=MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(order)),
                    timesteps={"num_env_steps_sampled_lifetime": (self.round + 1) * count},
                    minibatch_size=size // learners,
                    num_epochs=1,
                )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)

    def weights(self) -> Any:
        """The latest weights, by which rollouts are sampled, as runners take them."""
        return _shared(self._latest())

    def evaluated_weights(self) -> Any:
        """What is evaluated and exported, as runners take it: the average, or the latest weights if none is kept."""
        return _shared(self._evaluated())

    def _evaluated(self) -> Weights:
        return self._latest() if self.average.weights is None else self.average.weights

    def _latest(self) -> Weights:
        with answering(self.learner_group, self.config.learner_timeout_s):
            state: Weights = self.learner_group.get_state(
                components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=True
            )[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        return state

    def engine_stats(self) -> dict[str, float]:
        """Cumulative counters of the engines that sample, summed over runners, as of their last chunks."""
        return summed(list(self.rounds.stats.values()))

    def controller(self) -> Controller:
        """A copy of the controller as evaluated now, on the CPU, ready for `Controller.save`."""
        return checkpoint.controller_from(self._evaluated(), self.config.hidden)

    # Checkpoints: RLlib saves weights, optimizer, reference and counters; the round and the multipliers are added here.

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().get_state(*args, **kwargs)
        state[STATE] = {
            "round": self.round,
            "seed": self.config.seed,
            "multipliers": self.multipliers and self.multipliers.state(),
        }
        state[STATE] |= {"rounds": self.rounds.state(), "average": self.average.state()}
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.spread.drop()
        super().set_state(state)
        if STATE in state:
            self.rounds.restore(state[STATE]["rounds"])
            self.round = int(state[STATE]["round"])
            stored = state[STATE]["multipliers"]
            if (stored is None) != (self.multipliers is None):
                raise UserError(
                    "checkpoint and configuration differ in whether penalty bins have multipliers of their own: resume "
                    "with the reward.mode of the run"
                )
            if self.multipliers is not None:
                self.multipliers = self.multipliers.restored(stored)
            self.average = self.average.restored(state[STATE].get("average"))

    def save_to_path(self, path: Any = None, **kwargs: Any) -> str:
        with answering(self.learner_group, self.config.learner_timeout_s):
            written = super().save_to_path(path, **kwargs)
            checkpoint.check_written(self.learner_group, Path(written))
        checkpoint.write_manifest(Path(written))
        return str(written)

    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        checkpoint.verify(Path(path))
        with learner_errors(self.round), answering(self.learner_group, self.config.learner_timeout_s):
            with checkpoint.explained(Path(path)):
                super().restore_from_path(path, *args, **kwargs)
            checkpoint.check_learners(self.learner_group, Path(path))
        checkpoint.check_runners(self)


def _shared(state: Mapping[str, Any]) -> Any:
    """Weights as runners take them: in the object store if they are remote."""
    return ray.put(state) if ray.is_initialized() else state


def _columns(rollouts: Rollouts, advantages: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Learner columns with one row per decision: (N, 2, ...) to (2 N, ...)."""
    steps = rollouts.log_probs.shape[1]

    def flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.reshape(-1, *array.shape[2:])

    return {
        Columns.OBS: {key: flat(value) for key, value in rollouts.obs.items()},
        Columns.ACTIONS: flat(rollouts.actions),
        Columns.ACTION_LOGP: flat(rollouts.log_probs),
        Columns.ACTION_DIST_INPUTS: flat(rollouts.logits),
        Columns.ADVANTAGES: np.repeat(advantages, steps).astype(np.float32),
    }


def _take(columns: Mapping[str, Any], rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {key: _take(value, rows) if isinstance(value, Mapping) else value[rows] for key, value in columns.items()}


def _greedy_rates(rollouts: Rollouts, bins: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Violation rates of the argmax policy, which is what ships, per budget bin, and their effective sample sizes."""
    infos = rollouts.infos
    best = KnobDistribution(torch.from_numpy(rollouts.logits.reshape(-1, rollouts.logits.shape[-1]))).argmax().numpy()
    greedy = (best.reshape(rollouts.actions.shape) == rollouts.actions).all(axis=(1, 2))
    late = infos["latency_ms"] > infos["budget_ms"]
    log_prob = rollouts.log_probs.sum(axis=1)
    return greedy_violation_rates(infos["budget_bin"], late, greedy, log_prob, infos["avoidable"], bins)
