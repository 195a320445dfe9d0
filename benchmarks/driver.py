"""What the driver of a training run costs, and what binds with many runners.

    python benchmarks/driver.py [--width 2048] [--rollouts 128] [--epochs 4] [--quick]

First: CPU time of the driver's thread per rollout, 1,024 rollouts an iteration, with two runners and a learner in
processes of their own and environments that cost nothing. Then a model of that time, `fixed + a * shards +
b * rollouts`, fitted to small cases and compared with a simulation of 64 and of 1,000 runners, for all of which one
process answers. Last: from the model and the learner's speed, how short a shard must be for runners to wait.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from gymnasium.vector import AutoresetMode
from ray.tune import register_env

from envs.adaptive_vqa import observation_space
from envs.knobs import HEAD_SIZES, KnobSpace
from policies.grpo.algorithm import GRPO, GRPOConfig
from policies.grpo.env_runner import Rollouts
from policies.grpo.sampling import Dispatcher, Sampler

GROUP = 8
ENVIRONMENT = "free"
# Too large for any cache, as what is predicted from them is.
SMALL = ((16, 128), (128, 16), (32, 128), (256, 16), (512, 8))


class FreeEnv(gym.vector.VectorEnv):
    """Two steps of the real shapes, and next to no work. Settings: num_envs, width."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.num_envs, width = int(settings["num_envs"]), int(settings["width"])
        self.single_observation_space = observation_space(width)
        self.single_action_space = gym.spaces.MultiDiscrete(HEAD_SIZES)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        draw = np.random.default_rng(0)
        self.features = draw.normal(size=(2, self.num_envs, width)).astype(np.float32)
        self.budgets = draw.uniform(20.0, 80.0, self.num_envs)
        self.masks = [KnobSpace.stage1_mask(), *(KnobSpace.stage2_mask(p) for p in range(1, 6))]
        self.worker, self.round, self.step_number = 0, 0, 0

    def set_worker(self, index: int, count: int) -> None:
        self.worker = index

    def set_iteration(self, number: int) -> None:
        self.round = number

    def set_multipliers(self, values: object) -> None:
        pass  # rewards are constant

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.step_number, self.insertion = 0, np.zeros(self.num_envs, int)
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[Any, ...]:
        self.step_number += 1
        rewards, running = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        if self.step_number == 1:
            self.insertion = np.asarray(actions)[:, 1] + 1
            return self._observe(), rewards, running, running.copy(), {}
        groups = self.num_envs // GROUP
        latency = self.budgets * np.random.default_rng(self.round).uniform(0.5, 1.5, self.num_envs)
        infos = {key: np.asarray(actions)[:, i] for i, key in enumerate(("tier", "insertion", "top_k", "blocks"))}
        infos |= {"accuracy": (latency > self.budgets).astype(float), "latency_ms": latency, "budget_ms": self.budgets}
        infos["context"] = np.repeat((self.round * 10_000 + self.worker) * groups + np.arange(groups), GROUP)
        return self._observe(), infos["accuracy"] - 0.5, ~running, running, infos

    def _observe(self) -> dict[str, np.ndarray]:
        second = self.step_number == 1
        blank = np.zeros_like(self.features[0])
        return {
            "stage": np.full((self.num_envs, 1), second, np.float32),
            "budget": np.log(self.budgets / 50.0)[:, None].astype(np.float32),
            "language_feature": blank if second else self.features[0],
            "latency_token": self.features[1] if second else blank,
            "insertion": self.insertion[:, None].astype(np.float32),
            "action_mask": np.stack([self.masks[p] for p in self.insertion]).astype(np.float32),
        }


def configuration(args: argparse.Namespace, runners: int, learners: int, envs: int, rollouts: int) -> GRPOConfig:
    """GRPO over the free environment."""
    return (
        GRPOConfig()
        .environment(ENVIRONMENT, env_config={"width": args.width})
        .env_runners(num_env_runners=runners, num_envs_per_env_runner=envs, num_cpus_per_env_runner=0.5)
        .learners(num_learners=learners, num_cpus_per_learner=0.5)
        .training(group_size=GROUP, groups_per_iteration=rollouts // GROUP, epochs=args.epochs, minibatch_size=512)
        .debugging(seed=0, log_level="ERROR")
    )


def work_of_an_iteration(args: argparse.Namespace) -> float:
    """CPU ms of the driver's thread per rollout, at 1,024 rollouts an iteration."""
    algorithm = configuration(args, runners=2, learners=1, envs=512, rollouts=1024).build_algo()
    algorithm.train()
    spent, walls = [], []
    for _ in range(3 if args.quick else 10):
        cpu, wall = time.thread_time(), time.perf_counter()
        algorithm.train()
        spent.append((time.thread_time() - cpu) / 1024 * 1e3)
        walls.append(time.perf_counter() - wall)
    algorithm.stop()
    print(
        f"1,024 rollouts an iteration, d_model {args.width}, {args.epochs} epochs: driver's thread "
        f"{np.median(spent):.3f} ms a rollout (median of {len(spent)}; {min(spent):.3f} to {max(spent):.3f}), "
        f"iteration {np.median(walls):.2f} s"
    )
    return float(np.median(spent))


# -- stand-in runners -------------------------------------------------------------------------------------


@ray.remote(num_cpus=0, max_concurrency=4096)
class Everyone:
    """Answers for all runners: each shard after `seconds`, with rollouts of the real size."""

    def __init__(self, template: Rollouts, seconds: float) -> None:
        self.template, self.seconds = template, seconds

    async def shard(self, shard: int, runner: int) -> Rollouts:
        await asyncio.sleep(self.seconds)
        infos = {key: value.copy() for key, value in self.template.infos.items()}
        infos["context"] = infos["context"] % 1_000_000 + shard * 1_000_000
        return replace(self.template, infos=infos, runner=runner)


class StandIns:
    """What the dispatcher needs of a pool of env runners, for runners that do not exist."""

    local = None
    restarts = False

    def __init__(self, template: Rollouts, runners: int, seconds: float) -> None:
        self.everyone = Everyone.remote(template, seconds)
        self.numbers = list(range(1, runners + 1))

    def all(self) -> list[int]:
        return self.numbers

    healthy = all

    def call(self, runner: int, function: Any, *, method: str, job: Mapping[str, Any]) -> Any:
        return self.everyone.shard.remote(job["shard"], runner)


def template(algorithm: GRPO, rollouts: int) -> Rollouts:
    """A shard of the local runner, cut to `rollouts`, with metrics as a runner sends them."""
    job = {"iteration": 0, "shard": 0, "shards": 1, "weights": algorithm.weights()}
    shard = algorithm.env_runner_group.local_env_runner.sample_shard(**job)
    return replace(shard.take(np.arange(rollouts)), metrics=shard.metrics)


def simulated(algorithm: GRPO, args: argparse.Namespace, runners: int, rollouts: int) -> float:
    """CPU s of the driver's thread in an iteration over `runners` shards of `rollouts`, the learner's work left out."""
    pool = StandIns(template(algorithm, rollouts), runners, seconds=args.seconds)
    dispatcher = Dispatcher(pool, "sample_shard", timeout_s=600.0, restart_timeout_s=60.0)
    algorithm.sampler = Sampler(dispatcher, shards=runners, group_size=GROUP, max_policy_lag=0)
    spent = []
    for _ in range(3):
        cpu = time.thread_time()
        algorithm.training_step()
        spent.append(time.thread_time() - cpu)
    ray.kill(pool.everyone)
    return float(np.median(spent))


def fitted(cases: Sequence[tuple[int, int]], seconds: Sequence[float]) -> np.ndarray:
    """Coefficients (fixed, a, b) of s = fixed + a * shards + b * rollouts; relative errors weigh the same."""
    rows = np.array([(1.0, runners, runners * rollouts) for runners, rollouts in cases])
    scale = 1.0 / np.asarray(seconds)
    return np.linalg.lstsq(rows * scale[:, None], np.ones(len(seconds)), rcond=None)[0]


def predicted(model: np.ndarray, runners: int, rollouts: int) -> float:
    return float(model @ (1.0, runners, runners * rollouts))


def learner_seconds(algorithm: GRPO) -> float:
    """CPU s of the learner's thread per rollout, all epochs."""
    update, spent = algorithm.learner_group.update, []

    def timed(**given: Any) -> Any:
        cpu = time.thread_time()
        result = update(**given)
        spent.append(time.thread_time() - cpu)
        return result

    algorithm.learner_group.update = timed
    algorithm.train()
    spent.clear()
    algorithm.train()
    algorithm.learner_group.update = lambda **_: []
    return sum(spent) / (algorithm.config.groups_per_iteration * GROUP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="d_model of the observations")
    parser.add_argument("--rollouts", type=int, default=128, help="of each runner and iteration")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a stand-in's shard")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and no simulation of 1,000 runners")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    torch.set_num_threads(1)
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 1024**3,
        logging_level="ERROR",
    )  # fmt: skip
    register_env(ENVIRONMENT, FreeEnv)
    work_of_an_iteration(args)

    algorithm = configuration(args, runners=0, learners=0, envs=256, rollouts=1024).build_algo()
    learner = learner_seconds(algorithm)
    measured = [simulated(algorithm, args, *case) for case in SMALL]
    model = fitted(SMALL, measured)
    print(
        f"driver: {model[0] * 1e3:.1f} ms an iteration + {model[1] * 1e3:.2f} ms a shard + "
        f"{model[2] * 1e3:.4f} ms a rollout"
    )
    print(f"learner on one CPU thread: {learner * 1e3:.3f} ms a rollout")
    print(f"{'runners':>8}{'rollouts':>10}{'predicted s':>13}{'measured s':>12}")
    checks = [(64, args.rollouts)] + ([] if args.quick else [(1000, 16)])
    for case, seconds in [*zip(SMALL, measured, strict=True), *((c, simulated(algorithm, args, *c)) for c in checks)]:
        print(f"{case[0]:>8}{case[0] * case[1]:>10}{predicted(model, *case):>13.3f}{seconds:>12.3f}")
    size = sum(value[0].nbytes for value in template(algorithm, GROUP).obs.values())
    print(
        f"\n{'GPUs':>6}{'rollouts':>10}{'GB to driver':>14}{'driver s':>10}{'learner s':>11}  "
        "runners wait if a shard takes less than"
    )
    for runners in (64, 1000):
        driver, learning = predicted(model, runners, args.rollouts), learner * runners * args.rollouts
        total = runners * args.rollouts
        print(
            f"{runners:>6}{total:>10}{total * size / 1e9:>14.2f}{driver:>10.2f}{learning:>11.1f}  "
            f"{driver + learning:.1f} s (learner on one CPU thread), {driver:.1f} s (its time brought to nothing)"
        )
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
