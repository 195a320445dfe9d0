"""SIGINT and SIGTERM as a wish to stop: the iteration is finished, a checkpoint written, then the program leaves."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopper:
    """Context in which the first signal sets `requested` and the second interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """128 plus the signal, as shells say it; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.signal = number
