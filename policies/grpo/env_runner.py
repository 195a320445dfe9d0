"""Rollouts: what an env runner does with one shard of an iteration.

A shard is one reset of all of a runner's environments. Its contexts and its random draws are a function
of (seed, iteration, group) and of the weights that come with the request, never of the shard, the runner or its past:
how groups are cut into shards changes nothing, and a shard lost with a dead runner is run again anywhere.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.rllib.core.columns import Columns

from policies.baselines import Baseline
from policies.distribution import STAGES, KnobDistribution
from policies.grpo.known_plans import PlanTree
from policies.grpo.rl_module import BaselineModule
from policies.grpo.rllib_adapter import EnvRunnerBase

Array = npt.NDArray[Any]
STEPS: Final = 2
"""Decisions of an episode."""
RETRY_S: Final = 1.0
MULTIPLIERS: Final = "penalty_multipliers"
"""Where the penalty multipliers travel among the weights."""


@dataclass(frozen=True)
class Rollouts:
    """N finished two-step episodes as arrays: steps (N, 2, ...), final infos (N,).

    Attributes:
        metrics: RLlib's, of the runner that made them.
        runner: its index.
        stats: cumulative counters of its engine.
        tree: the groups' other decisions, with `grpo.advantages=known`.
    """

    obs: Mapping[str, Array]
    actions: Array
    log_probs: Array
    logits: Array
    rewards: Array
    infos: Mapping[str, Array]
    metrics: Any = None
    runner: int = 0
    stats: Mapping[str, float] = field(default_factory=dict)
    tree: PlanTree | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def take(self, rows: Array) -> "Rollouts":
        """Rows of these rollouts, in the order given."""
        return Rollouts(
            obs={key: value[rows] for key, value in self.obs.items()},
            actions=self.actions[rows],
            log_probs=self.log_probs[rows],
            logits=self.logits[rows],
            rewards=self.rewards[rows],
            infos={key: value[rows] for key, value in self.infos.items()},
        )

    @staticmethod
    def concatenate(parts: Sequence["Rollouts"]) -> "Rollouts":
        """All parts in one, in order."""
        return Rollouts(
            obs={key: np.concatenate([part.obs[key] for part in parts]) for key in parts[0].obs},
            actions=np.concatenate([part.actions for part in parts]),
            log_probs=np.concatenate([part.log_probs for part in parts]),
            logits=np.concatenate([part.logits for part in parts]),
            rewards=np.concatenate([part.rewards for part in parts]),
            infos={key: np.concatenate([part.infos[key] for part in parts]) for key in parts[0].infos},
            tree=None if parts[0].tree is None else PlanTree.concatenate([part.tree for part in parts if part.tree]),
        )


class RolloutRunner(EnvRunnerBase):
    """RLlib's env runner, working in shards."""

    module: Any

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        if kwargs.get("worker_index"):
            torch.set_num_threads(config.runner_threads)
        super().__init__(config=config, **kwargs)

    def make_env(self) -> None:
        group_size = 1 if self.config.in_evaluation else self.config.grpo.group_size
        self.config.env_config = {**self.config.env_config, "group_size": group_size}
        # The process before a restarted runner may not have given back the memory of their only GPU yet.
        deadline = time.monotonic() + self.config.timeouts.restart_timeout_s
        while True:
            try:
                super().make_env()
                return
            except torch.OutOfMemoryError:
                if not self.is_successor() or time.monotonic() > deadline:
                    raise
            torch.cuda.empty_cache()
            time.sleep(RETRY_S)

    def make_module(self) -> None:
        super().make_module()
        if self.module is not None:
            self.module.eval()  # RLlib would switch modes around each forward pass

    def load_weights(self, weights: Any) -> None:
        """Take the controller's weights, whatever their age.

        Args:
            weights: the module's state, or a reference to it in the object store. Under `MULTIPLIERS` it may have the
                environment's penalty multipliers; without them the constant one applies.
        """
        state = dict(ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights)
        multipliers = state.pop(MULTIPLIERS, None)
        if self.env is not None:  # with remote runners the local one has no environment
            self.env.unwrapped.set_multipliers(multipliers)
        self.module.set_state(state)

    def sample_shard(self, *, iteration: int, shard: int, shards: int, weights: Any) -> Rollouts:
        """Roll out one shard of a training iteration under the given weights."""
        self.load_weights(weights)
        environment = self.env.unwrapped
        environment.set_worker(shard, shards)
        environment.set_iteration(iteration)
        uniforms = None
        if self.config.explore:
            size = self.config.grpo.group_size
            count = self.num_envs // size
            groups = range(shard * count, (shard + 1) * count)
            uniforms = group_uniforms(self.config.seed, iteration, groups, size)
        rollouts = self._roll_out(self.module, uniforms, tree=self.config.grpo.advantages == "known")
        self.hand_out_episodes(rollouts, f"iteration_{iteration:06d}-shard_{shard:05d}")
        stats = environment.stats() if hasattr(environment, "stats") else {}
        return replace(rollouts, metrics=self.get_metrics(), runner=int(self.worker_index or 0), stats=stats)

    def held_out_contexts(self) -> list[Any] | None:
        """The environment's own contexts to evaluate; None if it has none."""
        environment = self.env.unwrapped
        return list(environment.held_out_contexts()) if hasattr(environment, "held_out_contexts") else None

    def run_contexts(
        self, *, contexts: Sequence[Any], first: int, weights: Any, baseline: Baseline | None
    ) -> list[dict[str, float]]:
        """Act greedily (or by a baseline) once in each context; one row of final infos per context.

        Args:
            contexts: at most as many as this runner has environments.
            first: index of the first of them among all contexts evaluated, added to each row's `context`.
        """
        environment = self.env.unwrapped
        environment.set_contexts(list(contexts))
        environment.set_worker(0, 1)
        environment.set_iteration(0)
        if baseline is None:
            self.load_weights(weights)
            module = self.module
        else:
            module = BaselineModule(baseline, (first,), self.module)
        return _rows(self._roll_out(module, None), first, len(contexts))

    def _roll_out(self, module: Any, uniforms: Array | None, *, tree: bool = False) -> Rollouts:
        """Every environment from reset to the end of its episode, all in step.

        Straight between module and environment: RLlib's own `sample` makes an object of every episode and a list of
        every step, which for two-step episodes costs more than all the rest of a warm rollout.

        Args:
            uniforms: (num_envs, STEPS, STAGES) in [0, 1), which choose the actions; None takes the most likely ones.
            tree: also return every other decision, with what is known before the rollouts.

        Raises:
            RuntimeError: an episode that ends before the others.
        """
        environment = self.env.unwrapped
        observation, _ = environment.reset()
        known = self._plan_tree(module) if tree else None
        steps: list[_Step] = []
        rewards, ended = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)
        infos: Mapping[str, Array] = {}
        while not ended.any():
            step = _decide(module, observation, None if uniforms is None else uniforms[:, len(steps)], self.device)
            observation, reward, terminated, truncated, infos = environment.step(step.actions)
            steps.append(step)
            rewards += reward
            ended = terminated | truncated
        if not ended.all():
            raise RuntimeError(f"{int(ended.sum())} of {len(ended)} rollouts ended early: all must take as many steps")
        self.count_steps(len(steps) * self.num_envs, self.num_envs)
        return Rollouts(
            obs={key: np.stack([step.obs[key] for step in steps], 1) for key in steps[0].obs},
            actions=np.stack([step.actions for step in steps], 1),
            log_probs=np.stack([step.log_probs for step in steps], 1),
            logits=np.stack([step.logits for step in steps], 1),
            rewards=rewards,
            infos={
                key: value
                for key, value in infos.items()
                if np.asarray(value).dtype.kind in "biuf" and not key.startswith("_")
            },
            tree=known,
        )

    @torch.no_grad()
    def _plan_tree(self, module: Any) -> PlanTree:
        obs, returns, executions = self.env.unwrapped.plan_tree()
        rows = {k: torch.from_numpy(v.reshape(-1, v.shape[-1])).to(self.device) for k, v in obs.items()}
        logits = module.forward_exploration({Columns.OBS: rows})[Columns.ACTION_DIST_INPUTS].numpy(force=True)
        return PlanTree(obs, logits.reshape(*returns.shape[:2], -1), returns, executions)


@dataclass(frozen=True)
class _Step:
    """One decision of N environments: observations (N, ...), actions (N, 4), and where they came from, empty for
    actions without a distribution."""

    obs: Mapping[str, Array]
    actions: Array
    log_probs: Array
    logits: Array


@torch.no_grad()
def _decide(module: Any, observation: Mapping[str, Array], uniforms: Array | None, device: Any) -> _Step:
    obs = {key: np.array(value) for key, value in observation.items()}
    forward = module.forward_inference if uniforms is None else module.forward_exploration
    answer = forward({Columns.OBS: {key: torch.from_numpy(value).to(device) for key, value in obs.items()}})
    if Columns.ACTIONS in answer:
        actions = answer[Columns.ACTIONS].numpy(force=True)
        return _Step(obs, actions, np.zeros(len(actions), np.float32), np.zeros((len(actions), 0), np.float32))
    logits = answer[Columns.ACTION_DIST_INPUTS]
    policy = KnobDistribution(logits)
    chosen = policy.argmax() if uniforms is None else policy.at(torch.from_numpy(uniforms).to(device))
    return _Step(obs, *(part.numpy(force=True) for part in (chosen, policy.log_prob(chosen), logits)))


def group_uniforms(seed: int, iteration: int, groups: Sequence[int], group_size: int) -> Array:
    """The random numbers (len(groups) * group_size, STEPS, STAGES) of some groups of an iteration."""
    generators = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, iteration, group)))) for group in groups
    ]
    return np.concatenate([generator.random((group_size, STEPS, STAGES)) for generator in generators])


def _rows(rollouts: Rollouts, first: int, count: int) -> list[dict[str, float]]:
    """One dict per context 0..count-1 of the shard, surplus and repeated environments dropped."""
    rows: dict[int, dict[str, float]] = {}
    for index, context in enumerate(rollouts.infos["context"].tolist()):
        if 0 <= context < count and context not in rows:
            row = {key: value[index].item() for key, value in rollouts.infos.items()}
            row["context"] = first + context
            row["log_ratio"] = float(rollouts.obs["budget"][index, 0, 0])
            row["reward"] = float(rollouts.rewards[index])
            rows[context] = row
    return [rows[context] for context in sorted(rows)]
