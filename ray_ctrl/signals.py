"""SIGINT and SIGTERM: an interruption at once, or first a wish to stop, where what is under way should end whole."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from ray_ctrl.console import console

_STDERR = 2


class Interrupted(BaseException):
    """What a `Stopper` makes of a signal in the end; no KeyboardInterrupt, to which typer would give its own status.

    Args:
        signal: its number.
    """

    @property
    def exit_status(self) -> int:
        """128 plus the signal, as shells say it."""
        return 128 + int(self.args[0])


class Stopper:
    """Context in which a signal interrupts; within `patient` the first one only sets `requested`.

    Inside, an interruption is a KeyboardInterrupt, the only exception that ends Ray's blocking calls; it leaves the
    context as `Interrupted`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._promise: str | None = None
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
        if isinstance(error, KeyboardInterrupt) and self.signal is not None:
            raise Interrupted(self.signal) from None

    @contextmanager
    def patient(self, promise: str) -> Iterator[None]:
        """Lets what runs inside come to its own end after the first signal; it looks at `requested`.

        Args:
            promise: what the first signal is answered with, on stderr.
        """
        self._promise = promise
        try:
            yield
        finally:
            self._promise = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def obey(self) -> None:
        """Interrupts where a stop was requested, once what was to end whole has ended."""
        if self.requested:
            raise KeyboardInterrupt

    def _asked(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.requested, number
        if self._promise is None or not first:
            raise KeyboardInterrupt
        # A handler may run in the middle of anything, also of a print: no buffer may be touched here. Nor may it fail
        # where stderr is gone, as with a `tee` that the same Ctrl-C ended.
        with suppress(OSError):
            os.write(_STDERR, f"\n{self._promise}; once more to leave at once\n".encode())


@contextmanager
def telling(how: str) -> Iterator[None]:
    """Tells how to go on where what runs inside is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"stopped; {how}", markup=False)
        raise
