"""Noticing that a device no longer behaves as it was profiled: throttled, busy, or changed."""

from collections import deque
from typing import Final

import numpy as np

from envs.errors import UserError
from envs.latency.profiled import ProfiledClock

_TAIL: Final = 0.02


class DriftWatch:
    """Watches served requests against the profile they were planned with.

    Args:
        clock: the profile.
        window: latest requests looked at, 8 or more.
    """

    def __init__(self, clock: ProfiledClock, window: int = 20) -> None:
        if window < 8:
            raise UserError(f"a window of {window} requests is too short to tell drift from noise: give 8 or more")
        self._low, self._high = clock.quantile(_TAIL), clock.quantile(1.0 - _TAIL)
        self._device = clock.table.identity.device
        self._ratios: deque[float] = deque(maxlen=window)

    def add(self, predicted_ms: float, measured_ms: float) -> str | None:
        """Take one request; returns a warning once the window's median lies outside the profile's spread, else None."""
        self._ratios.append(measured_ms / predicted_ms)
        if len(self._ratios) < (self._ratios.maxlen or 0):
            return None
        middle = float(np.median(self._ratios))
        if self._low <= middle <= self._high:
            return None
        return (
            f"the last {len(self._ratios)} requests took {middle:.2f} times what the profile of {self._device} says "
            f"(its spread is {self._low:.2f} to {self._high:.2f}): measure the device again with `ray-ctrl profile`"
        )
