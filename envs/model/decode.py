"""Greedy decoding with one key/value cache per kept block, for rows under different plans.

Letters: B rows, R rows that keep a block, S slots along time, H heads, d head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from envs.model.experts import spread_top_k
from envs.model.language import Block, Language, Prefilled, attend

ROOM_STEP = 16


class DecodeBatch:
    """Rows being decoded. Dropped blocks hold no cache. Rows may be cut out (`keep`) and others appended (`extend`).

    Args:
        language: the model's language part.
        parts: prefilled prompts, and which of their rows to take.
    """

    def __init__(self, language: Language, parts: Sequence[tuple[Prefilled, Sequence[int]]]) -> None:
        self.language = language
        chosen = [(prefilled, row) for prefilled, rows in parts for row in rows]
        self.lengths = [prefilled.lengths[prefilled.prompts[row]] for prefilled, row in chosen]
        self.top_k = [prefilled.top_k[row] for prefilled, row in chosen]
        # Grown in steps, as most answers are far shorter than the limit.
        self.capacity = max(self.lengths) + ROOM_STEP
        self.keys: list[Tensor | None] = []
        self.values: list[Tensor | None] = []
        self.members: list[list[int]] = []
        for block in range(len(language.blocks)):
            members = [i for i, (prefilled, row) in enumerate(chosen) if prefilled.top_k[row][block]]
            self.members.append(members)
            kept = [chosen[i] for i in members]
            self.keys.append(self._gather(kept, block, "keys"))
            self.values.append(self._gather(kept, block, "values"))
        self._index()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def cached_blocks(self) -> list[int]:
        """For each row, how many blocks hold a cache."""
        return [sum(row in members for members in self.members) for row in range(len(self))]

    def _gather(self, rows: Sequence[tuple[Prefilled, int]], block: int, part: str) -> Tensor | None:
        """Keys or values (R, capacity, H, d) of `rows` in one block, each from its prefill or the prefix before it."""
        if not rows:
            return None
        sources: dict[int, tuple[Tensor, list[int], list[int]]] = {}
        for i, (prefilled, row) in enumerate(rows):
            cache = prefilled.caches[block]
            if cache is not None and cache.places[row] >= 0:
                tensor, place = getattr(cache, part), cache.places[row]
            else:
                tensor, place = getattr(prefilled.prefix, part)[block], prefilled.prompts[row]
            _, targets, places = sources.setdefault(id(tensor), (tensor, [], []))
            targets.append(i)
            places.append(place)
        first = next(iter(sources.values()))[0]
        out = first.new_empty(len(rows), self.capacity, *first.shape[2:])
        # Zeros where nothing is copied, as a masked slot still counts if it holds NaN.
        out[:, min(tensor.shape[1] for tensor, _, _ in sources.values()) :] = 0
        for tensor, targets, places in sources.values():
            tokens = min(tensor.shape[1], self.capacity)
            if len(rows) == 1:
                out[:, :tokens] = tensor[places[0] : places[0] + 1, :tokens]
            else:
                where = torch.tensor(targets, device=out.device)
                out[where, :tokens] = tensor[torch.tensor(places, device=out.device), :tokens]
        return out

    def _index(self) -> None:
        """Index tensors that stay the same from step to step."""
        device = self.language.wte.device
        everyone = list(range(len(self)))
        self._members = [
            None if members == everyone else torch.tensor(members, device=device) for members in self.members
        ]
        self._block_top_k = [
            spread_top_k([self.top_k[i][block] for i in members], None, 1, device) if members else 0
            for block, members in enumerate(self.members)
        ]

    def step(self, token_ids: Sequence[int], experts: str = "auto") -> Tensor:
        """Feed one token per row; logits (B, vocabulary) of the next."""
        language, device = self.language, self.language.wte.device
        if max(self.lengths) >= self.capacity:
            self._grow(self.capacity + ROOM_STEP + self.capacity // 8)
        even = len(set(self.lengths)) == 1
        longest = max(self.lengths)
        lengths_B = torch.tensor(self.lengths, device=device)
        table = language.rope(longest + 1)
        rope = table[longest : longest + 1] if even else table[lengths_B].unsqueeze(1)
        mask = None if even else (torch.arange(longest + 1, device=device) <= lengths_B[:, None])[:, None, None]
        x = language.embed(torch.tensor(token_ids, device=device)).unsqueeze(1)
        for index, block in enumerate(language.blocks):
            assert isinstance(block, Block)
            keys, values, members = self.keys[index], self.values[index], self._members[index]
            if keys is None or values is None:
                continue
            part = x if members is None else x[members]
            query, key, value = block.project(part, rope if even or members is None else rope[members])
            if even:
                keys[:, longest : longest + 1] = key
                values[:, longest : longest + 1] = value
            else:
                rows = torch.arange(len(keys), device=device)
                where = lengths_B if members is None else lengths_B[members]
                keys[rows, where] = key.squeeze(1)
                values[rows, where] = value.squeeze(1)
            seen = None if mask is None else (mask if members is None else mask[members])
            mixed = attend(query, keys[:, : longest + 1], values[:, : longest + 1], seen)
            out = block.finish(part, mixed, self._block_top_k[index], experts)
            x = out if members is None else x.index_copy(0, members, out)
        self.lengths = [length + 1 for length in self.lengths]
        return language.logits(language.final_norm(x.squeeze(1)))

    def keep(self, rows: Sequence[int]) -> None:
        """Cut the batch down to `rows`, in that order."""
        for block, members in enumerate(self.members):
            place = {row: i for i, row in enumerate(members)}
            kept = [place[row] for row in rows if row in place]
            self.members[block] = [i for i, row in enumerate(rows) if row in place]
            keys, values = self.keys[block], self.values[block]
            if not kept or keys is None or values is None:
                self.keys[block] = self.values[block] = None
                continue
            index = torch.tensor(kept, device=keys.device)
            self.keys[block], self.values[block] = keys[index], values[index]
        self.lengths = [self.lengths[row] for row in rows]
        self.top_k = [self.top_k[row] for row in rows]
        self._index()

    def _grow(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys = [_stack(keys, None, capacity) for keys in self.keys]
        self.values = [_stack(values, None, capacity) for values in self.values]

    def extend(self, other: "DecodeBatch") -> None:
        """Append the rows of `other`, which is used up."""
        offset = len(self)
        self.capacity = max(self.capacity, other.capacity)
        for block in range(len(self.members)):
            self.keys[block] = _stack(self.keys[block], other.keys[block], self.capacity)
            self.values[block] = _stack(self.values[block], other.values[block], self.capacity)
            self.members[block] = [*self.members[block], *(offset + row for row in other.members[block])]
        self.lengths += other.lengths
        self.top_k += other.top_k
        self._index()


def _stack(mine: Tensor | None, theirs: Tensor | None, capacity: int) -> Tensor | None:
    parts = [part for part in (mine, theirs) if part is not None]
    if not parts:
        return None
    out = parts[0].new_zeros(sum(len(part) for part in parts), capacity, *parts[0].shape[2:])
    start = 0
    for part in parts:
        tokens = min(part.shape[1], capacity)
        out[start : start + len(part), :tokens] = part[:, :tokens]
        start += len(part)
    return out
