"""Prefill: prompts under many plans, up to the state that gives the first new token. Nothing is computed twice.

The host builds the execution tree and sends every index it implies to the device in one copy; after that the passes
over blocks follow each other without waiting. Letters: B prompts, R nodes a block runs on, T tokens, D width, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from envs.model.device_indices import DeviceIndices
from envs.model.execution_tree import Level, Node, build_execution_tree, entry_block, last_block
from envs.model.experts import TopK, expand_top_k

if TYPE_CHECKING:
    from envs.model.language import Language


@dataclass(frozen=True)
class BlockCache:
    """Keys and values (R, T, H, d) of one block for the nodes that ran it, and each row's place (-1: none)."""

    keys: Tensor
    values: Tensor
    places: tuple[int, ...]


@dataclass(frozen=True)
class Prefix:
    """Blocks 1..n run on prompts at full top-k: `hidden[i]` (B, T, D) after i blocks, keys and values of each block."""

    hidden: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Blocks run."""
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """Padded length."""
        return int(self.hidden[0].shape[1])

    def mapped(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...]) -> "Prefix":
        """With `change` applied to each tensor, which leaves prompts of these lengths."""
        hidden, keys, values = (tuple(map(change, part)) for part in (self.hidden, self.keys, self.values))
        return Prefix(hidden, keys, values, lengths)


@dataclass(frozen=True)
class Prefilled:
    """What decoding starts from: each row's last hidden state (rows, D) before the final norm, caches, prompt lengths.

    `caches[b]` is None where no row ran block b after the prefix; rows that took it from the prefix find it there.
    """

    last: Tensor
    caches: tuple[BlockCache | None, ...]
    prefix: Prefix | None
    prompts: tuple[int, ...]
    lengths: tuple[int, ...]
    top_k: tuple[tuple[int, ...], ...]

    def cache(self, row: int, block: int) -> tuple[Tensor, Tensor, int]:
        """Tensors with the keys and values of a row in one block, and its place in them."""
        cache = self.caches[block]
        if cache is not None and cache.places[row] >= 0:
            return cache.keys, cache.values, cache.places[row]
        assert self.prefix is not None
        return self.prefix.keys[block], self.prefix.values[block], self.prompts[row]


@dataclass(frozen=True)
class _Handles:
    """Index lists of one level in `DeviceIndices`. None stands for "all of them in order"."""

    enter: slice | None
    run: slice | None
    final: slice | None
    skip: slice | None
    run_top_k: slice
    run_lengths: slice
    final_top_k: slice
    final_lengths: slice
    final_last: slice
    ended: slice
    ended_tokens: slice
    finished: slice
    finished_nodes: slice


class PrefillRun:
    """One prefill: the tree, its indices on the device, and what has been computed so far.

    `states` (nodes, T, D) is the input of the next block, in the order that `Level` states; `last` (rows, D) fills
    up as rows reach the last block they keep.
    """

    def __init__(
        self,
        language: "Language",
        inputs: Sequence[Tensor],
        lengths: tuple[int, ...],
        prompts: tuple[int, ...],
        top_k: tuple[tuple[int, ...], ...],
        experts: str,
    ) -> None:
        """`inputs[i]` (B, T, D) is every prompt's state after i blocks at full top-k; the first is its embedding."""
        self.language, self.inputs, self.lengths, self.experts = language, inputs, lengths, experts
        self.prompts, self.top_k = prompts, top_k
        self.tokens, width = inputs[0].shape[1:]
        self.given = len(inputs) - 1
        self.levels = build_execution_tree(prompts, top_k, self.given)
        self.states: Tensor | None = None
        self.last = inputs[0].new_empty(len(top_k), width)
        self.indices = DeviceIndices(inputs[0].device)
        within = [(row, last_block(ks) + 1) for row, ks in enumerate(top_k)]
        within = [(row, depth) for row, depth in within if entry_block(top_k[row], self.given) >= depth]
        self.within = {
            depth: (self.indices.add(rows), self.indices.add([self._last_token(prompts[r], prompts[r]) for r in rows]))
            for depth in sorted({depth for _, depth in within})
            if (rows := [row for row, at in within if at == depth])
        }
        held, self.handles = 0, []
        for level in self.levels:
            held += len(level.enter)
            self.handles.append(self._queue(level, held))
            held = len(level.run) + len(level.skip)
        self.indices.send()

    def run(self) -> tuple[BlockCache | None, ...]:
        """All blocks; their caches. Fills `last`."""
        # Rows that keep some of the given blocks and nothing after them are done already.
        for depth, (rows, places) in self.within.items():
            self._write_last(rows, self.inputs[depth], places)
        return tuple(self._block(index) for index in range(len(self.levels)))

    def _block(self, index: int) -> BlockCache | None:
        level, at = self.levels[index], self.handles[index]
        if level.enter:
            entering = self._take(self.inputs[index], at.enter)
            self.states = _join([self.states, entering])
        if not (level.run or level.final):
            return None
        assert self.states is not None
        ran = final = None
        if level.run:
            ran = self._run(index)
            self._write_last(at.ended, ran[0], at.ended_tokens)
        if level.final:
            final = self._run_last(index)
            self._write_last(at.finished, final[0], at.finished_nodes)
        skipped = self._take(self.states, at.skip) if level.skip else None
        self.states = _join([ran and ran[0], skipped]) if ran or level.skip else None
        computed = [part for part in (ran, final) if part is not None]
        keys, values = (_join([part[i] for part in computed]) for i in (1, 2))
        return BlockCache(keys, values, level.row_nodes)

    def _run(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Output (R, T, D), keys and values of the nodes that continue."""
        level, at = self.levels[index], self.handles[index]
        assert self.states is not None
        on_device = (self.indices[at.run_top_k], self.indices[at.run_lengths])
        top_k = expand_top_k(
            _last_top_k(level.run), self._lengths(level.run), self.tokens, self.states.device, on_device
        )
        rope = self.language.rope(self.tokens)[: self.tokens]
        out, key, value = self.language.blocks[index](self._take(self.states, at.run), rope, None, top_k, self.experts)
        return out, _own(key), _own(value)

    def _run_last(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Output at the last token (R, 1, D), keys and values of the nodes that end here."""
        level, at = self.levels[index], self.handles[index]
        assert self.states is not None
        source = self._take(self.states, at.final)
        table = self.language.rope(self.tokens)
        if all(length == self.tokens for length in self._lengths(level.final)):
            mask, last, last_rope = None, source[:, -1:], table[self.tokens - 1 : self.tokens]
        else:
            lengths_R = self.indices[at.final_lengths]
            mask = (torch.arange(self.tokens, device=source.device) < lengths_R.unsqueeze(1))[:, None, None]
            last = source.flatten(0, 1).index_select(0, self.indices[at.final_last]).unsqueeze(1)
            last_rope = table[lengths_R - 1].unsqueeze(1)
        ks = _last_top_k(level.final)
        top_k = ks[0] if len(set(ks)) == 1 else TopK(self.indices[at.final_top_k], max(ks), sum(ks))
        block: Any = self.language.blocks[index]
        out, key, value = block.forward_last(source, last, table[: self.tokens], last_rope, mask, top_k, self.experts)
        return out, _own(key), _own(value)

    def _write_last(self, rows: slice, states_RTD: Tensor, tokens: slice) -> None:
        """Token `tokens` (flat over R and T) of `states` is the last hidden state of `rows`."""
        if rows.start < rows.stop:
            found = states_RTD.flatten(0, 1).index_select(0, self.indices[tokens])
            self.last.index_copy_(0, self.indices[rows], found)

    def _queue(self, level: Level, held: int) -> _Handles:
        add, nodes, runs = self.indices.add, (*level.run, *level.final), len(level.run)
        ended = [row for row in level.ending if level.row_nodes[row] < runs]
        finished = [row for row in level.ending if level.row_nodes[row] >= runs]
        return _Handles(
            enter=self._places(level.enter, len(self.inputs[0])),
            run=self._places(level.sources[:runs], held),
            final=self._places(level.sources[runs : len(nodes)], held),
            skip=self._places(level.sources[len(nodes) :], held),
            run_top_k=add(_last_top_k(level.run)),
            run_lengths=add(self._lengths(level.run)),
            final_top_k=add(_last_top_k(level.final)),
            final_lengths=add(self._lengths(level.final)),
            final_last=add([self._last_token(place, node[0]) for place, node in enumerate(level.final)]),
            ended=add(ended),
            ended_tokens=add([self._last_token(level.row_nodes[row], self.prompts[row]) for row in ended]),
            finished=add(finished),
            finished_nodes=add([level.row_nodes[row] - runs for row in finished]),
        )

    def _places(self, places: Sequence[int], held: int) -> slice | None:
        return None if tuple(places) == tuple(range(held)) else self.indices.add(places)

    def _take(self, x: Tensor, places: slice | None) -> Tensor:
        return x if places is None else x.index_select(0, self.indices[places])

    def _last_token(self, place: int, prompt: int) -> int:
        return place * self.tokens + self.lengths[prompt] - 1

    def _lengths(self, nodes: Sequence[Node]) -> list[int]:
        return [self.lengths[prompt] for prompt, _ in nodes]


def _last_top_k(nodes: Sequence[Node]) -> list[int]:
    """Experts per token of each node in its last block."""
    return [top_k[-1] for _, top_k in nodes]


def _own(part: Tensor) -> Tensor:
    """A cache that does not keep the projections alive of which it is a view; a single prompt is not worth the copy."""
    return part if len(part) == 1 else part.contiguous()


def _join(parts: Sequence[Tensor | None]) -> Tensor:
    present = [part for part in parts if part is not None]
    return present[0] if len(present) == 1 else torch.cat(present)
