"""`GRPOConfig`: RLlib's configuration with GRPO's sections in it, and what it refuses before anything starts."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.search.sample import Domain

from envs.errors import UserError
from envs.section import Section
from policies.grpo.config import OLD_KEYS, ControllerSettings, GRPOSettings, TimeoutSettings
from policies.grpo.env_runner import RolloutRunner
from policies.grpo.evaluation import evaluate_with_runners
from policies.grpo.lagrangian import LagrangianSettings
from policies.grpo.learner import GRPOLearner
from policies.grpo.rl_module import ControllerModule

if TYPE_CHECKING:
    from policies.grpo.algorithm import GRPO

SECTIONS: Final[Mapping[str, type[Section]]] = {
    "grpo": GRPOSettings,
    "controller": ControllerSettings,
    "timeouts": TimeoutSettings,
}
RLLIB_NAMES: Final = {"num_epochs": ("grpo", "epochs"), "grad_clip": ("grpo", "max_grad_norm")}
UNSUPPORTED: Final = {
    "_env_to_module_connector": "the environment returns what the controller reads",
    "_module_to_env_connector": "the environment takes the controller's actions",
    "_learner_connector": "the driver makes the batches",
    "observation_filter": "observations are normalized by the environment",
    "output_write_episodes": "complete episodes are written",
    "output_write_method": "a file of Parquet is written for each shard",
    "output_max_rows_per_file": "a file of Parquet is written for each shard",
    "output_filesystem": "give an address such as s3://bucket/folder as output",
    "input_": "GRPO learns from its own rollouts only",
    "evaluation_parallel_to_training": "what is evaluated is the controller after an iteration",
    "train_batch_size_per_learner": "an iteration is groups_per_iteration times group_size rollouts",
}
ALL_CONTEXTS: Final = 2**31
OWN_NAMES: Final = ("lagrangian", "penalty_bins", "total_iterations", "runner_threads")


class GRPOConfig(AlgorithmConfig):
    """RLlib's configuration plus GRPO's own settings.

    Every field of the three sections can also be given to `.training(...)` and read and set as an attribute (and so be
    searched by Tune) by its own name; RLlib's `num_epochs` and `grad_clip` are `epochs` and `max_grad_norm`.

    Attributes:
        grpo, controller, timeouts: sections, see `policies.grpo.config`.
        lagrangian: how penalty multipliers move, an `envs.config.RewardSettings`; None leaves the environment its
            constant one.
        penalty_bins: number of budget bins with a multiplier each, as the environment numbers them in `budget_bin`.
        total_iterations: iterations of the run, over which `anneal_entropy` lets the entropy bonus fall to 0;
            0 is unknown and keeps it constant.
        lr_schedule: learning rates over decisions sampled, as RLlib's `lr` takes them; None keeps `grpo.lr`.
        runner_threads: torch threads of each remote env runner.
        evaluation_contexts: contexts of an evaluation every `evaluation_interval` iterations, of which the first
            `evaluation_duration` are run: all by default. Without any the environment's own, `held_out_contexts()`.
    """

    output: str | None

    def __init__(self, algo_class: type | None = None) -> None:
        from policies.grpo.algorithm import GRPO

        super().__init__(algo_class=algo_class or GRPO)
        self.grpo = GRPOSettings()
        self.controller = ControllerSettings()
        self.timeouts = TimeoutSettings()
        self.search_spaces: dict[str, Any] = {}
        self.lr_schedule: Sequence[Any] | None = None
        self.lagrangian: LagrangianSettings | None = None
        self.penalty_bins: int = 1
        self.total_iterations: int = 0
        self.runner_threads: int = 1
        self.seed = 0
        self.num_envs_per_env_runner = 64
        self.batch_mode = "complete_episodes"
        self.gym_env_vectorize_mode = "vector_entry_point"
        self.env_runner_cls = RolloutRunner
        self.restart_failed_env_runners = True
        self.delay_between_env_runner_restarts_s = 0.0
        # The others wait for so long in each iteration while a lost runner loads its model again.
        self.env_runner_health_probe_timeout_s = 2.0
        # Runners are sent what they need with each shard; RLlib would wait for all of them after each iteration.
        self.merge_env_runner_states = False
        self.broadcast_env_runner_states = False
        self.custom_evaluation_function = evaluate_with_runners
        self.evaluation_sample_timeout_s = self.timeouts.sample_timeout_s
        self.evaluation_contexts: tuple[Any, ...] = ()
        self.evaluation_duration = ALL_CONTEXTS
        # Not named evaluation_*: RLlib hands every such key of a dict to `evaluation()`.
        self.has_evaluation_runners: bool = False

    def to_dict(self) -> dict[str, Any]:
        """RLlib's, with each field of the sections by its own name, as Tune searches and reports them."""
        hidden = {*SECTIONS, "search_spaces", "lr_schedule"}
        config = {name: value for name, value in super().to_dict().items() if name not in hidden}
        return config | {name: getattr(self, name) for section in SECTIONS.values() for name in section.model_fields}

    def sections(
        self, *, grpo: GRPOSettings, controller: ControllerSettings, timeouts: TimeoutSettings
    ) -> "GRPOConfig":
        """Take complete sections, as a configuration file has them."""
        self.grpo, self.controller, self.timeouts = grpo, controller, timeouts
        return self

    def training(self, **settings: Any) -> "GRPOConfig":
        """RLlib's settings, the fields of the sections, and `lagrangian`, `total_iterations`, `runner_threads`.

        Raises:
            UserError: a value outside its range, or an earlier version's name.
        """
        for name in list(settings):
            if name in OLD_KEYS:
                raise UserError(f"unknown key {name!r}: it is {OLD_KEYS[name]!r} now")
            if name in OWN_NAMES or isinstance(getattr(type(self), name, None), property):
                setattr(self, name, settings.pop(name))
        super().training(**settings)
        return self

    def evaluation(self, *, evaluation_contexts: Sequence[Any] | None = None, **settings: Any) -> "GRPOConfig":
        """RLlib's settings, plus the contexts of an evaluation every `evaluation_interval` iterations."""
        if evaluation_contexts is not None:
            self.evaluation_contexts = tuple(evaluation_contexts)
        super().evaluation(**settings)
        self.has_evaluation_runners = self.evaluation_config is not None
        return self

    @property
    def rollouts_per_iteration(self) -> int:
        """Rollouts (of two decisions each) sampled before each update."""
        return self.grpo.groups_per_iteration * self.grpo.group_size

    @property
    def shards_per_iteration(self) -> int:
        """Resets of all environments of a runner that one iteration takes."""
        return self.rollouts_per_iteration // self.num_envs_per_env_runner

    def entropy_share(self, iteration: int) -> float:
        """Part of the entropy bonus that is given in an iteration, 0 to 1."""
        if not self.grpo.anneal_entropy or not self.total_iterations:
            return 1.0
        return max(0.0, 1.0 - iteration / self.total_iterations)

    def build_algo(self, *args: Any, **kwargs: Any) -> "GRPO":
        # RLlib takes a value of -1 for "deprecated" on the way and puts the default in its place: check before that.
        self.validate()
        return super().build_algo(*args, **kwargs)

    def validate(self) -> None:
        super().validate()
        if self.seed is None:
            raise UserError("a seed of None is not allowed: give an integer, every draw is derived from it")
        if self.total_iterations < 0:
            raise UserError(f"total_iterations = {self.total_iterations} is not allowed: 0 (unknown) or more")
        grpo = self.grpo
        if grpo.max_policy_lag and grpo.dual_clip <= 1 + grpo.clip_high:
            raise UserError(
                f"dual_clip = {grpo.dual_clip:g} is not allowed: with max_policy_lag it must exceed 1 + clip_high = "
                f"{1 + grpo.clip_high:g}"
            )
        if not self.in_evaluation:
            self._validate_sampling()
            self._validate_unsupported()

    def _validate_sampling(self) -> None:
        """Refuse groups that do not fill runners, and policy lag without remote runners."""
        envs, group, groups = self.num_envs_per_env_runner, self.grpo.group_size, self.grpo.groups_per_iteration
        given = self.env_config.get("group_size", group)
        if given != group:
            raise UserError(
                f"group_size = {given} in env_config is not the {group} of .training(): give it there alone"
            )
        if envs % group:
            raise UserError(f"group size {group} does not divide the {envs} environments of a runner")
        if groups * group % envs:
            raise UserError(
                f"{groups} groups of {group} rollouts an iteration do not fill runners of {envs} environments: "
                f"give a multiple of {envs // group} groups"
            )
        if self.grpo.max_policy_lag and not self.num_env_runners:
            raise UserError(
                f"max_policy_lag = {self.grpo.max_policy_lag} needs remote env runners, and there are none: set "
                "num_env_runners to 1 or more, or max_policy_lag to 0"
            )
        if self.grpo.advantages == "known" and (self.grpo.normalize_by_std or self.grpo.skip_uniform_groups):
            raise UserError(
                "advantages = 'known' has no use for a group's standard deviation or equal returns: set "
                "normalize_by_std and skip_uniform_groups to false, or advantages to 'sampled'"
            )
        if self.batch_mode != "complete_episodes":
            raise UserError(f"batch mode {self.batch_mode!r} is not allowed: use 'complete_episodes'")

    def _validate_unsupported(self) -> None:
        """Refuse what RLlib offers and GRPO would silently ignore."""
        # RLlib derives one of the defaults from the number of learners.
        defaults = AlgorithmConfig().learners(num_learners=self.num_learners)
        for name, instead in UNSUPPORTED.items():
            if getattr(self, name) != getattr(defaults, name):
                raise UserError(f"{name} = {getattr(self, name)!r} has no effect on GRPO: {instead}")
        if self.output:
            if find_spec("msgpack_numpy") is None:
                raise UserError(f"output = {self.output!r} needs a package that is missing: pip install msgpack-numpy")
            if "://" not in self.output:  # runners may work in another folder
                self.output = str(Path(self.output).absolute())
        spec = self.rl_module_spec
        if spec.module_class is not None and not issubclass(spec.module_class, ControllerModule):
            raise UserError(
                f"RLModule {spec.module_class.__name__} is not allowed: GRPO trains the masked distribution of "
                "policies.grpo.rl_module.ControllerModule; give it or a subclass"
            )

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        model_config = {**self.controller.model_dump(), "reference": self.grpo.kl_coef > 0}
        return RLModuleSpec(module_class=ControllerModule, model_config=model_config)

    def get_default_learner_class(self) -> type:
        return GRPOLearner


def _field(section: str, name: str) -> property:
    """A field of a section as an attribute of the configuration, checked when it is set."""

    def get(config: GRPOConfig) -> Any:
        if name in config.search_spaces:
            return config.search_spaces[name]
        schedule = config.lr_schedule if name == "lr" else None
        return getattr(getattr(config, section), name) if schedule is None else schedule

    def put(config: GRPOConfig, value: Any) -> None:
        # RLlib's constructor sets its own defaults before the sections exist; those do not count.
        if section not in vars(config):
            return
        if isinstance(value, Domain) or (isinstance(value, dict) and "grid_search" in value):
            config.search_spaces[name] = value
            return
        config.search_spaces.pop(name, None)
        if name == "lr":
            config.lr_schedule = value if isinstance(value, list | tuple) else None
            if config.lr_schedule is not None:
                return
        plain = value.item() if hasattr(value, "item") else value
        setattr(config, section, getattr(config, section).replaced(**{name: plain}))

    return property(get, put)


for _section, _settings in SECTIONS.items():
    for _name in _settings.model_fields:
        setattr(GRPOConfig, _name, _field(_section, _name))
for _name, _place in RLLIB_NAMES.items():
    setattr(GRPOConfig, _name, _field(*_place))
