"""A least-recently-used map bounded in bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Bounded(Generic[K, V]):
    """Holds values up to `limit` bytes in sum, dropping those not used for longest; none larger than the limit.

    Args:
        limit: bytes, 0 to keep nothing.
        size: bytes of a value.
    """

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self.limit = limit
        self.bytes = 0
        self._size = size
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: K) -> bool:
        return key in self._held

    def get(self, key: K) -> V | None:
        """The value, now the most recently used, or None."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: K, value: V) -> None:
        """Keep `value`, replacing any before it under `key`."""
        if key in self._held:
            self.bytes -= self._held.pop(key)[1]
        size = self._size(value)
        if size > self.limit:
            return
        self._held[key] = (value, size)
        self.bytes += size
        while self.bytes > self.limit:
            self.bytes -= self._held.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self.bytes = 0
