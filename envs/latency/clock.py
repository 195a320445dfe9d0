"""Latency sources, and the reference request that budgets are normalized by.

A `Clock` computes latency from a request's sizes, so rollouts can be batched and reused; a `MeasuringClock` runs and
times the request.
"""

from typing import TYPE_CHECKING, Any, Final, Protocol

from envs.knobs import TIER_CROPS, ExecutionPlan
from envs.latency.record import LatencyRecord, RequestShape

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from envs.model.config import AdaptiveMolmoEConfig

FULL_PLAN: Final = ExecutionPlan()
REFERENCE_NEW_TOKENS: Final = 4
REFERENCE_TEXT_TOKENS: Final = 24
REFERENCE_TILING: Final = (3, 4)
"""Rows and columns of crops: the high tier's 12 crops on an image of 4:3."""


class AnyClock(Protocol):
    """Common to all latency sources.

    Attributes:
        name: `roofline`, `profiled` or `measured`.
        reference_ms: latency of the full plan on the reference request, ms.
    """

    @property
    def name(self) -> str: ...
    @property
    def reference_ms(self) -> float: ...


class Clock(AnyClock, Protocol):
    """Computes latency from a request's sizes, its plan and the length of its answer."""

    def latency(self, shape: RequestShape, plan: ExecutionPlan, new_tokens: int) -> LatencyRecord: ...


class MeasuringClock(AnyClock, Protocol):
    """Times each request at batch 1, with nothing shared or reused."""

    def measure(self, sample: Any, plan: ExecutionPlan, controller: Any = None) -> tuple[Any, LatencyRecord]: ...


def is_measuring(clock: Clock | MeasuringClock) -> "TypeIs[MeasuringClock]":
    """Whether `clock` runs every request."""
    return hasattr(clock, "measure")


def reference_shape(config: "AdaptiveMolmoEConfig") -> RequestShape:
    """Sizes of a model's reference request: 12 crops and the global view, a short question."""
    rows, columns = REFERENCE_TILING
    tokens = config.image_tokens(REFERENCE_TILING)
    return RequestShape(
        crops=TIER_CROPS["high"] + 1,
        image_tokens=tokens,
        prompt_tokens=tokens + REFERENCE_TEXT_TOKENS,
        pixels=rows * columns * config.vision.crop_size**2,
    )
