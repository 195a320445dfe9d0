"""From configuration to RLlib: the algorithm that trains, and the one that only evaluates."""

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.rllib.core import DEFAULT_MODULE_ID

from cluster.connect import worker_device
from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from envs.env_resources import EnvConfig
from policies.controller import Controller
from policies.grpo.algorithm import GRPO, GRPOConfig
from policies.grpo.config import TimeoutSettings
from ray_ctrl.run_context import RunContext

ENVIRONMENT = "ray_ctrl_adaptive_vqa"
EVALUATION_ENVS = 256


def build_algorithm(context: RunContext, envs: int, contexts: int) -> GRPO:
    """The training algorithm, with its evaluation runners on the validation samples.

    Args:
        envs: environments of each runner's vector.
        contexts: contexts of an evaluation; its vectors are no wider than that.
    """
    config = context.config
    settings = _common(context, "validation", contexts)
    runners = config.runners
    settings.env_runners(
        num_env_runners=runners.count,
        num_envs_per_env_runner=envs,
        num_cpus_per_env_runner=_ray_cpus(runners.cpus),
        num_gpus_per_env_runner=runners.gpus,
    )
    settings.learners(
        num_learners=runners.learners,
        num_cpus_per_learner=_ray_cpus(runners.learner_cpus),
        num_gpus_per_learner=runners.learner_gpus,
    )
    settings.training(
        lagrangian=config.reward if config.reward.mode == "lagrangian" else None,
        penalty_bins=config.budgets.penalty_bins,
        total_iterations=config.run.iterations,
    )
    return settings.build_algo()


def build_evaluator(context: RunContext, controller: Controller, contexts: int) -> GRPO:
    """An algorithm with the weights of `controller`, only to be evaluated: it trains on one group."""
    size = context.config.grpo.group_size
    settings = _common(context, "test", contexts)
    settings.env_runners(num_env_runners=0, num_envs_per_env_runner=size)
    settings.training(
        groups_per_iteration=1, hidden=controller.hidden, without=tuple(controller.without), max_policy_lag=0
    )
    algorithm = settings.build_algo()
    state = controller.state_dict()

    def load(learner: Any) -> None:
        learner.module[DEFAULT_MODULE_ID].unwrapped().controller.load_state_dict(state)

    algorithm.learner_group.foreach_learner(load)
    return algorithm


def _common(context: RunContext, split: str, contexts: int) -> GRPOConfig:
    """What training and evaluation share: environment, evaluation runners, seed, failures."""
    tune.register_env(ENVIRONMENT, make_environment)
    config = context.config
    runners = config.runners
    settings = GRPOConfig()
    settings.environment(ENVIRONMENT, env_config={"resources": context.env_config("train"), "seed": config.run.seed})
    timeouts = TimeoutSettings(**{name: getattr(runners, name) for name in TimeoutSettings.model_fields})
    settings.sections(grpo=config.grpo, controller=config.controller, timeouts=timeouts)
    settings.training(runner_threads=config.model.threads)
    settings.evaluation(
        evaluation_interval=None,
        evaluation_num_env_runners=runners.eval_runners,
        evaluation_sample_timeout_s=runners.sample_timeout_s,
        evaluation_config={
            "env_config": {"resources": context.env_config(split), "seed": config.run.seed},
            "num_envs_per_env_runner": min(EVALUATION_ENVS, max(2, contexts)),
            "num_cpus_per_env_runner": _ray_cpus(runners.cpus),
            "num_gpus_per_env_runner": runners.gpus,
        },
    )
    settings.debugging(seed=config.run.seed, log_level="ERROR")
    settings.fault_tolerance(restart_failed_env_runners=True)
    return settings


def make_environment(env_config: Mapping[str, Any]) -> AdaptiveVQAVectorEnv:
    """RLlib's entry point: the environment's own settings plus `num_envs`, on the device that Ray gave this process."""
    settings, device = dict(env_config), worker_device()
    described = settings["resources"]
    if device is not None and isinstance(described, EnvConfig) and described.model.device in ("auto", "cuda"):
        model = described.model.model_copy(update={"device": device})
        settings["resources"] = described.model_copy(update={"model": model})
    return AdaptiveVQAVectorEnv(settings)


def _ray_cpus(cpus: float) -> float | int:
    """Ray requires an int above one."""
    return int(cpus) if cpus == int(cpus) else cpus
