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

from policies.baselines import Baseline
from policies.grpo.rl_module import BaselineModule

Array = npt.NDArray[Any]


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
            weights: the module's state, or a reference to it in the object store.
        """
        state = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
        self.module.set_state(state)

    def sample_chunk(self, *, round_number: int, chunk: int, chunks: int, attempt: int, weights: Any) -> Rollouts:
        """Roll out one chunk of a training round under the given weights."""
        self.load_weights(weights)
        environment = self.env.unwrapped
        environment.set_worker(chunk, chunks)
        environment.set_round(round_number)
        torch.manual_seed(_seed(self.config.seed, round_number, chunk, attempt))
        rollouts = _pack(self.sample(explore=True), self.get_metrics())
        stats = environment.stats() if hasattr(environment, "stats") else {}
        return replace(rollouts, runner=int(self.worker_index or 0), stats=stats)

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
        trained = self.module
        try:
            if baseline is None:
                self.load_weights(weights)
            else:
                self.module = BaselineModule(baseline, (first,), trained)
            rollouts = _pack(self.sample(explore=False), self.get_metrics(), with_logits=False)
        finally:
            self.module = trained
        return _rows(rollouts, first, len(contexts))


def _seed(*parts: int | None) -> int:
    """A well mixed 63-bit seed from integers."""
    entropy = [int(part or 0) for part in parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _pack(episodes: Sequence[Any], metrics: Any, *, with_logits: bool = True) -> Rollouts:
    """RLlib's episodes as arrays; numeric scalars of the final infos are kept.

    Raises:
        RuntimeError: episodes that have not ended, or not after the same number of steps.
    """
    steps = {len(episode) for episode in episodes}
    if len(steps) != 1 or not all(episode.is_terminated for episode in episodes):
        raise RuntimeError(f"episodes of {sorted(steps)} steps: every rollout must end after the same number of steps")
    window = slice(0, steps.pop())
    observations = [episode.get_observations(window) for episode in episodes]
    finals = [episode.get_infos(-1) for episode in episodes]
    keys = [key for key, value in finals[0].items() if np.isscalar(value) or np.ndim(value) == 0]
    keys = [key for key in keys if np.issubdtype(np.asarray(finals[0][key]).dtype, np.number)]

    def outputs(column: str, width: tuple[int, ...]) -> Array:
        if not with_logits:
            return np.zeros((len(episodes), window.stop, *width), np.float32)
        return np.stack([episode.get_extra_model_outputs(column) for episode in episodes])

    return Rollouts(
        obs={key: np.stack([obs[key] for obs in observations]) for key in observations[0]},
        actions=np.stack([episode.get_actions() for episode in episodes]),
        log_probs=outputs(Columns.ACTION_LOGP, ()),
        logits=outputs(Columns.ACTION_DIST_INPUTS, (0,)),
        rewards=np.array([episode.get_return() for episode in episodes], np.float64),
        infos={key: np.array([final[key] for final in finals]) for key in keys},
        metrics=metrics,
    )


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
