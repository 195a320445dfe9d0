"""What GRPO can be told, and what it refuses before anything starts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from envs.errors import UserError
from policies.grpo.evaluation import evaluate_with_runners
from policies.grpo.lagrangian import LagrangianSettings
from policies.grpo.learner import GRPOLearner
from policies.grpo.rl_module import ControllerModule
from policies.grpo.runner import RolloutRunner

if TYPE_CHECKING:
    from policies.grpo.algorithm import GRPO

OWN_SETTINGS: Final = (
    "group_size",
    "groups_per_iteration",
    "divide_by_spread",
    "drop_equal_groups",
    "clip_low",
    "clip_high",
    "kl_coeff",
    "reference_interval",
    "entropy_coeff",
    "entropy_rounds",
    "max_staleness",
    "ratio_max",
    "lagrangian",
    "average",
    "hidden",
    "runner_threads",
    "restart_timeout_s",
    "learner_timeout_s",
)


class GRPOConfig(AlgorithmConfig):
    """RLlib's configuration plus GRPO's own settings, given to `.training(...)`.

    Attributes:
        group_size: rollouts that share one (sample, budget).
        groups_per_iteration: groups sampled before each update.
        divide_by_spread: advantages over the group's standard deviation. Off by default: it blows up
            groups in which only small change is at stake.
        drop_equal_groups: leave groups of equal returns out of the batch.
        clip_low, clip_high: bounds of the ratio below and above 1.
        kl_coeff: weight of the KL to a frozen reference; 0 keeps no reference.
        reference_interval: rounds between refreshes of the reference; 0 never.
        entropy_coeff: weight of the entropy bonus, per nat.
        entropy_rounds: rounds over which that weight falls to 0, linearly; 0 keeps it.
        max_staleness: updates between the weights that sample a round and those that learn from it; 0 samples and
            learns in turns. Needs remote env runners.
        ratio_max: with staleness, the ratio is cut off there.
        average: weight of the past in the running average of weights that is evaluated and exported, 0 to below 1;
            0 takes the latest weights.
        lagrangian: how penalty multipliers move; None leaves the environment its constant one.
        hidden: width of the controller's MLPs.
        runner_threads: torch threads of each remote env runner.
        restart_timeout_s: longest wait for a first runner to come back when all are dead.
        learner_timeout_s: longest wait for remote learners' answer to an update; then they are killed.
        num_epochs, minibatch_size, lr, grad_clip: RLlib's own; a minibatch counts decisions (two a
            rollout) over all learners.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        from policies.grpo.algorithm import GRPO

        super().__init__(algo_class=algo_class or GRPO)
        self.group_size: int = 8
        self.groups_per_iteration: int = 32
        self.divide_by_spread: bool = False
        self.drop_equal_groups: bool = False
        self.clip_low: float = 0.2
        self.clip_high: float = 0.28
        self.kl_coeff: float = 0.0
        self.reference_interval: int = 0
        self.entropy_coeff: float = 0.01
        self.entropy_rounds: int = 0
        self.max_staleness: int = 0
        self.ratio_max: float = 3.0
        self.lagrangian: LagrangianSettings | None = None
        self.average: float = 0.0
        self.hidden: int = 256
        self.runner_threads: int = 1
        self.restart_timeout_s: float = 300.0
        self.learner_timeout_s: float = 600.0
        self.lr = 5e-4
        self.num_epochs = 4
        self.minibatch_size = 256
        self.grad_clip = 1.0
        self.seed = 0
        self.num_envs_per_env_runner = 64
        self.batch_mode = "complete_episodes"
        self.gym_env_vectorize_mode = "vector_entry_point"
        self.env_runner_cls = RolloutRunner
        self.sample_timeout_s = 600.0
        self.restart_failed_env_runners = True
        self.delay_between_env_runner_restarts_s = 0.0
        # The others wait for so long in each iteration while a lost runner loads its model again.
        self.env_runner_health_probe_timeout_s = 2.0
        # Runners are sent what they need with each chunk; RLlib would wait for all of them after each iteration.
        self.merge_env_runner_states = False
        self.broadcast_env_runner_states = False
        self.custom_evaluation_function = evaluate_with_runners
        self.evaluation_sample_timeout_s = 600.0
        self.evaluation_contexts: tuple[Any, ...] = ()
        self.evaluation_runners: bool = False

    def training(self, **settings: Any) -> "GRPOConfig":
        """RLlib's settings, plus those named in the class."""
        for name in OWN_SETTINGS:
            value = settings.pop(name, NotProvided)
            if value is not NotProvided:
                setattr(self, name, value)
        super().training(**settings)
        return self

    def evaluation(self, *, evaluation_contexts: Sequence[Any] | None = None, **settings: Any) -> "GRPOConfig":
        """RLlib's settings, plus the contexts of an evaluation every `evaluation_interval` iterations."""
        if evaluation_contexts is not None:
            self.evaluation_contexts = tuple(evaluation_contexts)
        super().evaluation(**settings)
        self.evaluation_runners = self.evaluation_config is not None
        return self

    @property
    def chunks_per_iteration(self) -> int:
        """Resets of a whole runner that one iteration takes."""
        return self.groups_per_iteration * self.group_size // self.num_envs_per_env_runner

    def entropy_share(self, round_number: int) -> float:
        """Part of the entropy bonus that is given in a round, 0 to 1."""
        return max(0.0, 1.0 - round_number / self.entropy_rounds) if self.entropy_rounds else 1.0

    def build_algo(self, *args: Any, **kwargs: Any) -> "GRPO":
        # RLlib takes a value of -1 for "deprecated" on the way and puts the default in its place: check before that.
        self.validate()
        return super().build_algo(*args, **kwargs)

    def validate(self) -> None:
        super().validate()
        envs, group, groups = self.num_envs_per_env_runner, self.group_size, self.groups_per_iteration
        if group < 2:
            raise UserError(f"group size {group} is not allowed: advantages compare at least 2 rollouts")
        if not self.in_evaluation and envs % group:
            raise UserError(f"group size {group} does not divide the {envs} environments of a runner")
        if not self.in_evaluation and (groups < 1 or groups * group % envs):
            raise UserError(
                f"{groups} groups of {group} rollouts an iteration do not fill whole runners of {envs} environments: "
                f"give a multiple of {envs // group} groups"
            )
        if not (0 < self.clip_low < 1 and self.clip_high > 0 and self.kl_coeff >= 0 and self.entropy_coeff >= 0):
            raise UserError(
                f"clip_low {self.clip_low}, clip_high {self.clip_high}, kl_coeff {self.kl_coeff}, entropy_coeff "
                f"{self.entropy_coeff} are not allowed: 0 < clip_low < 1, 0 < clip_high, both coefficients >= 0"
            )
        if not 0 <= self.average < 1:
            raise UserError(f"average {self.average} is not allowed: give 0 (latest weights) to below 1")
        if self.entropy_rounds < 0:
            raise UserError(f"entropy_rounds {self.entropy_rounds} is not allowed: give 0 (never falls) or more rounds")
        if self.max_staleness < 0 or (self.max_staleness and not self.ratio_max > 1 + self.clip_high):
            raise UserError(
                f"max_staleness {self.max_staleness}, ratio_max {self.ratio_max} are not allowed: max_staleness >= 0, "
                f"ratio_max above 1 + clip_high = {1 + self.clip_high:g}"
            )
        if not self.in_evaluation and self.max_staleness and not self.num_env_runners:
            raise UserError(
                f"max_staleness {self.max_staleness} needs remote env runners, and there are none: set num_env_runners "
                "to 1 or more, or max_staleness to 0"
            )
        if self.seed is None:
            raise UserError("a seed of None is not allowed: give an integer, every draw is derived from it")
        if not self.in_evaluation and self.batch_mode != "complete_episodes":
            raise UserError(f"batch mode {self.batch_mode!r} is not allowed: use 'complete_episodes'")

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        settings = {"hidden": self.hidden, "reference": self.kl_coeff > 0}
        return RLModuleSpec(module_class=ControllerModule, model_config=settings)

    def get_default_learner_class(self) -> type:
        return GRPOLearner
