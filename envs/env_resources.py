"""What environments of one process share: engine, samples, latency source, budgets, reward, knobs.

`EnvResources` contain a live model and stay in their process. An `EnvConfig` is small and picklable: env runners
receive it and build the `EnvResources`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ConfigDict, field_validator

from envs.budgets import BudgetDistribution, budget_range
from envs.config import BudgetSettings, LatencySettings, ModelSettings, RewardSettings, StoreSettings, TaskSettings
from envs.contracts import Engine
from envs.data.sample import Sample
from envs.errors import UserError
from envs.knobs import KnobSpace
from envs.latency import (
    Clock,
    LatencyProfile,
    MeasuredClock,
    MeasuringClock,
    ProfiledClock,
    RooflineClock,
    is_measuring,
)
from envs.latency.guardrail import Guardrail, LatencyPredictor
from envs.latency.noise import LatencyNoise
from envs.model.block_importance import read_importance
from envs.model.device import resolve_device, resolve_dtype
from envs.section import Section

if TYPE_CHECKING:
    from envs.engine import RolloutEngine


@dataclass(frozen=True)
class EnvResources:
    """What environments of one process share.

    Attributes:
        samples: indexed by contexts.
        guardrail: masks plans that are predicted to exceed the budget; None is off.
        noise: on the latencies of the profiled source; None is off.
    """

    engine: Engine
    samples: Sequence[Sample]
    clock: Clock | MeasuringClock
    budgets: BudgetDistribution
    reward: RewardSettings
    space: KnobSpace
    guardrail: Guardrail | None = None
    noise: LatencyNoise | None = None

    @cached_property
    def predictor(self) -> LatencyPredictor | None:
        """Predicted latencies of a request's plans; None without a guardrail."""
        if self.guardrail is None:
            return None
        clock = None if is_measuring(self.clock) else self.clock
        return LatencyPredictor(self.guardrail, self.engine, self.space, clock)

    @cached_property
    def d_model(self) -> int:
        """Width of language features and latency tokens."""
        return int(self.engine.model.config.d_model)


class EnvConfig(Section):
    """Settings of an env runner's `EnvResources`.

    Attributes:
        split: train, validation or test.
        distribution: budgets; None computes the device's range over this split's samples.
        guardrail: fitted by `envs.calibrate_guardrail`; None is off.
    """

    model_config = ConfigDict(validate_default=True)

    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    latency: LatencySettings = LatencySettings()
    store: StoreSettings = StoreSettings()
    budgets: BudgetSettings = BudgetSettings()
    reward: RewardSettings = RewardSettings()
    split: str = "train"
    distribution: BudgetDistribution | None = None
    guardrail: Guardrail | None = None

    @field_validator("model", "task", "latency", "store", mode="before")
    @classmethod
    def _absolute(cls, section: Any) -> Any:
        """Validated anew, also if it is the default: relative paths mean this process's folder, not a runner's."""
        return section.model_dump() if isinstance(section, Section) else section

    def model_post_init(self, context: Any) -> None:
        if self.latency.source == "profiled" and self.latency.profile is None:
            raise UserError(
                "the profiled latency source needs a profile: measure one with `ray-ctrl profile`, or choose "
                "latency.source=roofline or measured"
            )

    def build(self) -> EnvResources:
        """Load model (cached per process) and samples.

        Raises:
            UserError: an unreadable checkpoint or task, or a profile of another device, model or thread count.
        """
        torch.set_num_threads(self.model.threads)
        engine = self.build_engine()
        samples = self.task.load(self.split)
        space = KnobSpace(engine.importance)
        clock = self.build_clock(engine)
        budgets = self.distribution or self._budgets(engine, clock, space, samples)
        return EnvResources(engine, samples, clock, budgets, self.reward, space, self.guardrail, self._noise(clock))

    def build_engine(self) -> "RolloutEngine":
        """The engine alone."""
        return load_engine(self.model, self.store)

    def build_clock(self, engine: Engine) -> Clock | MeasuringClock:
        """The latency source alone."""
        if self.latency.source == "roofline":
            return RooflineClock(engine.model.config, self.latency.device)
        if self.latency.source == "measured":
            return _measured(engine)
        return ProfiledClock.for_engine(LatencyProfile.load(self.latency.profile or ""), engine)

    def _noise(self, clock: Clock | MeasuringClock) -> LatencyNoise | None:
        on = self.latency.noise == "always" or (self.latency.noise == "evaluation" and self.split != "train")
        return LatencyNoise(clock.repeat_ratios, self.task.seed) if on and isinstance(clock, ProfiledClock) else None

    def _budgets(
        self, engine: Engine, clock: Clock | MeasuringClock, space: KnobSpace, samples: Sequence[Sample]
    ) -> BudgetDistribution:
        settings = self.budgets
        low, high = settings.low_ms, settings.high_ms
        if low is None or high is None:
            least, most = budget_range(engine, clock, space, samples)
            low = least * settings.low_factor if low is None else low
            high = most * settings.high_factor if high is None else high
            if low >= high:
                raise UserError(
                    f"a budget range of {low:.1f} to {high:.1f} ms is empty or inverted: this device's own is "
                    f"{least:.1f} to {most:.1f} ms; change budgets.low_factor or budgets.high_factor, or set both "
                    "budgets.low_ms and budgets.high_ms"
                )
        return BudgetDistribution.over(low, high, settings.held_out_bands, settings.penalty_bins)


# One measured clock per engine, as its reference latency is measured once.
_measured = lru_cache(maxsize=2)(MeasuredClock)


def load_engine(model: ModelSettings, store: StoreSettings) -> "RolloutEngine":
    """The engine of a model; equal settings share one in a process.

    Raises:
        UserError: an unreadable checkpoint, file of block importance or store, or a device that is not there.
    """
    importance = read_importance(model.name, model.block_importance)
    return _engine(model, store, importance, resolve_device(model.device))


@lru_cache(maxsize=2)
def _engine(
    settings: ModelSettings, store: StoreSettings, importance: tuple[float, ...], device: torch.device
) -> "RolloutEngine":
    """The engine of a process. Importance and device are part of the cache key: files and Ray may change them."""
    from envs.engine import OutcomeStore, RolloutEngine
    from envs.model import AdaptiveMolmoE
    from envs.processing import MolmoEProcessor

    dtype = resolve_dtype(settings.dtype, device)
    return RolloutEngine(
        AdaptiveMolmoE.from_pretrained(settings.name, device, dtype, settings.revision, settings.blank_crops),
        MolmoEProcessor.from_pretrained(settings.name, settings.revision),
        store=None if store.path is None else OutcomeStore(store.path, int(store.max_gb * 1e9)),
        importance=importance,
        encoder_seed=settings.latency_token_seed,
        max_new_tokens=settings.max_new_tokens,
        batch_tokens=settings.batch_tokens,
    )
