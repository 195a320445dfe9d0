"""Runs many (prompt, plan) pairs: shared beginnings, mixed plans, one decode batch that rows leave and join.

A *job* is one execution: a prompt and its experts per token in each block. Jobs of one prompt stay together in a wave,
so that they share all they have in common; waves hold prompts of similar length and stay under the token budget.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from envs.engine.memory import MemoryPlan
from envs.engine.prefix_cache import PrefixCache, join_prefixes, pad_rows, split_prefix
from envs.engine.prompts import Prompt, Prompts
from envs.model.decode import DecodeBatch
from envs.model.language import Prefilled
from envs.model.molmoe import AdaptiveMolmoE

# A decode batch that has shrunk to this share of its size takes waiting rows in before it goes on.
_REFILL = 0.5
# Rows that have ended stay in the decode batch as dead weight until no more than this share of it is alive.
_COMPACT = 0.875


@dataclass(frozen=True)
class Job:
    """One execution to run."""

    prompt: Prompt
    top_k: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """Greedy answer ids of a job, end-of-text left out; `complete` unless the token limit cut it off."""

    job: Job
    token_ids: tuple[int, ...]
    complete: bool


@dataclass
class _Row:
    job: Job
    token_ids: list[int]


@dataclass(frozen=True)
class _Waiting:
    """A wave after prefill: which of its rows still go on."""

    prefilled: Prefilled
    places: list[int]
    rows: list[_Row]


class Executor:
    """Turns jobs into answers.

    Args:
        prefixes: prefixes already run, by prompt; used where a job's prompt is in it, never filled here.
        memory: bounds on padded tokens.
    """

    def __init__(
        self, model: AdaptiveMolmoE, prompts: Prompts, prefixes: PrefixCache, memory: MemoryPlan, max_new_tokens: int
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.prefixes = prefixes
        self.memory = memory
        self.max_new_tokens = max_new_tokens

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        """Answers of all jobs, in any order."""
        waves = self._waves(jobs)
        waiting: list[_Waiting] = []
        rows: list[_Row | None] = []
        batch: DecodeBatch | None = None
        done: list[Finished] = []
        full_size = 0
        while waves or waiting or rows:
            if waves and self._room(waves[-1], waiting, rows, batch, full_size):
                part = self._prefill(waves.pop(), done)
                if part.rows:
                    waiting.append(part)
                continue
            if waiting:
                batch, rows = self._join(batch, rows, waiting)
                waiting, full_size = [], len(rows)
            if batch is not None and rows:
                rows = self._step(batch, rows, done)
        return done

    def read_latency_tokens(self, prompts: Sequence[Prompt], tokens_LD: Tensor) -> Iterator[tuple[Prompt, Tensor]]:
        """States (5, L, D) of L alternative latency tokens after blocks 1..5 of each prompt, in any order.

        Prefixes that are not kept yet are run, and kept as far as the cache's bound allows.
        """
        language, kernel = self.model.language, self.model.experts
        for wave in self._prompt_waves(prompts):
            lengths = [prompt.tokens for prompt in wave]
            kept = [self.prefixes.get(prompt.key) for prompt in wave]
            if all(part is not None for part in kept):
                prefix = join_prefixes([part for part in kept if part is not None])
            else:
                x = pad_rows([part.unsqueeze(0) for part in self.prompts.embed(wave)])
                prefix = language.run_prefix(x, lengths, experts=kernel)
                for prompt, part in zip(wave, split_prefix(prefix), strict=True):
                    self.prefixes.put(prompt.key, part)
            states = language.read_latency_tokens(tokens_LD.expand(len(wave), -1, -1), prefix, kernel)
            yield from zip(wave, states, strict=True)

    def _prompt_waves(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Prompts of similar length together, each wave under the token budget; on a CPU one by one.

        A controller learns from these numbers, so a run that is resumed, or whose work falls to other processes, has to
        see the same ones to the last bit, and on a CPU a batch's composition shows in the last bits and saves little.
        """
        if self.model.device.type == "cpu":
            return [[prompt] for prompt in prompts]
        waves: list[list[Prompt]] = []
        for prompt in sorted(prompts, key=lambda p: -p.tokens):
            longest = waves[-1][0].tokens if waves else 0
            if waves and longest * (len(waves[-1]) + 1) <= self.memory.batch_tokens:
                waves[-1].append(prompt)
            else:
                waves.append([prompt])
        return waves

    def _waves(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Waves in order of falling length, prompts with a kept prefix apart from those without."""
        by_prompt: dict[object, list[Job]] = {}
        for job in jobs:
            by_prompt.setdefault(job.prompt.key, []).append(job)
        groups = sorted(by_prompt.values(), key=lambda group: (self._has_prefix(group[0]), -group[0].prompt.tokens))
        waves: list[list[Job]] = []
        for group in groups:
            most = max(1, self.memory.batch_tokens // group[0].prompt.tokens)
            for start in range(0, len(group), most):
                part = group[start : start + most]
                if waves and self._fits(waves[-1], part):
                    waves[-1].extend(part)
                else:
                    waves.append(part)
        return waves

    def _has_prefix(self, job: Job) -> bool:
        return job.prompt.key in self.prefixes

    def _fits(self, wave: Sequence[Job], part: Sequence[Job]) -> bool:
        padded = wave[0].prompt.tokens * (len(wave) + len(part))
        return self._has_prefix(wave[0]) == self._has_prefix(part[0]) and padded <= self.memory.batch_tokens

    def _room(
        self,
        wave: Sequence[Job],
        waiting: Sequence[_Waiting],
        rows: Sequence[_Row | None],
        batch: DecodeBatch | None,
        full_size: int,
    ) -> bool:
        """Whether a wave may be prefilled before decoding goes on."""
        if rows and len(rows) > _REFILL * full_size:
            return False
        count = len(rows) + sum(len(part.rows) for part in waiting) + len(wave)
        longest = max([wave[0].prompt.tokens, *(max(part.prefilled.lengths) for part in waiting)])
        if batch is not None:
            longest = max(longest, *batch.lengths)
        return not (rows or waiting) or count * (longest + self.max_new_tokens) <= self.memory.decode_tokens

    def _prefill(self, wave: Sequence[Job], done: list[Finished]) -> _Waiting:
        """Run a wave's prompts; rows that end at once are done, the others wait to decode."""
        unique: dict[object, int] = {}
        for job in wave:
            unique.setdefault(job.prompt.key, len(unique))
        prompts: list[Prompt] = []
        for job in wave:
            if unique[job.prompt.key] == len(prompts):
                prompts.append(job.prompt)
        lengths = [prompt.tokens for prompt in prompts]
        kept = [self.prefixes.get(prompt.key) for prompt in prompts]
        prefix = None if any(part is None for part in kept) else join_prefixes([part for part in kept if part])
        x = None if prefix is not None else pad_rows([part.unsqueeze(0) for part in self.prompts.embed(prompts)])
        language = self.model.language
        prefilled = language.prefill(
            x,
            lengths,
            [unique[job.prompt.key] for job in wave],
            [job.top_k for job in wave],
            prefix=prefix,
            experts=self.model.experts,
        )
        first = language.logits(language.final_norm(prefilled.last)).argmax(-1).tolist()
        going, rows = [], []
        for place, (job, token) in enumerate(zip(wave, first, strict=True)):
            row = self._take_token(_Row(job, []), token, done)
            if row is not None:
                going.append(place)
                rows.append(row)
        return _Waiting(prefilled, going, rows)

    def _take_token(self, row: _Row, token: int, done: list[Finished]) -> _Row | None:
        """Append a token; the row, or None where that ended it."""
        if token == self.model.config.eos_token_id:
            done.append(Finished(row.job, tuple(row.token_ids), True))
            return None
        row.token_ids.append(token)
        if len(row.token_ids) >= self.max_new_tokens:
            done.append(Finished(row.job, tuple(row.token_ids), False))
            return None
        return row

    def _join(
        self, batch: DecodeBatch | None, rows: list[_Row | None], waiting: Sequence[_Waiting]
    ) -> tuple[DecodeBatch, list[_Row | None]]:
        fresh = DecodeBatch(self.model.language, [(part.prefilled, part.places) for part in waiting])
        joined = [*rows, *(row for part in waiting for row in part.rows)]
        if batch is None or not rows:
            return fresh, joined
        batch.extend(fresh)
        return batch, joined

    def _step(self, batch: DecodeBatch, rows: list[_Row | None], done: list[Finished]) -> list[_Row | None]:
        """One token for every row. Rows that end leave, once enough have for the copy to pay."""
        fed = [0 if row is None else row.token_ids[-1] for row in rows]
        tokens = batch.step(fed, self.model.experts).argmax(-1).tolist()
        after = [row and self._take_token(row, token, done) for row, token in zip(rows, tokens, strict=True)]
        going = [place for place, row in enumerate(after) if row is not None]
        if going and len(going) <= _COMPACT * len(rows):
            batch.keep(going)
            return [after[place] for place in going]
        return after if going else []
