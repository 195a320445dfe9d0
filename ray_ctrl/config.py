"""Every configuration key of a run, with its one default, its unit, its range and what it is for.

Each section is declared where it is used; here they are composed. `ray_ctrl.load_config` reads presets, files and
overrides into `Config`; `ray_ctrl.preflight` checks what spans several fields. `docs/config.md` is generated.
"""

import re

from pydantic import Field, field_validator

from envs.config import (
    BudgetSettings,
    GuardrailSettings,
    LatencySettings,
    ModelSettings,
    RewardSettings,
    StoreSettings,
    TaskSettings,
    absolute,
)
from envs.section import Flag, Int, Section
from policies.grpo.config import ControllerSettings, GRPOSettings, TimeoutSettings

_LOCAL_TRACKER = re.compile(r"(mlflow:(?:sqlite:///|file:(?!/)|(?!databricks\b|[\w+-]+:)))(.+)")
"""mlflow:FOLDER, mlflow:file:FOLDER and mlflow:sqlite:///FILE."""


class RunnersConfig(TimeoutSettings):
    """Processes, and the CPUs and GPUs of each."""

    address: str = Field(
        default="auto",
        min_length=1,
        description="`local` starts a Ray for this run, `auto` joins the cluster of a Ray job and "
        "else starts one, anything else is the address of a running cluster.",
    )
    count: Int = Field(default=0, ge=0, le=4096, description="Env runners; 0 samples inside the driver.")
    cpus: float = Field(default=1.0, gt=0, le=1024, description="CPUs of each env runner.")
    gpus: float = Field(default=0.0, ge=0, le=8, description="GPUs of each env runner, fractions allowed.")
    envs_per_runner: Int | None = Field(
        default=None,
        ge=1,
        description="Environments of each runner's vector; `null` divides the iteration's rollouts evenly. A multiple "
        "of `grpo.group_size`.",
    )
    learners: Int = Field(default=0, ge=0, le=64, description="Learner processes; 0 learns inside the driver.")
    learner_cpus: float = Field(default=1.0, gt=0, le=1024, description="CPUs of each learner.")
    learner_gpus: float = Field(default=0.0, ge=0, le=8, description="GPUs of each learner.")
    eval_runners: Int = Field(default=0, ge=0, le=4096, description="Evaluation runners; 0 evaluates in the driver.")
    connect_timeout_s: float = Field(
        default=60.0, gt=0, le=3600, description="Wait for the cluster and its resources, s."
    )


class EvaluationConfig(Section):
    """Validation during training, the table at the end."""

    every: Int = Field(
        default=10,
        ge=0,
        description="Iterations between validations; 0 never validates, and the last checkpoint is exported.",
    )
    lookup_samples: Int | None = Field(
        default=None,
        ge=0,
        description="Training samples, drawn at random, on which every distinct plan is run for the lookup-table "
        "baseline; `null` takes all that the controller trains on, 0 leaves that baseline out.",
    )


class RunConfig(Section):
    """The run itself."""

    folder: str = Field(default="runs", min_length=1, description="Folder in which run folders are made.")
    name: str | None = Field(
        default=None, pattern=r"^\.*[\w\-][\w.\-]*$", description="Name of the run folder; `null` names it by time."
    )
    seed: Int = Field(default=0, ge=0, lt=2**31, description="Seed of everything random.")
    iterations: Int = Field(default=80, ge=1, description="Training iterations.")
    checkpoint_every: Int = Field(default=10, ge=1, description="Iterations between checkpoints.")
    keep_checkpoints: Int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Latest checkpoints kept, in addition to the chosen and the highest-scoring one.",
    )
    tensorboard: Flag = Field(default=True, description="Write TensorBoard files.")
    prometheus: Flag = Field(
        default=False,
        description="Publish each iteration's numbers at the Prometheus endpoint of Ray's nodes, as `ray_ray_ctrl_*`.",
    )
    tracker: str | None = Field(
        default=None,
        pattern=r"^(mlflow|wandb):\S+$",
        description="Experiment tracker in addition to TensorBoard: `mlflow:URI` (a server or `sqlite:///FILE`) "
        "or `wandb:PROJECT`; `null` is none.",
    )

    _folder = field_validator("folder")(absolute)

    @field_validator("tracker")
    @classmethod
    def _local_tracker(cls, tracker: str | None) -> str | None:
        local = _LOCAL_TRACKER.fullmatch(tracker or "")
        return f"{local[1]}{absolute(local[2])}" if local else tracker


class Config(Section):
    """Everything."""

    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    latency: LatencySettings = LatencySettings()
    store: StoreSettings = StoreSettings()
    budgets: BudgetSettings = BudgetSettings()
    reward: RewardSettings = RewardSettings()
    guardrail: GuardrailSettings = GuardrailSettings()
    controller: ControllerSettings = ControllerSettings()
    grpo: GRPOSettings = GRPOSettings()
    runners: RunnersConfig = RunnersConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()
