"""Everything an environment needs, built: model and engine, samples, clock, budgets, reward, knobs.

A `World` holds a live model and stays in its process. An `EnvConfig` is small and picklable: it travels to an env
runner and builds the world there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from envs.budgets import BudgetDistribution, budget_range
from envs.config import (
    BudgetSettings,
    LatencySettings,
    ModelSettings,
    RewardSettings,
    Section,
    StoreSettings,
    TaskSettings,
)
from envs.data.sample import Sample
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
from envs.model.block_importance import read_importance
from envs.model.device import resolve_device, resolve_dtype


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


class EnvConfig(Section):
    """Everything an env runner needs to build its environments: small and picklable.

    Attributes:
        split: train, validation or test.
        distribution: budgets; None computes the device's range over this split's samples.
        guardrail: fitted by `envs.calibrate_guardrail`; None is off.
    """

    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    latency: LatencySettings = LatencySettings()
    store: StoreSettings = StoreSettings()
    budgets: BudgetSettings = BudgetSettings()
    reward: RewardSettings = RewardSettings()
    split: str = "train"
    distribution: BudgetDistribution | None = None
    guardrail: Guardrail | None = None

    def model_post_init(self, context: Any) -> None:
        if self.latency.source == "profiled" and self.latency.profile is None:
            raise UserError(
                "the profiled latency source needs a profile: measure one with `ray-ctrl profile`, or choose "
                "latency.source=roofline or measured"
            )

    def build(self) -> World:
        """Load the model (once per process and setting) and put the world together.

        Raises:
            UserError: an unreadable checkpoint or task, or a profile table of another device, model or thread count.
        """
        from envs.data import load_task

        torch.set_num_threads(self.model.threads)
        engine = self.build_engine()
        task = self.task
        limit = {"train": task.train_samples, "validation": task.validation_samples, "test": task.test_samples}
        samples = load_task(task.name, self.split, limit[self.split], task.seed, on_broken=task.on_invalid_row)
        space = KnobSpace(engine.importance)
        clock = self.build_clock(engine)
        budgets = self.distribution or self._budgets(engine, clock, space, samples)
        return World(engine, samples, clock, budgets, self.reward, space, self.guardrail)

    def build_engine(self) -> Any:
        """The engine alone; equal settings share one engine in a process."""
        model = self.model
        importance = read_importance(model.name, model.block_importance)
        return _engine(model, self.store, importance, resolve_device(model.device))

    def build_clock(self, engine: Any) -> Clock | MeasuringClock:
        """The clock alone."""
        if self.latency.source == "roofline":
            return RooflineClock(engine.model.config, self.latency.device)
        if self.latency.source == "measured":
            return _measured(engine)
        return ProfiledClock.for_engine(ProfileTable.load(self.latency.profile or ""), engine)

    def _budgets(
        self, engine: Any, clock: Clock | MeasuringClock, space: KnobSpace, samples: Sequence[Sample]
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


# One measured clock per engine: its reference latency is measured once and stays put.
_measured = lru_cache(maxsize=2)(MeasuredClock)


@lru_cache(maxsize=2)
def _engine(settings: ModelSettings, store: StoreSettings, importance: tuple[float, ...], device: torch.device) -> Any:
    """The engine of a process; importance and device are part of the key, as files and Ray may change both."""
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
