"""From configuration to RLlib: the algorithm that trains, and the one that only evaluates."""

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.rllib.core import DEFAULT_MODULE_ID

from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from policies.controller import Controller
from policies.grpo.algorithm import GRPO, GRPOConfig
from policies.grpo.lagrangian import LagrangianSettings
from ray_ctrl.config import Config
from ray_ctrl.setting import Setting

ENVIRONMENT = "ray_ctrl_adaptive_vqa"
EVALUATION_ENVS = 256


def build_algorithm(setting: Setting, envs: int, contexts: int) -> GRPO:
    """The training algorithm, with its evaluation runners on the validation samples.

    Args:
        envs: environments of each runner's vector.
        contexts: how many contexts an evaluation holds; its vectors are no wider than that.
    """
    config = setting.config
    settings = _common(setting, "validation", contexts)
    grpo, runners = config.grpo, config.runners
    settings.env_runners(
        num_env_runners=runners.count,
        num_envs_per_env_runner=envs,
        num_cpus_per_env_runner=_whole(runners.cpus),
        num_gpus_per_env_runner=runners.gpus,
        sample_timeout_s=runners.sample_timeout_s,
    )
    settings.learners(
        num_learners=runners.learners,
        num_cpus_per_learner=_whole(runners.learner_cpus),
        num_gpus_per_learner=runners.learner_gpus,
    )
    settings.training(
        group_size=grpo.group_size,
        groups_per_iteration=grpo.groups,
        divide_by_spread=grpo.divide_by_spread,
        drop_equal_groups=grpo.drop_equal_groups,
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        kl_coeff=grpo.kl_weight,
        reference_interval=grpo.reference_every,
        entropy_coeff=grpo.entropy_weight,
        entropy_rounds=config.run.iterations if grpo.entropy_decay else 0,
        max_staleness=grpo.max_staleness,
        ratio_max=grpo.ratio_max,
        lagrangian=lagrangian_settings(config) if config.reward.mode == "lagrangian" else None,
        average=grpo.average,
        lr=grpo.lr,
        num_epochs=grpo.epochs,
        minibatch_size=grpo.minibatch,
        grad_clip=grpo.max_grad_norm,
    )
    return settings.build_algo()


def build_evaluator(setting: Setting, controller: Controller, contexts: int) -> GRPO:
    """An algorithm that holds `controller` and is only evaluated: its own training runner is a vector of one group."""
    size = setting.config.grpo.group_size
    settings = _common(setting, "test", contexts)
    settings.env_runners(num_env_runners=0, num_envs_per_env_runner=size)
    settings.training(group_size=size, groups_per_iteration=1, hidden=controller.hidden)
    algorithm = settings.build_algo()
    state = controller.state_dict()

    def load(learner: Any) -> None:
        learner.module[DEFAULT_MODULE_ID].unwrapped().controller.load_state_dict(state)

    algorithm.learner_group.foreach_learner(load)
    return algorithm


def lagrangian_settings(config: Config) -> LagrangianSettings:
    """How penalty multipliers move."""
    reward = config.reward
    return LagrangianSettings(
        bins=config.budgets.price_bins,
        max_violation_rate=reward.max_violation_rate,
        lr=reward.penalty_lr,
        init=min(reward.penalty_init, reward.penalty_max),
        maximum=reward.penalty_max,
        smoothing=reward.penalty_smoothing,
    )


def _common(setting: Setting, split: str, contexts: int) -> GRPOConfig:
    """What training and mere evaluation share: environment, evaluation runners, seed, failures."""
    tune.register_env(ENVIRONMENT, make_environment)
    config = setting.config
    runners = config.runners
    settings = GRPOConfig()
    settings.environment(
        ENVIRONMENT,
        env_config={"world": setting.world("train"), "group_size": config.grpo.group_size, "seed": config.run.seed},
    )
    settings.training(
        hidden=config.controller.hidden,
        runner_threads=config.model.threads,
        restart_timeout_s=runners.restart_timeout_s,
        learner_timeout_s=runners.learner_timeout_s,
    )
    settings.evaluation(
        evaluation_interval=None,
        evaluation_num_env_runners=runners.evaluation,
        evaluation_sample_timeout_s=runners.sample_timeout_s,
        evaluation_config={
            "env_config": {"world": setting.world(split), "group_size": 1, "seed": config.run.seed},
            "num_envs_per_env_runner": min(EVALUATION_ENVS, max(2, contexts)),
            "num_cpus_per_env_runner": _whole(runners.cpus),
            "num_gpus_per_env_runner": runners.gpus,
        },
    )
    settings.debugging(seed=config.run.seed, log_level="ERROR")
    settings.fault_tolerance(restart_failed_env_runners=True)
    return settings


def make_environment(env_config: Mapping[str, Any]) -> AdaptiveVQAVectorEnv:
    """RLlib's entry point: the environment's own settings plus `num_envs`."""
    return AdaptiveVQAVectorEnv(dict(env_config))


def _whole(cpus: float) -> float | int:
    """Ray asks for whole numbers above one."""
    return int(cpus) if cpus == int(cpus) else cpus
