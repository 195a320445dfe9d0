"""Work done by threads before it is asked for, in the order in which it will be."""

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")
_MOST_THREADS = 8


class LookAhead(Generic[K, T, R]):
    """Calls `work` on what is expected, ahead of `take`; on anything else when it is taken.

    Args:
        work: safe to call from several threads.
        ahead: sizes of what is done or being done and not yet taken, in sum; a single item may exceed it.
        threads: 0 to do everything when it is taken.
    """

    def __init__(self, work: Callable[[T], R], ahead: int, threads: int | None = None) -> None:
        self.work, self.ahead = work, ahead
        self._threads = min(_MOST_THREADS, os.cpu_count() or 1) if threads is None else threads
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[K, T, int]] = deque()
        self._running: dict[K, tuple[Future[R], int]] = {}

    def expect(self, items: Iterable[tuple[K, T, int]]) -> None:
        """Keys, items and sizes that will be taken next, in this order; forgets what was expected before."""
        for future, _ in self._running.values():
            future.cancel()
        self._running.clear()
        self._waiting = deque(items) if self._threads else deque()
        self._start()

    def take(self, key: K, item: T) -> R:
        """The result for an item, with the exception that `work` raised, if it did."""
        running = self._running.pop(key, None)
        if running is None:
            return self.work(item)
        self._start()
        return running[0].result()

    def _start(self) -> None:
        held = sum(size for _, size in self._running.values())
        while self._waiting and (not self._running or held + self._waiting[0][2] <= self.ahead):
            key, item, size = self._waiting.popleft()
            if key in self._running:
                continue
            # Each thread works alone: libraries that split its work again would only crowd the cores.
            self._pool = self._pool or ThreadPoolExecutor(
                self._threads, "prepare", initializer=torch.set_num_threads, initargs=(1,)
            )
            self._running[key] = self._pool.submit(self.work, item), size
            held += size
