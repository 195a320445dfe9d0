"""SIGINT, SIGTERM and SIGHUP: they interrupt, or first request a stop while something is best completed."""

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
    """What a `Stopper` turns a signal into; no KeyboardInterrupt, to which typer would give its own exit status.

    Args:
        signal: its number.
    """

    @property
    def exit_status(self) -> int:
        """128 plus the signal, the shells' convention."""
        return 128 + int(self.args[0])


class Stopper:
    """Context in which a signal interrupts; within `defer_interrupt` the first one only sets `requested`.

    Inside, an interruption is a KeyboardInterrupt, the only exception that ends Ray's blocking calls; it leaves the
    context as `Interrupted`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._promise: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt) and self.signal is not None:
            raise Interrupted(self.signal) from None

    @contextmanager
    def defer_interrupt(self, promise: str) -> Iterator[None]:
        """Defers the first signal to the end of the block, which looks at `requested`.

        Args:
            promise: printed to stderr on the first signal.
        """
        self._promise = promise
        try:
            yield
        finally:
            self._promise = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def raise_if_interrupted(self) -> None:
        """Interrupts if a stop was requested in a `defer_interrupt` block."""
        if self.requested:
            raise KeyboardInterrupt

    def _received(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.requested, number
        if self._promise is None or not first:
            raise KeyboardInterrupt
        # A handler may run in the middle of anything, also of a print: it must not touch a buffer. Nor may it fail if
        # stderr is closed, as with a `tee` that the same Ctrl-C ended.
        with suppress(OSError):
            os.write(_STDERR, f"\n{self._promise}; once more to leave immediately\n".encode())


@contextmanager
def hint_on_interrupt(how: str) -> Iterator[None]:
    """Prints how to continue if the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"stopped; {how}")
        raise
