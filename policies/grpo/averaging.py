"""The running average of the controller's weights over rounds: what is evaluated and exported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Average:
    """Exponential average of weights (Polyak and Juditsky 1992; exponential: Tarvainen and Valpola 2017). Immutable.

    Prices and policy chase each other from round to round, so a single round's weights may be ones that overrun the
    target or ones that shy away from it.

    Attributes:
        memory: weight of the past, 0 (no average is kept) to below 1.
        weights: the average; None before the first round.
        rounds: rounds in it.
    """

    memory: float
    weights: Weights | None = None
    rounds: int = 0

    def updated(self, latest: Weights) -> "Average":
        """With one more round. While rounds are few all count alike, so that the first ones fade soon."""
        if not self.memory:
            return self
        share = 1.0 - min(self.memory, self.rounds / (self.rounds + 1))
        past = latest if self.weights is None else self.weights
        mixed = {
            name: np.asarray(past[name] + share * (value - past[name]), value.dtype) for name, value in latest.items()
        }
        return Average(self.memory, mixed, self.rounds + 1)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"weights": self.weights, "rounds": self.rounds}

    def restored(self, state: Mapping[str, Any] | None) -> "Average":
        """With the average of a checkpoint; it begins anew after one without (None) and stays empty at memory 0."""
        return Average(self.memory, **state) if state and self.memory else Average(self.memory)
