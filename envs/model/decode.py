"""Greedy decoding with one key/value cache per kept block, for rows under different plans.

Letters: B rows, R rows that keep a block, S slots along time, H heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.model.device_indices import DeviceIndices
from envs.model.experts import TopK
from envs.model.language import Block, Language, attend
from envs.model.prefill import Prefilled

CAPACITY_STEP = 16


@dataclass
class _BlockRows:
    """One block's cache (R, capacity, H, d) and the rows of the batch that keep the block, in order.

    `on_device` is `members` on the device, None where they are the complete batch.
    """

    members: list[int]
    keys: Tensor
    values: Tensor
    top_k: int | TopK = 0
    on_device: Tensor | None = None


class DecodeBatch:
    """Rows being decoded. Dropped blocks have no cache. Rows may be cut out (`keep`) and others appended (`extend`).

    Nothing here waits for the device: a step, `keep` and the start each send their indices in one copy.

    Args:
        parts: prefilled prompts, and which of their rows to take.
    """

    def __init__(self, language: Language, parts: Sequence[tuple[Prefilled, Sequence[int]]]) -> None:
        self.language = language
        rows = [(prefilled, row) for prefilled, wanted in parts for row in wanted]
        self.lengths = [prefilled.lengths[prefilled.prompts[row]] for prefilled, row in rows]
        self.top_k = [prefilled.top_k[row] for prefilled, row in rows]
        # Grown in steps, as most answers are far shorter than the limit.
        self.capacity = max(self.lengths) + CAPACITY_STEP
        kept = [[i for i, ks in enumerate(self.top_k) if ks[block]] for block in range(len(language.blocks))]
        sources = [_sources([rows[i] for i in members], block) for block, members in enumerate(kept)]
        indices = DeviceIndices(self.device)
        handles = [[(indices.add(s.targets), indices.add(s.places)) for s in found] for found in sources]
        indices.send()
        self.blocks: list[_BlockRows | None] = []
        for members, found, at in zip(kept, sources, handles, strict=True):
            copies = [(s, indices[targets], indices[places]) for s, (targets, places) in zip(found, at, strict=True)]
            keys = [(source.keys, targets, places) for source, targets, places in copies]
            values = [(source.values, targets, places) for source, targets, places in copies]
            count = len(members)
            self.blocks.append(
                _BlockRows(members, self._gather(keys, count), self._gather(values, count)) if members else None
            )
        self._index()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Device of the caches."""
        return self.language.wte.device

    def _gather(self, copies: Sequence[tuple[Tensor, Tensor, Tensor]], rows: int) -> Tensor:
        """Keys or values (R, capacity, H, d): of each source tensor, the rows at the given places to the targets."""
        first = copies[0][0]
        out = first.new_empty(rows, self.capacity, *first.shape[2:])
        # Zeros where nothing is copied, as a masked slot still counts if it is NaN.
        out[:, min(tensor.shape[1] for tensor, _, _ in copies) :] = 0
        for tensor, targets, places in copies:
            tokens = min(tensor.shape[1], self.capacity)
            out[targets, :tokens] = tensor[places, :tokens]
        return out

    def _index(self) -> None:
        """Index tensors that stay the same from step to step."""
        indices = DeviceIndices(self.device)
        handles = [
            (indices.add(block.members), indices.add([self.top_k[i][place] for i in block.members])) if block else None
            for place, block in enumerate(self.blocks)
        ]
        indices.send()
        for place, (block, handle) in enumerate(zip(self.blocks, handles, strict=True)):
            if block is None or handle is None:
                continue
            ks = [self.top_k[i][place] for i in block.members]
            block.on_device = None if len(ks) == len(self) else indices[handle[0]]
            block.top_k = ks[0] if len(set(ks)) == 1 else TopK(indices[handle[1]], max(ks), sum(ks))

    def step(self, token_ids: Sequence[int], experts: str = "auto") -> Tensor:
        """Feed one token per row; logits (B, vocabulary) of the next."""
        language, longest = self.language, max(self.lengths)
        if longest >= self.capacity:
            self._grow(self.capacity + CAPACITY_STEP + self.capacity // 8)
        indices = DeviceIndices(self.device)
        tokens, lengths, rows = indices.add(token_ids), indices.add(self.lengths), indices.add(range(len(self)))
        indices.send()
        lengths_B, rows_B = indices[lengths], indices[rows]
        # Rows of one length write to one slot and see all before it; others need a mask and a slot each.
        even = len(set(self.lengths)) == 1
        table = language.rope(longest + 1)
        rope = table[longest : longest + 1] if even else table[lengths_B].unsqueeze(1)
        slots_S = torch.arange(longest + 1, device=self.device)
        mask = None if even else (slots_S <= lengths_B[:, None])[:, None, None]
        x = language.embed(indices[tokens]).unsqueeze(1)
        for block, own in zip(language.blocks, self.blocks, strict=True):
            assert isinstance(block, Block)
            if own is None:
                continue
            part, lengths_R = _of(x, own.on_device), _of(lengths_B, own.on_device)
            query, key, value = block.project(part, rope if even else _of(rope, own.on_device))
            for cache, new in ((own.keys, key), (own.values, value)):
                if even:
                    cache[:, longest : longest + 1] = new
                else:
                    cache[rows_B[: len(cache)], lengths_R] = new.squeeze(1)
            seen = None if mask is None else _of(mask, own.on_device)
            mixed = attend(query, own.keys[:, : longest + 1], own.values[:, : longest + 1], seen)
            out = block.finish(part, mixed, own.top_k, experts)
            x = out if own.on_device is None else x.index_copy(0, own.on_device, out)
        self.lengths = [length + 1 for length in self.lengths]
        return language.next_logits(x.squeeze(1))

    def keep(self, rows: Sequence[int]) -> None:
        """Cut the batch down to `rows`, in that order."""
        kept = [[row for row in rows if block and row in block.members] for block in self.blocks]
        indices = DeviceIndices(self.device)
        handles = [
            indices.add([block.members.index(row) for row in stay]) if block else None
            for block, stay in zip(self.blocks, kept, strict=True)
        ]
        indices.send()
        for place, (block, stay, handle) in enumerate(zip(self.blocks, kept, handles, strict=True)):
            if block is None or handle is None or not stay:
                self.blocks[place] = None
                continue
            block.members = [i for i, row in enumerate(rows) if row in stay]
            block.keys, block.values = block.keys[indices[handle]], block.values[indices[handle]]
        self.lengths = [self.lengths[row] for row in rows]
        self.top_k = [self.top_k[row] for row in rows]
        self._index()

    def extend(self, other: "DecodeBatch") -> None:
        """Append the rows of `other`, which is used up."""
        offset = len(self)
        self.capacity = max(self.capacity, other.capacity)
        for place, (mine, theirs) in enumerate(zip(self.blocks, other.blocks, strict=True)):
            both = [block for block in (mine, theirs) if block is not None]
            if both:
                self.blocks[place] = _BlockRows(
                    [*(mine.members if mine else ()), *(offset + row for row in (theirs.members if theirs else ()))],
                    _stack([block.keys for block in both], self.capacity),
                    _stack([block.values for block in both], self.capacity),
                )
        self.lengths += other.lengths
        self.top_k += other.top_k
        self._index()

    def _grow(self, capacity: int) -> None:
        self.capacity = capacity
        for block in self.blocks:
            if block is not None:
                block.keys, block.values = _stack([block.keys], capacity), _stack([block.values], capacity)


@dataclass
class _Source:
    """Where some rows' cache in one block comes from: tensors of a prefill or of the prefix before it."""

    keys: Tensor
    values: Tensor
    targets: list[int]
    places: list[int]


def _sources(rows: Sequence[tuple[Prefilled, int]], block: int) -> list[_Source]:
    """Each row's cache in one block, grouped by the tensors that contain it."""
    found: dict[int, _Source] = {}
    for i, (prefilled, row) in enumerate(rows):
        keys, values, place = prefilled.cache(row, block)
        source = found.setdefault(id(keys), _Source(keys, values, [], []))
        source.targets.append(i)
        source.places.append(place)
    return list(found.values())


def _of(x: Tensor, members: Tensor | None) -> Tensor:
    return x if members is None else x[members]


def _stack(parts: Sequence[Tensor], capacity: int) -> Tensor:
    """Caches below each other, right-padded with zeros to `capacity` slots."""
    out = parts[0].new_zeros(sum(len(part) for part in parts), capacity, *parts[0].shape[2:])
    start = 0
    for part in parts:
        tokens = min(part.shape[1], capacity)
        out[start : start + len(part), :tokens] = part[:, :tokens]
        start += len(part)
    return out
