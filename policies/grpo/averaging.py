"""The running average of the controller's weights over rounds: what is evaluated and exported."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = Mapping[str, npt.NDArray[Any]]


def averaged(past: Weights | None, fresh: Weights, rounds: int, memory: float) -> dict[str, npt.NDArray[Any]]:
    """The average after one more round (Polyak and Juditsky 1992; exponential, as Tarvainen and Valpola 2017).

    Prices and policy chase each other: single rounds overrun the target or fall short of it. Their average lies
    between, with the same accuracy.

    Args:
        past: average over the rounds before; None before the first.
        fresh: weights after this round.
        rounds: rounds averaged before this one. While they are few all count alike, so that the start fades soon.
        memory: weight of the past, 0 (none) to below 1.
    """
    if past is None or not memory:
        return {name: np.array(value) for name, value in fresh.items()}
    share = 1.0 - min(memory, rounds / (rounds + 1))
    return {name: np.asarray(past[name] + share * (value - past[name]), value.dtype) for name, value in fresh.items()}
