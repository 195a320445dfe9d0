"""The settings of GRPO, each with its one default and range. Pure pydantic: reading a configuration needs no Ray."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

from pydantic import Field

from envs.section import Flag, Int, Section

OLD_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "average": "ema_decay",
        "ratio_max": "dual_clip",
        "divide_by_spread": "normalize_by_std",
        "drop_equal_groups": "skip_uniform_groups",
        "groups": "groups_per_iteration",
        "kl_weight": "kl_coef",
        "kl_coeff": "kl_coef",
        "reference_every": "reference_interval",
        "entropy_weight": "entropy_coef",
        "entropy_coeff": "entropy_coef",
        "entropy_decay": "anneal_entropy",
        "minibatch": "minibatch_size",
        "max_staleness": "max_policy_lag",
    }
)
"""Keys of earlier versions, each an error that names the new one."""
VALIDATED_MODULE: Final = "validated_module"
"""Folder of a checkpoint from which `RLModule.from_checkpoint` gives the controller that was validated."""


class GRPOSettings(Section):
    """The learning algorithm."""

    group_size: Int = Field(
        default=8,
        ge=2,
        le=1024,
        description="Rollouts that share one sample and budget and are compared with each other.",
    )
    groups_per_iteration: Int = Field(
        default=384, ge=1, le=65536, description="Groups sampled before each update, over all runners."
    )
    lr: float = Field(default=1e-3, gt=0, le=1, description="Adam step size.")
    epochs: Int = Field(default=4, ge=1, le=100, description="Passes over an iteration's rollouts.")
    minibatch_size: Int | None = Field(
        default=1024,
        ge=1,
        description="Decisions (two per rollout) in a minibatch over all learners; `null` takes the entire iteration.",
    )
    advantages: Literal["sampled", "known"] = Field(
        default="sampled",
        description="`sampled`: from a group's rollouts alone; `known`: groups are completed with all plans whose "
        "outcomes are in the store, weighted by their probability, which is the exact gradient once all are.",
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="Lower clip bound of the probability ratio, below 1.")
    clip_high: float = Field(default=0.28, gt=0, le=10, description="Upper clip bound of the ratio, above 1.")
    normalize_by_std: Flag = Field(
        default=False, description="Divide a group's advantages by the standard deviation of its returns."
    )
    skip_uniform_groups: Flag = Field(
        default=False, description="Leave groups whose returns are all equal out of the update."
    )
    kl_coef: float = Field(
        default=0.0, ge=0, le=100, description="Weight of KL(policy || reference); 0 keeps no reference policy."
    )
    reference_interval: Int = Field(
        default=0, ge=0, description="Iterations between refreshes of the reference policy; 0 is never."
    )
    entropy_coef: float = Field(default=0.1, ge=0, le=10, description="Weight of the entropy bonus, per nat.")
    anneal_entropy: Flag = Field(
        default=True,
        description="Anneal the entropy bonus linearly to 0 over the iterations of the run; if it is resumed with more "
        "iterations, over those.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=1e6, description="Euclidean norm to which gradients are clipped."
    )
    ema_decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Decay of the moving average of the controller's weights over iterations (at first their plain "
        "mean), which is what is validated and exported; 0 takes the latest weights.",
    )
    max_policy_lag: Int = Field(
        default=0,
        ge=0,
        le=16,
        description="Maximum policy lag in updates. 0 is synchronous; above 0 the env runners sample the next "
        "iterations while the driver learns.",
    )
    dual_clip: float = Field(
        default=3.0,
        gt=1,
        le=1e6,
        description="With `max_policy_lag`, the largest probability ratio that counts. Must exceed 1 + `clip_high`.",
    )


class ControllerSettings(Section):
    """The trained networks."""

    hidden: Int = Field(default=128, ge=8, le=4096, description="Width of the hidden layers of both stages.")
    without: tuple[Literal["question", "token", "position"], ...] = Field(
        default=(),
        description="Parts to leave out, to measure what each is worth: the `question` (stage 1), the latency `token` "
        "(stage 2), the choice of the insertion `position` (then it is 1).",
    )


class TimeoutSettings(Section):
    """How long the driver waits for other processes."""

    sample_timeout_s: float = Field(default=600.0, gt=0, le=86400, description="Wait for one runner's rollouts, s.")
    restart_timeout_s: float = Field(
        default=300.0,
        gt=0,
        le=86400,
        description="Wait for a first runner to come back when all are dead, s. To start, runners have the larger of "
        "this and `sample_timeout_s`.",
    )
    learner_timeout_s: float = Field(
        default=600.0, gt=0, le=86400, description="Wait for learners' answer to an update, s."
    )
