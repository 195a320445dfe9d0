"""A vector environment with the spaces, infos and calls of the real one, and an answer that is known.

Each sample needs a tier that its language feature shows; latency is the sum of what the knobs cost; so the best policy
takes the sample's tier where the budget allows it and cheap knobs elsewhere.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from envs.errors import UserError
from envs.knobs import HEAD_SIZES, PAIRS, KnobSpace

ENVIRONMENT = "grpo-toy"

WIDTH = 12
SAMPLES = 30
REFERENCE_MS = 100.0
EDGES = (-1.0, -0.5)
NEVER = -1


def spaces() -> tuple[gym.spaces.Dict, gym.spaces.MultiDiscrete]:
    widths = {"stage": 1, "budget": 1, "language_feature": WIDTH, "latency_token": WIDTH}
    widths |= {"insertion": 1, "action_mask": PAIRS}
    boxes = {key: gym.spaces.Box(-np.inf, np.inf, (width,), np.float32) for key, width in widths.items()}
    return gym.spaces.Dict(boxes), gym.spaces.MultiDiscrete(HEAD_SIZES)


def latency_ms(tier: int, insertion: int, top_k: int, blocks: int) -> float:
    """All on: 100 ms. All off: 34 ms."""
    return 10.0 + 20.0 * tier + 2.0 * insertion + 4.0 * top_k + 3.5 * (blocks - 12)


def penalty(latency: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """Smooth step at the budget, growing beyond it."""
    overrun = (latency - budget) / budget
    return 1.0 / (1.0 + np.exp(-np.clip(overrun * 20, -50, 50))) + np.minimum(np.maximum(overrun, 0.0), 2.0) * 0.5


class ToyVectorEnv(gym.vector.VectorEnv):
    """Settings: num_envs, group_size, seed, samples, and for the tests of failures `die_once` (a file), `fail`,
    `stall`.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = dict(settings)
        self.num_envs = int(settings["num_envs"])
        self.group_size = int(settings.get("group_size", 8))
        self.seed = int(settings.get("seed", 0))
        self.single_observation_space, self.single_action_space = spaces()
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        if not isinstance(settings.get("samples", SAMPLES), int):
            raise UserError(f"samples must be a number, not {settings['samples']!r}")
        self._break_start()
        table = np.random.default_rng(7)
        self.features = table.normal(size=(int(settings.get("samples", SAMPLES)), WIDTH)).astype(np.float32)
        self.needed = np.digitize(self.features[:, 0], (-0.4, 0.4))
        self.worker, self.workers, self.round = 0, 1, 0
        self.contexts: list[tuple[int, float]] | None = None
        self.multipliers: np.ndarray | None = None
        self.stage = 0

    def set_worker(self, index: int, count: int) -> None:
        self.worker, self.workers = index, count

    def set_iteration(self, number: int) -> None:
        self.round = number

    def set_contexts(self, contexts: list[tuple[int, float]]) -> None:
        for sample, budget in contexts:
            if not 0 <= sample < len(self.features) or not budget > 0:
                raise UserError(f"context ({sample}, {budget}) is not allowed: give a sample and a budget above 0")
        self.contexts = list(contexts)

    def held_out_contexts(self) -> list[tuple[int, float]]:
        return [] if self.settings.get("no_contexts") else [(sample, 55.0) for sample in range(len(self.features))]

    def set_multipliers(self, values: Any) -> None:
        self.multipliers = None if values is None else np.asarray(values, float)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._break()
        if self.contexts is not None:
            index = np.arange(self.num_envs) % len(self.contexts)
            self.context = index
            self.sample = np.array([self.contexts[i][0] for i in index])
            self.budget = np.array([self.contexts[i][1] for i in index], float)
        else:
            groups = self.num_envs // self.group_size
            ids = self.worker * groups + np.arange(groups)
            draws = [np.random.default_rng([self.seed, self.round, int(group)]) for group in ids]
            per_group = [(d.integers(len(self.features)), np.exp(d.uniform(np.log(20), np.log(130)))) for d in draws]
            self.context = np.repeat(self.round * 100_000 + ids, self.group_size)
            self.sample = np.repeat([sample for sample, _ in per_group], self.group_size)
            self.budget = np.repeat([budget for _, budget in per_group], self.group_size)
        self.round += 1
        self.stage = 0
        self.ended = np.zeros(self.num_envs, bool)
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[Any, ...]:
        actions = np.asarray(actions)
        zeros, no = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        if self.stage == 0:
            self.tier, self.insertion = actions[:, 0], actions[:, 1] + 1
            self.stage = 1
            return self._observe(), zeros, no, no.copy(), {}
        top_k, blocks = actions[:, 2] + 4, actions[:, 3] + 12
        knobs = list(zip(self.tier, self.insertion, top_k, blocks, strict=True))
        latency = np.array([latency_ms(*knob) for knob in knobs])
        accuracy = np.where(self.tier >= self.needed[self.sample], 1.0, 0.3) - 0.02 * (16 - blocks) - 0.01 * (8 - top_k)
        bins = np.digitize(np.log(self.budget / REFERENCE_MS), EDGES)
        multiplier = np.ones(self.num_envs) if self.multipliers is None else self.multipliers[bins]
        reward = accuracy - multiplier * penalty(latency, self.budget)
        infos = {
            "accuracy": accuracy, "latency_ms": latency, "budget_ms": self.budget,
            "context": self.context.astype(np.int64),
            "sample": self.sample, "tier": self.tier, "insertion": self.insertion, "top_k": top_k, "blocks": blocks,
            "budget_bin": bins, "multiplier": multiplier, "avoidable": self.budget >= latency_ms(0, 1, 4, 12),
        }  # fmt: skip
        if self.settings.get("partial"):
            infos["context"] = infos["context"].copy()
            infos["context"][-1] = 1_000_000_000
        observation = self._observe()
        self.stage = 0
        return observation, reward, ~no, no, infos

    def _observe(self) -> dict[str, np.ndarray]:
        features = self.features[self.sample]
        second = self.stage == 1
        insertion = self.insertion if second else np.zeros(self.num_envs)
        masks = [KnobSpace.stage2_mask(int(p)) if second else KnobSpace.stage1_mask() for p in insertion]
        observation = {
            "stage": np.full((self.num_envs, 1), float(second)),
            "budget": np.log(self.budget / REFERENCE_MS)[:, None],
            "language_feature": features * (not second),
            "latency_token": features * second,
            "insertion": np.asarray(insertion)[:, None],
            "action_mask": np.stack(masks),
        }
        return {key: value.astype(np.float32) for key, value in observation.items()}

    def _break_start(self) -> None:
        """Fail to start if the test asks for it: always, or only after `once` was written."""
        kind, once = self.settings.get("break_start"), self.settings.get("once")
        if kind is None or (once and not Path(once).exists()):
            return
        if kind == "die":
            os._exit(1)
        if kind == "no_memory":
            import torch

            tries = Path(f"{once}-tries")
            tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
            if len(tries.read_text()) < 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return
        raise ValueError("a bug at the start")

    def _break(self) -> None:
        """Die, fail or hang if the test asks for it; `once` names a file that marks it as done."""
        kind, once = self.settings.get("break"), self.settings.get("once")
        if kind is None or self.round != self.settings.get("break_round", 1) or self.worker != 0:
            return
        if once:
            try:
                Path(once).touch(exist_ok=False)
            except FileExistsError:
                return
        if kind == "die":
            os._exit(1)
        if kind == "stall":
            time.sleep(600)
        if kind == "user_error":
            raise UserError("image scene-3 is truncated: replace it")
        raise ValueError("a bug in the environment")


def start_ray() -> None:
    """A small local Ray of our own, and the environment made known to it."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    import torch
    from ray.tune import register_env

    torch.set_num_threads(1)
    # Runners cannot import a module that lies among the tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[ToyVectorEnv.__module__])
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80_000_000,
        configure_logging=False,
    )
    register_env(ENVIRONMENT, ToyVectorEnv)


def share_ray() -> None:
    """One Ray for the tests of a module; `conftest` lets go of it when they end."""
    import ray

    if not ray.is_initialized():
        start_ray()


def configuration(runners: int = 0, *, broken: dict[str, Any] | None = None, **training: Any) -> Any:
    """Two shards of 16 environments in groups of 4."""
    from policies.grpo.algorithm import GRPOConfig

    settings = {"group_size": 4, "groups_per_iteration": 8, "num_epochs": 2, "minibatch_size": 32, "hidden": 32}
    settings |= {"lr": 5e-4, "entropy_coef": 0.01, "ema_decay": 0.0}
    return (
        GRPOConfig()
        .environment(ENVIRONMENT, env_config={"seed": 1, **(broken or {})})
        .env_runners(num_env_runners=runners, num_envs_per_env_runner=16, sample_timeout_s=60)
        .training(**(settings | training))
        .debugging(seed=1)
    )


def resumable(runners: int) -> Any:
    """Everything a checkpoint must hold: optimizer, a reference and multipliers that move, an average of weights."""
    from envs.config import RewardSettings

    return configuration(
        runners,
        kl_coef=0.1,
        reference_interval=2,
        lagrangian=RewardSettings(mode="lagrangian", penalty_lr=0.1),
        penalty_bins=len(EDGES) + 1,
        ema_decay=0.9,
    )


def two_more(algorithm: Any) -> dict[str, Any]:
    """The numbers of two more iterations, and the controller that they end with."""
    from policies.grpo.checkpoint import state_checksum

    rows = [numbers(algorithm.train()) for _ in range(2)]
    return {"numbers": rows, "controller": state_checksum(algorithm.controller().state_dict())}


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """An iteration's numbers without wall times and what depends on who died."""
    return {
        key: value for key, value in result["grpo"].items() if not key.startswith("seconds_") and key != "shards_rerun"
    }


def main() -> None:
    """`grpo_toy.py FOLDER RUNNERS...`: restore FOLDER/RUNNERS and print the numbers of two more iterations each."""
    start_ray()
    from policies.grpo.checkpoint import restore_checkpoint

    rows = {}
    for runners in sys.argv[2:]:
        algorithm = resumable(int(runners)).build_algo()
        restore_checkpoint(algorithm, Path(sys.argv[1]) / runners)
        rows[runners] = two_more(algorithm)
        algorithm.stop()
    print("RESULT", json.dumps(rows))


if __name__ == "__main__":
    main()
