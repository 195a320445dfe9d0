"""Calls held as CUDA graphs: a pass over one request is over before a host has launched its kernels one by one."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_STREAMS: dict[int, "torch.cuda.Stream"] = {}


def capture(work: Callable[[], Any], pool: Any = None) -> "torch.cuda.CUDAGraph":
    """A graph of `work`, which runs once before: to compile kernels and fill allocators, which a capture must not."""
    device = torch.cuda.current_device()
    # One stream for all, as libraries keep a workspace for every stream they meet.
    stream = _STREAMS.setdefault(device, torch.cuda.Stream())
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work()
        # Not `torch.cuda.graph`, which gives all unused memory back before every capture. Threads that prepare images
        # may allocate meanwhile.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


class Graphs:
    """One function at several sizes, each a CUDA graph over the same buffers; the least recently used is dropped.

    Args:
        call: `call(key, *inputs)` gives the outputs. Nothing in it may depend on the host but `key` and the size.
        inputs, outputs: buffers of the largest size along their first dimension.
        step: sizes are rounded up to a multiple of it, the rest of the inputs filled with zeros.
        most: graphs that are held; 0 calls the function each time, as on a CPU.
    """

    def __init__(
        self,
        call: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        step: int = 1,
        most: int = 1024,
    ) -> None:
        self.call, self.inputs, self.outputs, self.step, self.most = call, inputs, outputs, step, most
        self.captured = 0
        self._held: OrderedDict[tuple[Any, int], torch.cuda.CUDAGraph] = OrderedDict()
        # Replays follow each other on one stream and leave nothing but `outputs`: they may share their memory.
        self._pool = torch.cuda.graph_pool_handle() if most else None

    @property
    def largest(self) -> int:
        """The largest size that fits the buffers."""
        return len(self.inputs[0])

    def __call__(self, key: Any, *inputs: Tensor) -> list[Tensor]:
        """Outputs of the inputs, all of one first dimension, as new tensors."""
        count = len(inputs[0])
        size = min(self.largest, -(-count // self.step) * self.step)
        for buffer, given in zip(self.inputs, inputs, strict=True):
            buffer[:count].copy_(given, non_blocking=True)
            if size > count:
                buffer[count:size].zero_()
        if self.most:
            self._graph(key, size).replay()
        else:
            self._work(key, size)
        return [buffer[:count].clone() for buffer in self.outputs]

    def _graph(self, key: Any, size: int) -> "torch.cuda.CUDAGraph":
        if (key, size) not in self._held:
            self.captured += 1
            self._held[key, size] = capture(lambda: self._work(key, size), self._pool)
            if len(self._held) > self.most:
                self._held.popitem(last=False)
        self._held.move_to_end((key, size))
        return self._held[key, size]

    def _work(self, key: Any, size: int) -> None:
        results = self.call(key, *(buffer[:size] for buffer in self.inputs))
        for buffer, result in zip(self.outputs, results, strict=True):
            buffer[:size].copy_(result)
