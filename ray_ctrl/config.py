"""Every setting of a run, with its one default, its unit, its range and what it is for.

Frozen pydantic models that refuse unknown keys. `ray_ctrl.settings` reads presets, files and
overrides into `Config`;
`ray_ctrl.feasibility` checks what spans several fields. `docs/config.md` is generated from the
descriptions here.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

Int = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]


class Section(BaseModel):
    """A frozen group of settings; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class ModelConfig(Section):
    """The frozen vision-language model inside the environments."""

    name: str = Field(
        default="embedded",
        min_length=1,
        description="`embedded` (ships with the package), a hub id such as "
        "`allenai/MolmoE-1B-0924`, or a folder with a checkpoint in that layout.",
    )
    revision: str | None = Field(
        default=None,
        pattern=r"^[\w./-]+$",
        description="Commit, branch or tag of a hub id; `null` takes its newest.",
    )
    importance: str | None = Field(
        default=None,
        min_length=1,
        description="File of block importance, as `ray-ctrl importance` writes it; `null` takes `importance.json` "
        "beside the weights, else the scores published for MolmoE-1B.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="`auto` (GPU where the process was given one, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of the weights."
    )
    threads: Int = Field(
        default=1,
        ge=1,
        le=256,
        description="CPU threads of every process that runs the model. 1 to 256.",
    )
    max_new_tokens: Int = Field(
        default=64,
        ge=1,
        le=64,
        description="Longest answer, tokens, under greedy decoding. 1 to 64.",
    )
    batch_tokens: Int | None = Field(
        default=None,
        ge=64,
        description="Most prompt tokens in one batch, 64 or more; `null` lets the engine choose for the device.",
    )
    encoder_seed: Int = Field(
        default=0,
        ge=0,
        description="Seed of the frozen encoder from budget to latency token. A controller works "
        "only with the seed it was trained with.",
    )


class TaskConfig(Section):
    """Questions and images."""

    name: str = Field(
        default="scenes",
        min_length=1,
        description="A task of `envs.tasks`, a data file or folder, or a mix of them; docs/data.md has the grammar.",
    )
    train_samples: Int = Field(
        default=256,
        ge=1,
        description="Samples of the train split used for training, 1 or more. Training returns "
        "to the same finite set, so outcomes are reused.",
    )
    validation_samples: Int = Field(
        default=128,
        ge=1,
        description="Samples of the validation split, 1 or more; they choose among checkpoints.",
    )
    test_samples: Int = Field(default=200, ge=1, description="Samples of the test split in the final table, 1 or more.")
    seed: Int = Field(default=0, ge=0, description="Seed of the choice of samples. 0 or more.")
    on_broken: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="Rows of a data file that cannot be used: `refuse` names the first and stops, `skip` leaves "
        "them out.",
    )


class ClockConfig(Section):
    """Where latencies come from."""

    kind: Literal["profiled", "roofline", "measured"] = Field(
        default="profiled",
        description="`profiled`: a table measured once on this device; `roofline`: computed for a "
        "named device, deterministic; `measured`: the wall clock of every single request (slow).",
    )
    device: str = Field(
        default="laptop-2-core",
        min_length=1,
        description="Device of the roofline clock, a name in `envs.latency.roofline`.",
    )
    table: str | None = Field(
        default=None,
        description="File of the profile table; `null` keeps one per device, model, threads and "
        "versions under `clock.folder` and measures it when it is missing.",
    )
    folder: str | None = Field(
        default=None,
        description="Folder that keeps profile tables for later runs; `null` keeps the table in the run folder.",
    )
    profile_samples: Int = Field(
        default=8,
        ge=1,
        le=1000,
        description="Samples measured per tiling when profiling. 1 to 1000.",
    )
    profile_repeats: Int = Field(default=5, ge=1, le=100, description="Timed repeats of each profiled point. 1 to 100.")


class StoreConfig(Section):
    """The outcome store: what the frozen model answered, kept for reuse."""

    path: str | None = Field(
        default="runs/outcomes.sqlite",
        description="File of the store, shared by runners and runs; `null` keeps outcomes in each process's memory.",
    )


class RewardConfig(Section):
    """What a rollout is worth: accuracy - multiplier x cost, where the cost is 0 within budget, else 1 plus the excess
    latency / budget - 1, at most 2.
    """

    mode: Literal["fixed", "lagrangian"] = Field(
        default="fixed",
        description="`fixed`: the multiplier is `penalty` throughout; `lagrangian`: one multiplier per budget bin "
        "moves until the argmax policy's avoidable violations meet `max_violation_rate`.",
    )
    penalty: float = Field(
        default=1.3,
        ge=0,
        le=1000,
        description="Constant multiplier of a violation; validation and evaluation use it in both modes. 0 to 1000.",
    )
    penalty_init: float = Field(default=0.5, ge=0, le=1000, description="Multiplier at the start. 0 to 1000.")
    penalty_lr: float = Field(
        default=0.1,
        ge=0,
        le=100,
        description="Largest change of a multiplier's logarithm per iteration. 0 to 100.",
    )
    penalty_max: float = Field(default=5.0, gt=0, le=1000, description="Largest multiplier. Above 0, to 1000.")
    penalty_smoothing: float = Field(
        default=0.8,
        ge=0,
        lt=1,
        description="Weight of the past in the running violation rate that moves the multipliers. 0 to below 1.",
    )
    max_violation_rate: float = Field(
        default=0.04,
        ge=0,
        le=1,
        description="Violation rate that the lagrangian mode aims at in every budget bin, a share. 0 to 1.",
    )
    budget_use_bonus: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Reward for the share of the budget used; of plans that answer equally well it prefers the more "
        "expensive one within budget. 0 is off. 0 to 1000.",
    )


class GuardrailConfig(Section):
    """The latency mask: only plans predicted to meet the budget can be chosen, in training, evaluation and serving."""

    confidence: float | None = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="Share of requests that should meet their budget under any plan the guardrail allows, calibrated "
        "on validation samples; `null` turns the guardrail off. Above 0, below 1.",
    )


class BudgetConfig(Section):
    """Latency budgets. The device's range goes from the cheapest plan's 95th percentile to the full plan's."""

    low: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Smallest training budget as a multiple of the lower end of the device's range. Below it no plan "
        "is in time; from 1.0 on the controller sees budgets that only the cheapest meets. Above 0, to 100.",
    )
    high: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Largest training budget as a multiple of the upper end of the range. Above 0, to 100.",
    )
    low_ms: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Smallest training budget, ms, whatever the device; `null` takes it from the device's range. "
        "Above 0, to 1e6.",
    )
    high_ms: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Largest training budget, ms, whatever the device; `null` takes it from the device's range. "
        "Above 0, to 1e6.",
    )
    held_out_bands: Int = Field(
        default=3,
        ge=0,
        le=16,
        description="Bands cut out of the training range, never trained on. 0 to 16.",
    )
    price_bins: Int = Field(
        default=8, ge=1, le=64, description="Budget bins with a penalty multiplier of their own. 1 to 64."
    )


class ControllerConfig(Section):
    """The trained networks."""

    hidden: Int = Field(
        default=128,
        ge=8,
        le=4096,
        description="Width of the hidden layers of both stages. 8 to 4096.",
    )


class GRPOSettings(Section):
    """The learning algorithm."""

    group_size: Int = Field(
        default=8,
        ge=2,
        le=1024,
        description="Rollouts that share one sample and budget and are compared with one another. 2 to 1024.",
    )
    groups: Int = Field(default=384, ge=1, le=65536, description="Groups per iteration over all runners. 1 to 65536.")
    lr: float = Field(default=1e-3, gt=0, le=1, description="Adam step size. Above 0, to 1.")
    epochs: Int = Field(default=4, ge=1, le=100, description="Passes over an iteration's rollouts. 1 to 100.")
    minibatch: Int | None = Field(
        default=1024,
        ge=1,
        description="Steps per minibatch, 1 or more; `null` takes the whole iteration at once.",
    )
    clip_low: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Lower clip bound of the probability ratio, below 1. 0 to 1.",
    )
    clip_high: float = Field(default=0.28, gt=0, le=10, description="Upper clip bound of the ratio, above 1. 0 to 10.")
    divide_by_spread: Flag = Field(
        default=False, description="Divide a group's advantages by their standard deviation."
    )
    drop_equal_groups: Flag = Field(
        default=False, description="Leave groups whose rewards are all equal out of the update."
    )
    kl_weight: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Weight of the KL divergence to the reference policy; 0 is off. 0 to 100.",
    )
    reference_every: Int = Field(
        default=0,
        ge=0,
        description="Iterations between refreshes of the reference policy; 0 is never. 0 or more.",
    )
    entropy_weight: float = Field(
        default=0.1, ge=0, le=10, description="Weight of the entropy bonus, per nat. 0 to 10."
    )
    entropy_decay: Flag = Field(
        default=True,
        description="Let that weight fall linearly to 0 over `run.iterations`: explore, then decide. A run resumed for "
        "longer is given the weight that a run of that length has there.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=1e6, description="Longest gradient, Euclidean norm. Above 0, to 1e6."
    )
    average: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Weight of the past in the running average of the controller's weights over iterations (at first "
        "their plain mean), which is what is validated and exported; 0 takes the latest weights. 0 to below 1.",
    )
    max_staleness: Int = Field(
        default=0,
        ge=0,
        le=16,
        description="Updates between the weights that sample a round and those that learn from it; 0 samples and "
        "learns in turns, with more the env runners sample the next rounds meanwhile. 0 to 16.",
    )
    ratio_max: float = Field(
        default=3.0,
        gt=1,
        le=1e6,
        description="With `max_staleness`, the probability ratio is cut off there. Above 1 + `clip_high`, to 1e6.",
    )


class RunnersConfig(Section):
    """Processes, and the CPUs and GPUs they hold."""

    address: str = Field(
        default="auto",
        min_length=1,
        description="`local` starts a Ray for this run, `auto` joins the cluster of a Ray job and "
        "else starts one, anything else is the address of a running cluster.",
    )
    count: Int = Field(default=0, ge=0, le=4096, description="Env runners; 0 samples inside the driver. 0 to 4096.")
    cpus: float = Field(default=1.0, gt=0, le=1024, description="CPUs of each env runner. Above 0.")
    gpus: float = Field(default=0.0, ge=0, le=8, description="GPUs of each env runner, fractions allowed. 0 to 8.")
    envs: Int | None = Field(
        default=None,
        ge=1,
        description="Environments of each runner's vector; `null` spreads the iteration's rollouts "
        "evenly. A multiple of `grpo.group_size`.",
    )
    learners: Int = Field(
        default=0,
        ge=0,
        le=64,
        description="Learner processes; 0 learns inside the driver. 0 to 64.",
    )
    learner_cpus: float = Field(default=1.0, gt=0, le=1024, description="CPUs of each learner. Above 0.")
    learner_gpus: float = Field(default=0.0, ge=0, le=8, description="GPUs of each learner. 0 to 8.")
    evaluation: Int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Evaluation runners; 0 evaluates in the driver. 0 to 4096.",
    )
    connect_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Wait for the cluster and its resources, s. To 3600.",
    )
    sample_timeout_s: float = Field(
        default=600.0, gt=0, le=86400, description="Wait for one runner's rollouts, s. To 86400."
    )
    restart_timeout_s: float = Field(
        default=300.0,
        gt=0,
        le=86400,
        description="Wait for a first runner to come back when all are dead, s. To 86400.",
    )
    learner_timeout_s: float = Field(
        default=600.0, gt=0, le=86400, description="Wait for learners' answer to an update, s. To 86400."
    )


class EvaluationConfig(Section):
    """Validation on the way, the table at the end."""

    every: Int = Field(
        default=10,
        ge=0,
        description="Iterations between validations; 0 validates never, and the last checkpoint "
        "is the best. 0 or more.",
    )
    lookup_samples: Int = Field(
        default=256,
        ge=0,
        description="Training samples on which every distinct plan is run for the lookup-table "
        "baseline; 0 leaves that baseline out. 0 or more.",
    )


class RunConfig(Section):
    """The run itself."""

    folder: str = Field(default="runs", min_length=1, description="Folder in which run folders are made.")
    name: str | None = Field(
        default=None,
        pattern=r"^[\w.\-]+$",
        description="Name of the run folder; `null` names it by time.",
    )
    seed: Int = Field(default=0, ge=0, lt=2**31, description="Seed of everything random. 0 to 2^31 - 1.")
    iterations: Int = Field(default=240, ge=1, description="Training iterations, 1 or more.")
    checkpoint_every: Int = Field(default=10, ge=1, description="Iterations between checkpoints, 1 up.")
    keep_checkpoints: Int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Latest checkpoints kept, besides the chosen and the highest-scoring one. 1 to 1000.",
    )
    tensorboard: Flag = Field(default=True, description="Write TensorBoard files.")
    prometheus: Flag = Field(
        default=False,
        description="Show each iteration's numbers at the Prometheus endpoint of Ray's nodes, as `ray_ray_ctrl_*`.",
    )
    track: str | None = Field(
        default=None,
        pattern=r"^(mlflow|wandb):\S+$",
        description="Experiment tracker besides TensorBoard: `mlflow:URI` (a server, `sqlite:///FILE`, "
        "`file:///FOLDER`) or `wandb:PROJECT`; `null` is none.",
    )


class Config(Section):
    """Everything."""

    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    clock: ClockConfig = ClockConfig()
    store: StoreConfig = StoreConfig()
    budgets: BudgetConfig = BudgetConfig()
    reward: RewardConfig = RewardConfig()
    guardrail: GuardrailConfig = GuardrailConfig()
    controller: ControllerConfig = ControllerConfig()
    grpo: GRPOSettings = GRPOSettings()
    runners: RunnersConfig = RunnersConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()
