"""Latency measured by running each request on this device, at batch 1."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from envs.data.sample import ImageRef, Sample
from envs.knobs import ExecutionPlan
from envs.latency.clock import FULL_PLAN, REFERENCE_NEW_TOKENS, REFERENCE_TILING
from envs.latency.record import LatencyRecord

if TYPE_CHECKING:
    from envs.contracts import Engine

_REFERENCE_QUESTION: Final = "What can be seen in this picture, and how many of them are there?"


class MeasuredClock:
    """Wall-clock time of complete requests, device-synchronized, with nothing shared or reused.

    Args:
        repeats: timed runs of the reference request after two warm-up runs; the median counts.
    """

    name: Final = "measured"

    def __init__(self, engine: "Engine", repeats: int = 5) -> None:
        self.engine = engine
        self.repeats = repeats

    @cached_property
    def reference_ms(self) -> float:
        """Latency of the full plan on a generated 4:3 image with 12 crops, decoding scaled to 4 new tokens, ms."""
        sample = reference_sample(self.engine.model.config.vision.crop_size)
        totals = []
        for turn in range(self.repeats + 2):
            outcome, record = self.measure(sample, FULL_PLAN)
            if turn >= 2:
                decode = record.decode * REFERENCE_NEW_TOKENS / max(outcome.n_tokens, 1)
                totals.append(record.total - record.decode + decode)
        return float(np.median(totals))

    def measure(self, sample: Sample, plan: ExecutionPlan, controller: Any = None) -> tuple[Any, LatencyRecord]:
        """Run one request; return its outcome and stage times."""
        return self.engine.run_measured(sample, plan, controller)


@dataclass(frozen=True)
class _DrawnImage(ImageRef):
    """A fixed color ramp of a given size."""

    width: int
    height: int

    @property
    def digest(self) -> str:  # type: ignore[override]
        return hashlib.sha256(f"colour ramp {self.width} x {self.height}".encode()).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def load(self) -> Image.Image:
        down, right = np.mgrid[0 : self.height, 0 : self.width]
        channels = (down * 255 // self.height, right * 255 // self.width, (down + right) % 256)
        return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def reference_sample(crop_size: int) -> Sample:
    """The reference request as a sample; the image is tiled into 3 x 4 crops."""
    rows, columns = REFERENCE_TILING
    image = _DrawnImage(width=columns * crop_size, height=rows * crop_size)
    return Sample(id=image.digest[:16], image=image, question=_REFERENCE_QUESTION, answers=("",))
