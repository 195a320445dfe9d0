"""Greedy decoding of one row at a fixed size: nothing in a step depends on the host, as CUDA graphs require.

Position, token and experts per block are on the device. A graph is captured for each set of kept blocks, whatever the
experts per block: five serve every plan of one importance. The same step in torch operators runs anywhere.
Letters: C slots of the cache, D model width, H heads, d head width.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from envs.errors import UserError
from envs.knobs import MODEL_BLOCKS
from envs.model.execution_tree import FULL_TOP_K
from envs.model.experts import TopK
from envs.model.graphs import capture
from envs.model.language import Block, Language, attend
from envs.model.prefill import Prefilled

if TYPE_CHECKING:
    from envs.model.kernels.decode_step import Tuning

# The longest prompt with images has 1,525 tokens; the rest is for a long question and the answer.
CAPACITY = 2176


class Cell:
    """What a step reads and changes: caches (blocks, C, D), this token and its position, what came out so far."""

    def __init__(self, language: Language, capacity: int, max_tokens: int) -> None:
        config, device, dtype = language.config, language.wte.device, language.wte.dtype

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Zeros, as a masked slot still counts if it is NaN.
        self.keys = zeros(config.n_layers, capacity, config.d_model, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.rotations = language.rope(capacity)[:capacity]
        self.rope = torch.view_as_real(self.rotations).reshape(capacity, -1, 2).contiguous()
        self.places = torch.arange(capacity, device=device)
        self.top_k = zeros(config.n_layers, dtype=torch.int32)
        self.token, self.position, self.count = zeros(1), zeros(1), zeros(1)
        self.finished = zeros(1, dtype=torch.int32)
        # One id more than asked for, as the end is seen one step late.
        self.ids = zeros(max_tokens + 2)
        self.logits = zeros(config.embedding_size, dtype=torch.float32)


def plain_step(language: Language, cell: Cell, kept: Sequence[int]) -> None:
    """One step through the blocks `kept` in torch operators, traceable as one graph; it changes `cell`."""
    config = language.config
    x_11D = language.embed(cell.token).unsqueeze(1)
    rope = cell.rotations.index_select(0, cell.position)
    mask = (cell.places <= cell.position)[None, None, None]
    for index in kept:
        block = language.blocks[index]
        assert isinstance(block, Block)
        query, key, value = block.project(x_11D, rope)
        cached = []
        for cache, new in ((cell.keys[index], key), (cell.values[index], value)):
            cache.index_copy_(0, cell.position, new.reshape(1, -1))
            cached.append(cache.view(1, -1, config.n_heads, config.head_dim))
        mixed = attend(query, cached[0], cached[1], mask)
        top_k = TopK(cell.top_k[index : index + 1], FULL_TOP_K, FULL_TOP_K)
        x_11D = block.finish(x_11D, mixed, top_k, "dense")
    logits = language.next_logits(x_11D.view(1, -1))
    cell.logits.copy_(logits[0])
    cell.token.copy_(logits.argmax(-1))
    cell.ids.index_copy_(0, cell.count, cell.token)
    cell.finished.copy_(cell.finished | (cell.token == config.eos_token_id))
    cell.position.add_(1)
    cell.count.add_(1)


def kernels_usable(language: Language) -> bool:
    """Whether the fused kernels run on these weights: on CUDA with Triton, in a dtype that they sum in float32."""
    return language.wte.is_cuda and importlib.util.find_spec("triton") is not None


class StaticDecoder:
    """Decodes one row at a time. Buffers and graphs are kept for the next.

    Args:
        language: the model's language part; its weights must stay where they are.
        capacity: tokens of prompt and answer together.
        max_tokens: tokens of an answer at most.
        kernels: use the fused kernels; where they run, if not said.
        graphs: sets of kept blocks whose CUDA graph is held; 0 launches each step anew.
        tuning: tile sizes of the kernels.
    """

    def __init__(
        self,
        language: Language,
        capacity: int = CAPACITY,
        max_tokens: int = CAPACITY,
        kernels: bool | None = None,
        graphs: int = 8,
        tuning: "Tuning | None" = None,
    ) -> None:
        self.language, self.capacity, self.max_tokens = language, capacity, max_tokens
        cuda = language.wte.is_cuda
        self.cell = Cell(language, capacity, max_tokens)
        self._step = None
        if kernels_usable(language) if kernels is None else kernels:
            from envs.model.kernels.decode_step import KernelStep  # Needs Triton.

            self._step = KernelStep(language, self.cell, tuning)
        self._most_graphs = graphs if cuda else 0
        self.captured = 0
        self._graphs: OrderedDict[tuple[int, ...], torch.cuda.CUDAGraph] = OrderedDict()
        self._kept: tuple[int, ...] = ()
        self._flags = torch.zeros(2, 1, dtype=torch.int32, pin_memory=cuda)
        self._host_top_k = torch.zeros(MODEL_BLOCKS, dtype=torch.int32, pin_memory=cuda)
        self._events = [torch.cuda.Event() for _ in range(2)] if cuda else []

    @torch.inference_mode()
    def start(self, prefilled: Prefilled, row: int, token: int) -> None:
        """Take over a prefilled row; `token` is the first of its answer, to be fed next.

        Raises:
            UserError: the prompt does not fit the cache.
        """
        prompt = prefilled.prompts[row]
        length, top_k = prefilled.lengths[prompt], prefilled.top_k[row]
        if length >= self.capacity:
            raise UserError(
                f"a prompt of {length} tokens does not fit a cache of {self.capacity}: give a shorter prompt"
            )
        self.prepare(top_k)
        found = [prefilled.cache(row, index) for index in self._kept]
        sources = [part[place, :length].flatten(1) for keys, values, place in found for part in (keys, values)]
        targets = [cache[index, :length] for index in self._kept for cache in (self.cell.keys, self.cell.values)]
        torch._foreach_copy_(targets, sources)
        self.place(token, length)

    def prepare(self, top_k: Sequence[int]) -> None:
        """Choose the experts per token in each block (0: dropped), capturing the kept set's graph where it is new."""
        self._kept = tuple(index for index, k in enumerate(top_k) if k)
        # Set before a capture, which runs steps to warm up.
        self._host_top_k.copy_(torch.tensor(top_k, dtype=torch.int32))
        self.cell.top_k.copy_(self._host_top_k, non_blocking=True)
        if self._most_graphs and self._kept not in self._graphs:
            self.place(0, 0)
            self._graphs[self._kept] = capture(self._eager)
            self.captured += 1
            while len(self._graphs) > self._most_graphs:
                self._graphs.popitem(last=False)
        if self._most_graphs:
            self._graphs.move_to_end(self._kept)

    def place(self, token: int, position: int) -> None:
        """Feed `token` at `position` next, and forget what came out before."""
        cell = self.cell
        for tensor, value in ((cell.token, token), (cell.position, position), (cell.count, 0), (cell.finished, 0)):
            tensor.fill_(value)

    @torch.inference_mode()
    def step(self) -> None:
        """Queue one step; its logits and id appear in `cell` when the device gets there."""
        if self._most_graphs:
            self._graphs[self._kept].replay()
        else:
            self._eager()

    def _eager(self) -> None:
        if self._step is None:
            plain_step(self.language, self.cell, self._kept)
        else:
            self._step(self._kept)

    @torch.inference_mode()
    def decode(self, prefilled: Prefilled, row: int, token: int, limit: int, stop_at_eos: bool = True) -> list[int]:
        """Ids that follow `token`: at most `limit`, up to but without the end of text.

        The host looks for the end one step late, so that the device never waits for it.
        """
        length = prefilled.lengths[prefilled.prompts[row]]
        if not 0 <= limit <= self.max_tokens or length + limit + 1 > self.capacity:
            raise UserError(
                f"{limit} new tokens behind {length} do not fit: allowed are {self.max_tokens}, {self.capacity} in all"
            )
        self.start(prefilled, row, token)
        for index in range(limit):
            self.step()
            if stop_at_eos and self._ended(index):
                break
        ids: list[int] = self.cell.ids[:limit].tolist()
        eos = self.language.config.eos_token_id
        return ids[: ids.index(eos)] if stop_at_eos and eos in ids[: index + 1 if limit else 0] else ids

    def _ended(self, index: int) -> bool:
        """Whether the step before step `index` gave the end of text; on a CPU, whether this one did."""
        if not self._events:
            return bool(self.cell.finished)
        self._flags[index % 2].copy_(self.cell.finished, non_blocking=True)
        self._events[index % 2].record()
        if not index:
            return False
        self._events[(index - 1) % 2].synchronize()
        return bool(self._flags[(index - 1) % 2])
