"""The budget as the controller sees it: one log ratio, spread over a 256-wide sinusoidal encoding."""

import math
from typing import Final

import torch
from torch import Tensor

BUDGET_WIDTH: Final = 256
# Wavelengths in units of the log ratio. From the cheapest plan to the dearest a device's budgets span about one e-fold:
# the shortest wave tells budgets a few percent apart, the longest covers whatever a user may ask for.
SHORTEST_WAVE: Final = 0.75
LONGEST_WAVE: Final = 8.0


def budget_feature(log_ratio: Tensor) -> Tensor:
    """Sinusoidal encoding of a budget.

    Args:
        log_ratio: (B,) or (B, 1), log(budget / latency of the full plan on this device's reference request).

    Returns:
        (B, 256) float: 128 sines, then 128 cosines, wavelengths in geometric steps (Vaswani et al. 2017, 3.5).
    """
    ratio_B = log_ratio.reshape(log_ratio.shape[0], -1)[:, 0].to(torch.float32)
    half = BUDGET_WIDTH // 2
    exponents = torch.linspace(0.0, 1.0, half, device=ratio_B.device)
    waves = SHORTEST_WAVE * (LONGEST_WAVE / SHORTEST_WAVE) ** exponents
    angles = ratio_B[:, None] * (2.0 * math.pi / waves)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
