"""RLlib's PPO on the environment of a run: trains the same networks, and exports what `ray-ctrl compare` takes.

    python benchmarks/ppo.py RUN OUT --iterations 80 --seed 0
    ray-ctrl compare GRPO=RUN PPO=OUT

Model, samples, latencies, budgets, guardrail, reward and rollouts of an iteration are the run's.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from policies.controller import Controller
from policies.grpo.rl_module import ControllerWithValue
from ray_ctrl.run_context import RunContext, open_context
from ray_ctrl.run_folder import RunFolder
from ray_ctrl.trainer import validation_contexts

SETTINGS = ("config.yaml", "run.json", "inputs.json", "profile.json", "budgets.json", "guardrail-profiled.json")


class Counted(AdaptiveVQAVectorEnv):
    """The environment, which remembers the executions that its rollouts needed."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.executions: set[tuple[int, int]] = set()

    def step(self, actions: Any) -> Any:
        found = super().step(actions)
        if "execution" in found[-1]:
            self.executions.update(zip(found[-1]["sample"].tolist(), found[-1]["execution"].tolist(), strict=True))
        return found


def validated(context: RunContext, controller: Controller) -> dict[str, float]:
    """Accuracy and violations by argmax on validation samples under training budgets."""
    import torch

    resources = context.build("validation")
    contexts = validation_contexts(len(resources.samples), context.budgets)
    env = AdaptiveVQAVectorEnv({"resources": resources, "num_envs": len(contexts), "contexts": contexts})
    observation, _ = env.reset()
    infos: dict[str, Any] = {}
    for _ in range(2):
        acted = controller.act({name: torch.from_numpy(rows) for name, rows in observation.items()}).numpy()
        observation, _, _, _, infos = env.step(acted)
    violations = np.mean(infos["latency_ms"] > infos["budget_ms"])
    return {"validation/accuracy": float(infos["accuracy"].mean()), "validation/violations": float(violations)}


def build(context: RunContext, seed: int) -> Any:
    """The algorithm, with the run's sizes where PPO has the same ones."""
    config = context.config
    rollouts = config.grpo.group_size * config.grpo.groups_per_iteration
    tune.register_env("counted", Counted)
    module = RLModuleSpec(module_class=ControllerWithValue, model_config=config.controller.model_dump())
    return (
        PPOConfig()
        .environment("counted", env_config={"resources": context.env_config("train"), "group_size": 1, "seed": seed})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=rollouts, batch_mode="complete_episodes")
        .env_runners(gym_env_vectorize_mode="vector_entry_point")
        .rl_module(rl_module_spec=module)
        .training(train_batch_size_per_learner=2 * rollouts, minibatch_size=config.grpo.minibatch_size or 2 * rollouts)
        .training(lr=config.grpo.lr, gamma=1.0, num_epochs=config.grpo.epochs, entropy_coeff=0.01)
        .debugging(seed=seed, log_level="ERROR")
        .build_algo()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--every", type=int, default=8, help="iterations between validations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    home = RunFolder.open(args.run).root
    args.out.mkdir(parents=True)
    for name in SETTINGS:
        if (home / name).is_file():
            shutil.copy(home / name, args.out / name)
    folder = RunFolder.open(args.out)
    context = open_context(folder.config).with_profile(args.out)
    ray.init(num_cpus=1, include_dashboard=False)
    algorithm = build(context, args.seed)
    for iteration in range(1, args.iterations + 1):
        algorithm.train()
        if iteration % args.every and iteration != args.iterations:
            continue
        controller = algorithm.get_module().controller.eval()
        row = {"iteration": iteration, "model_executions": len(algorithm.env_runner.env.unwrapped.executions)}
        row |= validated(context, controller)
        folder.append_metrics(row)
        controller.save(folder.controller, context.metadata(), overwrite=True)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
