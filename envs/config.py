"""Settings of model, samples, latencies, store, budgets and reward, each with its one default and range.

`ray_ctrl.config` composes them; help and docs/config.md are generated from the fields.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from envs.section import Int, Section

if TYPE_CHECKING:
    from envs.data.sample import Sample

Latency = Literal["profiled", "roofline", "measured"]
DType = Literal["float32", "bfloat16", "float16"]


def absolute(path: str | None) -> str | None:
    """A path as processes in other folders find it.

    Raises:
        ValueError: `~name` of a user that this machine does not have.
    """
    if path is None:
        return None
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        raise ValueError(f"{path.split('/')[0]} is no home on this machine; write the folder in full") from None


class ModelSettings(Section):
    """The frozen vision-language model inside the environments."""

    name: str = Field(
        default="embedded",
        min_length=1,
        description="`embedded` (ships with the package), a hub id such as `allenai/MolmoE-1B-0924`, or a folder with "
        "a checkpoint in that layout.",
    )
    revision: str | None = Field(
        default=None, pattern=r"^[\w./-]+$", description="Commit, branch or tag of a hub id; `null` takes its newest."
    )
    blank_crops: Literal["published", "trainer"] = Field(
        default="published",
        description="Image crops treated as blank: `published` those with a pixel of exactly -1.0, as in the released "
        "code (1 % of crops of photos), `trainer` padding alone, as in the code that trained the weights.",
    )
    block_importance: str | None = Field(
        default=None,
        min_length=1,
        description="File of block importance, as `ray-ctrl importance` writes it; `null` takes `importance.json` "
        "next to the weights, else the scores published for MolmoE-1B.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="`auto` (the GPU that the process was given, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.",
    )
    dtype: DType | None = Field(
        default=None, description="Number format of the weights; `null` is bfloat16 on a GPU and float32 elsewhere."
    )
    threads: Int = Field(default=1, ge=1, le=256, description="CPU threads of every process that runs the model.")
    max_new_tokens: Int = Field(default=64, ge=1, le=64, description="Longest answer, tokens, under greedy decoding.")
    batch_tokens: Int | None = Field(
        default=None, ge=64, description="Most prompt tokens in one batch; `null` lets the engine choose."
    )
    latency_token_seed: Int = Field(
        default=0,
        ge=0,
        description="Seed of the frozen encoder from budget to latency token. A controller works only with the seed it "
        "was trained with.",
    )

    _file = field_validator("block_importance")(absolute)

    @field_validator("name")
    @classmethod
    def _folder(cls, name: str) -> str:
        folder = str(absolute(name))
        return folder if name != "embedded" and Path(folder).is_dir() else name


class TaskSettings(Section):
    """Questions and images."""

    name: str = Field(
        default="scenes",
        min_length=1,
        description="A task of `envs.data`, a data file or folder, or a mix of them; docs/data.md has the grammar.",
    )
    train_samples: Int = Field(
        default=256,
        ge=1,
        description="Samples of the train split used for training. They recur, so that their outcomes are reused.",
    )
    validation_samples: Int = Field(
        default=128, ge=1, description="Samples of the validation split, which choose among checkpoints."
    )
    test_samples: Int = Field(default=200, ge=1, description="Samples of the test split in the final table.")
    seed: Int = Field(default=0, ge=0, description="Seed of the choice of samples.")
    fresh_seed: Int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="Seed of new scenes that replace the test split; `null` takes the split. `scenes` only.",
    )
    on_invalid_row: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="Rows of a data file that cannot be used: `refuse` stops at the first, `skip` leaves them out.",
    )

    @field_validator("name")
    @classmethod
    def _paths(cls, name: str) -> str:
        from envs.data.task_spec import absolute_task

        return absolute_task(name)

    def load(self, split: str, count: int | None = None) -> "Sequence[Sample]":
        """Samples of a split: at most `count`, by default as many as configured.

        Raises:
            UserError: see `envs.data.load_task`.
        """
        from envs.data import load_task

        limit = getattr(self, f"{split}_samples") if count is None else count
        return load_task(self.name, split, limit, self.seed, on_invalid_row=self.on_invalid_row, fresh=self.fresh_seed)


class LatencySettings(Section):
    """Where latencies come from."""

    source: Latency = Field(
        default="profiled",
        description="`profiled`: a profile measured once on this device; `roofline`: computed for a named device, "
        "deterministic; `measured`: the wall clock of every single request (slow).",
    )
    device: str = Field(
        default="laptop-2-core",
        min_length=1,
        description="Device of the roofline model, a name in `envs.latency.roofline`.",
    )
    profile: str | None = Field(
        default=None,
        min_length=1,
        description="File of the profile; `null` keeps one per device, model, threads and versions in "
        "`latency.profile_dir` and measures it when it is missing.",
    )
    profile_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder that keeps profiles for later runs; `null` keeps the profile in the run folder.",
    )
    noise: Literal["evaluation", "always", "never"] = Field(
        default="evaluation",
        description="Noise of the profiled source, drawn from the profile's own repeats for each (sample, plan): "
        "`evaluation` on validation and test samples, `always` on training samples, too.",
    )
    profile_samples: Int = Field(default=8, ge=1, le=1000, description="Samples measured per tiling when profiling.")
    profile_repeats: Int = Field(default=5, ge=1, le=100, description="Timed repeats of each profiled point.")

    _paths = field_validator("profile", "profile_dir")(absolute)


class StoreSettings(Section):
    """The outcome store: answers of the frozen model, kept for reuse."""

    path: str | None = Field(
        default="runs/outcomes.sqlite",
        min_length=1,
        description="File of the store, shared by runners and runs; `null` keeps outcomes in each process's memory.",
    )
    max_gb: float = Field(
        default=8.0,
        ge=0.01,
        le=10_000,
        description="Largest file, GB. Latency tokens are evicted before outcomes, the least recently used first.",
    )

    _file = field_validator("path")(absolute)


class BudgetSettings(Section):
    """Latency budgets. The device's range: from the cheapest plan's 95th percentile of latency to the full plan's."""

    low_factor: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Smallest training budget as a multiple of the lower end of the device's range. Below 1.0 "
        "there are budgets that even the cheapest plan exceeds for over 5 % of requests.",
    )
    high_factor: float = Field(
        default=1.0, gt=0, le=100, description="Largest training budget as a multiple of the upper end of the range."
    )
    low_ms: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Smallest training budget, ms, on any device; `null` takes it from the device's range.",
    )
    high_ms: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Largest training budget, ms, on any device; `null` takes it from the device's range.",
    )
    held_out_bands: Int = Field(
        default=3, ge=0, le=5, description="Bands left out of the training range, each 15 % of its logarithm wide."
    )
    penalty_bins: Int = Field(default=8, ge=1, le=64, description="Budget bins with a penalty multiplier of their own.")


class RewardSettings(Section):
    """Accuracy - multiplier x cost; the cost is 0 within budget, else 1 plus the relative excess, at most 2."""

    mode: Literal["fixed", "lagrangian"] = Field(
        default="fixed",
        description="`fixed`: the multiplier is `penalty` throughout; `lagrangian`: one multiplier per budget bin "
        "moves until the argmax policy's avoidable violations meet `max_violation_rate`.",
    )
    penalty: float = Field(
        default=1.3,
        ge=0,
        le=1000,
        description="Constant multiplier of a violation; validation and evaluation use it in both modes.",
    )
    penalty_init: float = Field(default=0.5, ge=0, le=1000, description="Multiplier of every bin at the start.")
    penalty_lr: float = Field(
        default=0.1, ge=0, le=100, description="Largest change of a multiplier's logarithm per iteration."
    )
    penalty_max: float = Field(default=5.0, gt=0, le=1000, description="Largest multiplier.")
    penalty_smoothing: float = Field(
        default=0.8,
        ge=0,
        lt=1,
        description="Weight of the past in the running violation rate that moves the multipliers.",
    )
    max_violation_rate: float = Field(
        default=0.04, ge=0, le=1, description="Violation rate that mode `lagrangian` aims at in every budget bin."
    )
    budget_use_bonus: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Reward for using the entire budget, in proportion: of plans that answer equally well, the more "
        "expensive one within budget is preferred. 0 is off.",
    )


class GuardrailSettings(Section):
    """The latency mask: only plans predicted to meet the budget can be chosen, in training, evaluation and serving."""

    confidence: float | None = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="Share of requests that should meet their budget under a plan that just meets it as predicted, "
        "calibrated on validation samples; `null` turns the guardrail off.",
    )
