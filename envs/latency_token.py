"""The frozen encoder from a budget to the latency token, one extra embedding appended after the prompt.

The budget is quantized to 16 logarithmic levels, so latency tokens can be cached; the controller receives the exact
budget as a separate feature. The model's first blocks mix this embedding of the budget with image and question.
"""

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.errors import UserError

LEVELS: Final = 16
LOG_RATIO_LOW: Final = math.log(1 / 8)
"""Log ratio of budget to reference latency at the middle of level 0: an eighth of the full plan's latency."""
LOG_RATIO_HIGH: Final = math.log(2)
"""The same for level 15: twice the full plan's latency."""
_WAVES: Final = 9
_WIDTH: Final = 0.25
"""Correlation length of the token over the range of levels, as a share of that range."""


def budget_level(log_ratio: float) -> int:
    """Level 0 to 15 of a budget: the nearest of 16 evenly spaced log ratios, clamped at both ends.

    Args:
        log_ratio: log(budget_ms / reference_ms).

    Raises:
        UserError: a ratio that is not finite (a budget of zero, NaN or infinity).
    """
    if not math.isfinite(log_ratio):
        raise UserError(f"log budget ratio {log_ratio!r} is not allowed: give a finite budget above 0 ms")
    place = (log_ratio - LOG_RATIO_LOW) / (LOG_RATIO_HIGH - LOG_RATIO_LOW)
    return min(max(round(place * (LEVELS - 1)), 0), LEVELS - 1)


def level_token(level: int, d_model: int, seed: int = 0, norm: float = 1.0) -> Tensor:
    """The latency token of one level: a frozen function of its arguments, smooth over levels.

    Args:
        level: 0 to 15.
        d_model: width of the model's embeddings.
        seed: seed of the encoder, part of the identity of every latency token.
        norm: Euclidean length of the token, usually the mean length of the model's word embeddings.

    Returns:
        (d_model,) float32 on CPU.

    Raises:
        UserError: a level outside 0 to 15, a width below 1 or a length that is not above 0.
    """
    if d_model < 1:
        raise UserError(f"latency token width {d_model!r} is not allowed: give the model's width, 1 or more")
    if not (math.isfinite(norm) and norm > 0):
        raise UserError(f"latency token length {norm!r} is not allowed: give a finite length above 0")
    direction_D = _directions(d_model, seed)[_checked(level)]
    return torch.from_numpy((direction_D * norm).astype(np.float32))


@lru_cache(maxsize=8)
def _directions(d_model: int, seed: int) -> npt.NDArray[np.float64]:
    """Unit vectors (16, d_model): each dimension is a random smooth curve over the levels.

    A sum of low-frequency waves with seeded amplitudes, in a fixed order, as the last bits of BLAS sums depend on the
    machine.
    """
    amplitudes = np.random.Generator(np.random.Philox(seed)).standard_normal((2, _WAVES, d_model))
    place_L = np.arange(LEVELS) / (LEVELS - 1)
    curves = np.zeros((LEVELS, d_model))
    for wave in range(_WAVES):
        angle_L1 = (math.pi * wave * place_L)[:, None]
        weight = math.exp(-0.25 * (math.pi * wave * _WIDTH) ** 2)
        curves += weight * (np.cos(angle_L1) * amplitudes[0, wave] + np.sin(angle_L1) * amplitudes[1, wave])
    unit: npt.NDArray[np.float64] = curves / np.sqrt((curves**2).sum(axis=1, keepdims=True))
    return unit


def _checked(level: int) -> int:
    if not 0 <= level < LEVELS:
        raise UserError(f"budget level {level!r} is not allowed: levels are 0 to {LEVELS - 1}")
    return int(level)
