"""SIGINT and SIGTERM: an interruption at once, or first a wish to stop, where what is under way should end whole."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_STDERR = 2


class Interrupted(BaseException):
    """SIGINT or SIGTERM, with the exit status that shells give it.

    No KeyboardInterrupt, which libraries on the way turn into exits of their own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class Stopper:
    """Context in which a signal raises `Interrupted`; within `patient` the first one only sets `requested`."""

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
        """Raises `Interrupted` where a stop was requested, once what was to end whole has ended."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._promise is None or self.requested:
            raise Interrupted(number)
        self.signal = number
        # A handler may run in the middle of anything, also of a print: no buffer may be touched here.
        os.write(_STDERR, f"\n{self._promise}; once more to leave at once\n".encode())
