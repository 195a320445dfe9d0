"""Index lists from the host to the device in one copy, so that a pass over the model never waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class DeviceIndices:
    """Lists of whole numbers, known on the host, as views of one int64 tensor on the device.

    `torch.tensor(numbers, device="cuda")` copies from pageable memory, and waits until all queued work is done. A
    prefill needs dozens of such lists. Here all of them travel in one pinned buffer, asynchronously.

        indices = DeviceIndices(device)
        places = indices.add([3, 1])      # before `send`: a handle
        indices.send()
        x.index_select(0, indices[places])
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._numbers: list[int] = []
        self._sent: Tensor | None = None

    def add(self, numbers: Sequence[int]) -> slice:
        """Queue a list; its handle."""
        start = len(self._numbers)
        self._numbers.extend(numbers)
        return slice(start, len(self._numbers))

    def send(self) -> "DeviceIndices":
        """Copy what was queued to the device."""
        buffer = torch.tensor(self._numbers, dtype=torch.long, pin_memory=self.device.type == "cuda")
        self._sent = buffer.to(self.device, non_blocking=True)
        return self

    def __getitem__(self, handle: slice) -> Tensor:
        """The list behind a handle, on the device."""
        assert self._sent is not None, "send before use"
        return self._sent[handle]


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """One list on the device."""
    indices = DeviceIndices(device)
    handle = indices.add(numbers)
    return indices.send()[handle]
