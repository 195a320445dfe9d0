"""The exponential moving average of the controller's weights over iterations: what is evaluated and exported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class WeightAverage:
    """Moving average of weights (Polyak and Juditsky 1992; exponential: Tarvainen and Valpola 2017). Immutable.

    Penalty multipliers and policy chase each other from iteration to iteration, so the weights of a single iteration
    may be ones that violate the target or ones that shy away from it.

    Attributes:
        decay: weight of the past, 0 (no average is kept) to below 1.
        weights: the average; None before the first update.
        updates: how many weights it covers.
    """

    decay: float
    weights: Weights | None = None
    updates: int = 0

    def updated(self, latest: Weights) -> "WeightAverage":
        """With one more iteration's weights. The first few all count alike, so that the initial ones fade soon."""
        if not self.decay:
            return self
        share = 1.0 - min(self.decay, self.updates / (self.updates + 1))
        past = latest if self.weights is None else self.weights
        mixed = {
            name: np.asarray(past[name] + share * (value - past[name]), value.dtype) for name, value in latest.items()
        }
        return WeightAverage(self.decay, mixed, self.updates + 1)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"weights": self.weights, "updates": self.updates}

    def restored(self, state: Mapping[str, Any]) -> "WeightAverage":
        """With the average of a checkpoint; it stays empty at decay 0."""
        return WeightAverage(self.decay, **state) if self.decay else self
