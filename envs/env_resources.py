"""Everything an environment needs, built: model and engine, samples, clock, budgets, reward, knobs.

A `World` holds a live model and stays in its process. A `WorldConfig` is small and picklable: it travels to an env
runner and builds the world there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Final, Literal

import torch

from envs.budgets import BudgetDistribution, budget_range
from envs.errors import UserError
from envs.knobs import KnobSpace
from envs.latency import (
    Clock,
    MeasuredClock,
    MeasuringClock,
    ProfiledClock,
    ProfileTable,
    RooflineClock,
    is_measuring,
)
from envs.latency.guardrail import Guardrail, LatencyPredictor
from envs.model.importance import read_importance
from envs.reward import RewardSettings
from envs.tasks.sample import Sample

CLOCKS: Final = ("profiled", "roofline", "measured")
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class World:
    """What environments of one process share.

    Attributes:
        engine: turns (sample, plan) into outcomes and (sample, tier, level) into latency tokens.
        samples: what contexts index.
        clock: gives latencies.
        budgets: training and held-out budgets.
        reward: penalty of violations.
        space: legal knobs and the plans behind them.
        guardrail: leaves only plans predicted to meet the budget; None is off.
    """

    engine: Any
    samples: Sequence[Sample]
    clock: Clock | MeasuringClock
    budgets: BudgetDistribution
    reward: RewardSettings
    space: KnobSpace
    guardrail: Guardrail | None = None

    @cached_property
    def predictor(self) -> LatencyPredictor | None:
        """Predicted latencies of a request's plans; None without a guardrail."""
        if self.guardrail is None:
            return None
        clock = None if is_measuring(self.clock) else self.clock
        return LatencyPredictor(self.guardrail, self.engine, self.space, clock)

    @cached_property
    def d_model(self) -> int:
        """Width of the model's embeddings, hence of language feature and latency token."""
        return int(self.engine.model.config.d_model)


@dataclass(frozen=True)
class WorldConfig:
    """How to build a world.

    Attributes:
        model: `embedded`, a hub id or a checkpoint folder.
        revision: commit, branch or tag of a hub id; None takes the newest.
        importance: file of block importance; None takes what lies beside the weights, else the published scores.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` takes the GPU this process was given.
        dtype: `float32`, `bfloat16` or `float16`.
        threads: CPU threads of this process; None leaves them alone.
        max_new_tokens: longest answer.
        batch_tokens: most prompt tokens in a batch; None lets the engine choose.
        encoder_seed: of the latency token's encoder.
        store: the outcome store, as the engine takes it; None keeps outcomes in memory.
        task, split, limit, task_seed, on_broken: the samples, as `envs.tasks.load_task` takes them.
        clock: `profiled`, `roofline` or `measured`.
        clock_device: of the roofline clock.
        table: file of the profile table, needed by the profiled clock.
        reward: penalty of violations.
        guardrail: fitted by `envs.calibrate_guardrail`; None is off.
        budgets: None computes the device's range over this world's samples with `held_out_bands` and `price_bins`.
        budget_low, budget_high: factors on the ends of that range.
        budget_low_ms, budget_high_ms: ends in ms instead, whatever the device; None takes the range's.
    """

    model: str = "embedded"
    revision: str | None = None
    importance: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    threads: int | None = None
    max_new_tokens: int = 64
    batch_tokens: int | None = None
    encoder_seed: int = 0
    store: str | None = None
    task: str = "scenes"
    split: str = "train"
    limit: int | None = None
    task_seed: int = 0
    on_broken: Literal["refuse", "skip"] = "refuse"
    clock: str = "roofline"
    clock_device: str = "laptop-2-core"
    table: str | None = None
    reward: RewardSettings = field(default_factory=RewardSettings)
    guardrail: Guardrail | None = None
    budgets: BudgetDistribution | None = None
    held_out_bands: int = 3
    price_bins: int = 8
    budget_low: float = 1.0
    budget_high: float = 1.0
    budget_low_ms: float | None = None
    budget_high_ms: float | None = None

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise UserError(f"clock {self.clock!r} is not known: choose one of {', '.join(CLOCKS)}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is not known: choose one of {', '.join(DTYPES)}")
        if self.clock == "profiled" and self.table is None:
            raise UserError(
                "the profiled clock needs a profile table: measure one with `ray-ctrl profile`, or choose clock "
                "roofline or measured"
            )

    def build(self) -> World:
        """Load the model (once per process and setting) and put the world together.

        Raises:
            UserError: an unreadable checkpoint or task, or a profile table of another device, model or thread count.
        """
        from envs.tasks import load_task

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        engine = self.build_engine()
        samples = load_task(self.task, self.split, self.limit, self.task_seed, on_broken=self.on_broken)
        space = KnobSpace(engine.importance)
        clock = self.build_clock(engine)
        budgets = self.budgets or self._budgets(engine, clock, space, samples)
        return World(engine, samples, clock, budgets, self.reward, space, self.guardrail)

    def build_engine(self) -> Any:
        """The engine alone; equal settings share one engine in a process."""
        return _engine(
            self.model,
            self.revision,
            read_importance(self.model, self.importance),
            self.device,
            self.dtype,
            self.max_new_tokens,
            self.batch_tokens,
            self.encoder_seed,
            self.store,
        )

    def build_clock(self, engine: Any) -> Clock | MeasuringClock:
        """The clock alone."""
        if self.clock == "roofline":
            return RooflineClock(engine.model.config, self.clock_device)
        if self.clock == "measured":
            return _measured(engine)
        return ProfiledClock.for_engine(ProfileTable.load(self.table or ""), engine)

    def _budgets(
        self, engine: Any, clock: Clock | MeasuringClock, space: KnobSpace, samples: Sequence[Sample]
    ) -> BudgetDistribution:
        low, high = self.budget_low_ms, self.budget_high_ms
        if low is None or high is None:
            least, most = budget_range(engine, clock, space, samples)
            low = least * self.budget_low if low is None else low
            high = most * self.budget_high if high is None else high
            if low >= high:
                raise UserError(
                    f"a budget range of {low:.1f} to {high:.1f} ms is empty or inverted: this device's own is "
                    f"{least:.1f} to {most:.1f} ms; change budgets.low or budgets.high, or set both budgets.low_ms and "
                    "budgets.high_ms"
                )
        return BudgetDistribution.over(low, high, self.held_out_bands, self.price_bins)


def resolve_device(device: str) -> torch.device:
    """The torch device behind a name; `auto` is the GPU where this process was given one, else the CPU.

    Raises:
        UserError: a device that this process does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({reason}): choose `auto` or `cpu`") from None
    return found


# One measured clock per engine: its reference latency is measured once and stays put.
_measured = lru_cache(maxsize=2)(MeasuredClock)


@lru_cache(maxsize=2)
def _engine(
    model: str,
    revision: str | None,
    importance: tuple[float, ...],
    device: str,
    dtype: str,
    max_new_tokens: int,
    batch_tokens: int | None,
    encoder_seed: int,
    store: str | None,
) -> Any:
    from envs.engine import RolloutEngine
    from envs.model import AdaptiveMolmoE, MolmoEProcessor

    place = resolve_device(device)
    return RolloutEngine(
        AdaptiveMolmoE.from_pretrained(model, device=place, dtype=DTYPES[dtype], revision=revision),
        MolmoEProcessor.from_pretrained(model, revision),
        store=store,
        importance=importance,
        encoder_seed=encoder_seed,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
    )
