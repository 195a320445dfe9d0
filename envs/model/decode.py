"""Greedy decoding with one key/value cache per kept block, for rows under different plans.

Letters: B rows, R rows that keep a block, S slots along time, H heads, d head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from envs.model.experts import spread_top_k
from envs.model.language import Block, Language, Prefilled, attend


class DecodeBatch:
    """Rows being decoded. Dropped blocks hold no cache. Rows may be cut out (`keep`) and others appended (`extend`).

    Args:
        language: the model's language part.
        prefilled: prompts after prefill.
        rows: which of its rows to take.
        room: new tokens to hold at most.
    """

    def __init__(self, language: Language, prefilled: Prefilled, rows: Sequence[int], room: int) -> None:
        self.language = language
        self.lengths = [prefilled.lengths[prefilled.prompts[row]] for row in rows]
        self.top_k = [prefilled.top_k[row] for row in rows]
        self.limits = [length + room for length in self.lengths]
        self.capacity = max(self.limits)
        self.keys: list[Tensor | None] = []
        self.values: list[Tensor | None] = []
        self.members: list[list[int]] = []
        for block in range(len(language.blocks)):
            members = [i for i, row in enumerate(rows) if prefilled.top_k[row][block]]
            self.members.append(members)
            chosen = [rows[i] for i in members]
            self.keys.append(self._gather(prefilled, block, chosen, "keys"))
            self.values.append(self._gather(prefilled, block, chosen, "values"))
        self._index()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def cached_blocks(self) -> list[int]:
        """For each row, how many blocks hold a cache."""
        return [sum(row in members for members in self.members) for row in range(len(self))]

    def _gather(self, prefilled: Prefilled, block: int, rows: Sequence[int], part: str) -> Tensor | None:
        """Keys or values (R, capacity, H, d) of `rows` in one block, from this prefill or from its prefix."""
        if not rows:
            return None
        cache, prefix = prefilled.caches[block], prefilled.prefix
        fresh = [(i, cache.places[row]) for i, row in enumerate(rows) if cache is not None and cache.places[row] >= 0]
        sources: list[tuple[Tensor, list[int], list[int]]] = []
        if fresh and cache is not None:
            sources.append((getattr(cache, part), [i for i, _ in fresh], [place for _, place in fresh]))
        if len(fresh) < len(rows):
            assert prefix is not None
            have = {i for i, _ in fresh}
            rest = [i for i in range(len(rows)) if i not in have]
            sources.append((getattr(prefix, part)[block], rest, [prefilled.prompts[rows[i]] for i in rest]))
        first = sources[0][0]
        out = first.new_empty(len(rows), self.capacity, *first.shape[2:])
        for tensor, targets, places in sources:
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
        self.limits = [self.limits[row] for row in rows]
        self.top_k = [self.top_k[row] for row in rows]
        self._index()

    def extend(self, other: "DecodeBatch") -> None:
        """Append the rows of `other`, which is used up."""
        offset = len(self)
        self.capacity = max([*self.limits, *other.limits])
        for block in range(len(self.members)):
            self.keys[block] = _stack(self.keys[block], other.keys[block], self.capacity)
            self.values[block] = _stack(self.values[block], other.values[block], self.capacity)
            self.members[block] = [*self.members[block], *(offset + row for row in other.members[block])]
        self.lengths += other.lengths
        self.limits += other.limits
        self.top_k += other.top_k
        self._index()


def _stack(mine: Tensor | None, theirs: Tensor | None, capacity: int) -> Tensor | None:
    parts = [part for part in (mine, theirs) if part is not None]
    if not parts:
        return None
    out = parts[0].new_empty(sum(len(part) for part in parts), capacity, *parts[0].shape[2:])
    start = 0
    for part in parts:
        tokens = min(part.shape[1], capacity)
        out[start : start + len(part), :tokens] = part[:, :tokens]
        start += len(part)
    return out
