"""Rollouts: what an env runner does with one chunk of work.

A chunk is one reset of all of a runner's environments. Its contexts and its random draws are a function
of (seed, round, chunk) and of the weights that come with the request, never of the runner or its past:
a chunk lost with a dead runner is simply run again, anywhere, with the same result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.metrics import EPISODE_RETURN_MEAN

from policies.baselines import Baseline
from policies.distribution import KnobDistribution
from policies.grpo.rl_module import BaselineModule

Array = npt.NDArray[Any]
MULTIPLIERS = "penalty_multipliers"


@dataclass(frozen=True)
class Rollouts:
    """N finished two-step episodes as arrays: steps (N, 2, ...), final infos (N,).

    Attributes:
        metrics: RLlib's, of the runner that made them.
        runner: its index.
        stats: cumulative counters of its engine.
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

    def __len__(self) -> int:
        return len(self.actions)

    def take(self, rows: Array) -> "Rollouts":
        """Rows of these rollouts, in the order given."""
        return self._map(lambda array: array[rows])

    def _map(self, change: Callable[[Array], Array]) -> "Rollouts":
        return Rollouts(
            obs={key: change(value) for key, value in self.obs.items()},
            actions=change(self.actions),
            log_probs=change(self.log_probs),
            logits=change(self.logits),
            rewards=change(self.rewards),
            infos={key: change(value) for key, value in self.infos.items()},
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
        )


class RolloutRunner(SingleAgentEnvRunner):
    """RLlib's env runner, working in chunks."""

    module: Any

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        if kwargs.get("worker_index"):
            torch.set_num_threads(config.runner_threads)
        super().__init__(config=config, **kwargs)

    def load_weights(self, weights: Any) -> None:
        """Take the controller's weights, whatever their age.

        Args:
            weights: the module's state, or a reference to it in the object store. Under `MULTIPLIERS` it may hold the
                environment's penalty multipliers; without them the constant one applies.
        """
        state = dict(ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights)
        multipliers = state.pop(MULTIPLIERS, None)
        if self.env is not None:  # beside remote runners the local one has no environment
            self.env.unwrapped.set_multipliers(multipliers)
        self.module.set_state(state)

    def sample_chunk(self, *, round_number: int, chunk: int, chunks: int, attempt: int, weights: Any) -> Rollouts:
        """Roll out one chunk of a training round under the given weights."""
        self.load_weights(weights)
        environment = self.env.unwrapped
        environment.set_worker(chunk, chunks)
        environment.set_round(round_number)
        generator = torch.Generator(self._device)
        generator.manual_seed(_seed(self.config.seed, round_number, chunk, attempt))
        rollouts = self._roll_out(self.module, generator)
        stats = environment.stats() if hasattr(environment, "stats") else {}
        return replace(rollouts, metrics=self.get_metrics(), runner=int(self.worker_index or 0), stats=stats)

    def run_contexts(
        self, *, contexts: Sequence[Any], first: int, weights: Any, baseline: Baseline | None
    ) -> list[dict[str, float]]:
        """Act greedily (or by a baseline) once in each context; one row of final infos per context.

        Args:
            contexts: at most as many as this runner has environments.
            first: index of the first of them in the whole evaluation, added to each row's `context`.
        """
        environment = self.env.unwrapped
        environment.set_contexts(list(contexts))
        environment.set_worker(0, 1)
        environment.set_round(0)
        if baseline is None:
            self.load_weights(weights)
            module = self.module
        else:
            module = BaselineModule(baseline, (first,), self.module)
        return _rows(self._roll_out(module, None), first, len(contexts))

    def _roll_out(self, module: Any, generator: torch.Generator | None) -> Rollouts:
        """Every environment from reset to the end of its episode, all in step.

        Straight between module and environment: RLlib's own `sample` makes an object of every episode and a list of
        every step, which for two-step episodes costs more than all the rest of a warm rollout.

        Args:
            generator: draws the actions; None takes the most likely ones.

        Raises:
            RuntimeError: an episode that ends before the others.
        """
        environment = self.env.unwrapped
        observation, _ = environment.reset()
        steps: list[_Step] = []
        rewards, ended = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)
        infos: Mapping[str, Array] = {}
        while not ended.any():
            step = _decide(module, observation, generator, self._device)
            observation, reward, terminated, truncated, infos = environment.step(step.actions)
            steps.append(step)
            rewards += reward
            ended = terminated | truncated
        if not ended.all():
            raise RuntimeError(f"{int(ended.sum())} of {len(ended)} rollouts ended early: all must take as many steps")
        self._increase_sampled_metrics(len(steps) * self.num_envs, self.num_envs)
        self.metrics.log_value(EPISODE_RETURN_MEAN, float(rewards.mean()), window=1)
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
        )


@dataclass(frozen=True)
class _Step:
    """One decision of N environments: observations (N, ...), actions (N, 4), and where they came from, empty for
    actions without a distribution."""

    obs: Mapping[str, Array]
    actions: Array
    log_probs: Array
    logits: Array


@torch.no_grad()
def _decide(module: Any, observation: Mapping[str, Array], generator: torch.Generator | None, device: Any) -> _Step:
    obs = {key: np.array(value) for key, value in observation.items()}
    batch = {Columns.OBS: {key: torch.from_numpy(value).to(device) for key, value in obs.items()}}
    answer = module.forward_inference(batch) if generator is None else module.forward_exploration(batch)
    if Columns.ACTIONS in answer:
        actions = answer[Columns.ACTIONS].numpy(force=True)
        return _Step(obs, actions, np.zeros(len(actions), np.float32), np.zeros((len(actions), 0), np.float32))
    logits = answer[Columns.ACTION_DIST_INPUTS]
    policy = KnobDistribution(logits)
    chosen = policy.argmax() if generator is None else policy.sample(generator)
    return _Step(obs, *(part.numpy(force=True) for part in (chosen, policy.log_prob(chosen), logits)))


def _is_numeric(key: str, value: Any) -> bool:
    """Numbers and flags; gymnasium's `_key` only says which environments have a value."""
    return np.asarray(value).dtype.kind in "biuf" and not key.startswith("_")


def _seed(*parts: int | None) -> int:
    """A well mixed 63-bit seed from integers."""
    entropy = [int(part or 0) for part in parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _rows(rollouts: Rollouts, first: int, count: int) -> list[dict[str, float]]:
    """One dict per context 0..count-1 of the chunk, surplus and repeated environments dropped."""
    rows: dict[int, dict[str, float]] = {}
    for index, context in enumerate(rollouts.infos["context"].tolist()):
        if 0 <= context < count and context not in rows:
            row = {key: value[index].item() for key, value in rollouts.infos.items()}
            row["context"] = first + context
            row["log_ratio"] = float(rollouts.obs["budget"][index, 0, 0])
            row["reward"] = float(rollouts.rewards[index])
            rows[context] = row
    return [rows[context] for context in sorted(rows)]
