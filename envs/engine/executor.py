"""Runs many (prompt, plan) pairs: shared beginnings, mixed plans, one decode batch that rows leave and join.

A *job* is one execution: a prompt and its experts per token in each block. Jobs of one prompt stay together in a wave,
so that they share all they have in common; waves consist of prompts of similar length and stay under the token budget.
`Executor.run` is a loop over a `Session`: prefill while memory allows, otherwise decode one token for every row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from envs.engine.caches import PrefixCache, join_prefixes, keep, pad_rows, split_prefix
from envs.engine.keys import ExecutionKey, PromptKey
from envs.engine.memory import MemoryPlan
from envs.engine.prompts import Prompt, Prompts
from envs.model.decode import DecodeBatch
from envs.model.execution_tree import build_execution_tree, tree_size
from envs.model.language import MAX_INSERTION
from envs.model.molmoe import AdaptiveMolmoE
from envs.model.prefill import Prefilled

# A decode batch that has shrunk to this share of its size takes waiting rows in before it continues.
_REFILL = 0.5
# Rows that have ended stay in the decode batch as dead weight until no more than this share of it is alive.
_COMPACT = 0.875


@dataclass(frozen=True)
class Job:
    """One execution to run."""

    prompt: Prompt
    top_k: tuple[int, ...]

    @property
    def key(self) -> ExecutionKey:
        """What identifies its outcome."""
        return ExecutionKey(self.prompt.key, self.top_k)


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
    """A wave after prefill: which of its rows continue."""

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
        fresh = [wave for wave in reversed(waves) if not self._has_prefix(wave[0])]
        self.prompts.expect([[job.prompt for job in wave] for wave in fresh])
        session = Session(self, waves)
        while session.unfinished:
            if session.can_prefill():
                session.prefill()
            else:
                session.step()
        return session.finished

    def read_latency_tokens(self, prompts: Sequence[Prompt], tokens_LD: Tensor) -> Iterator[tuple[Prompt, Tensor]]:
        """States (5, L, D) of L alternative latency tokens after blocks 1..5 of each prompt, in any order.

        Prefixes that are not kept yet are run, and kept as far as the cache's bound allows.
        """
        language, kernel = self.model.language, self.model.experts
        waves = self._prompt_waves(prompts)
        self.prompts.expect([wave for wave in waves if any(prompt.key not in self.prefixes for prompt in wave)])
        for wave in waves:
            lengths = [prompt.tokens for prompt in wave]
            kept = [self.prefixes.get(prompt.key) for prompt in wave]
            if all(part is not None for part in kept):
                prefix = join_prefixes([part for part in kept if part is not None])
            else:
                x = pad_rows([part.unsqueeze(0) for part in self.prompts.embed(wave)])
                prefix = language.run_prefix(x, lengths, experts=kernel)
                for prompt, part in zip(wave, split_prefix(prefix), strict=True):
                    keep(self.prefixes, prompt.key, part)
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
        """Waves in order of falling length, prompts with a kept prefix apart from those without.

        A prompt's jobs are sorted, so that those which share most stay together where they do not all fit.
        """
        by_prompt: dict[PromptKey, list[Job]] = {}
        for job in jobs:
            by_prompt.setdefault(job.prompt.key, []).append(job)
        groups = sorted(by_prompt.values(), key=lambda group: (self._has_prefix(group[0]), -group[0].prompt.tokens))
        waves: list[list[Job]] = []
        size = 0
        for group in groups:
            for part, needed in self._parts(sorted(group, key=lambda job: job.top_k, reverse=True)):
                if waves and self._fits([*waves[-1], *part], size + needed):
                    waves[-1].extend(part)
                    size += needed
                else:
                    waves.append(part)
                    size = needed
        return waves

    def _parts(self, group: Sequence[Job]) -> Iterator[tuple[list[Job], int]]:
        """One prompt's jobs, halved until a part fits, each with its size in nodes: shared beginnings count once."""
        given = MAX_INSERTION if self._has_prefix(group[0]) else 0
        size = tree_size(build_execution_tree((0,) * len(group), tuple(job.top_k for job in group), given))
        if len(group) == 1 or self._fits(group, size):
            yield list(group), size
        else:
            middle = len(group) // 2
            yield from self._parts(group[:middle])
            yield from self._parts(group[middle:])

    def _has_prefix(self, job: Job) -> bool:
        return job.prompt.key in self.prefixes

    def _fits(self, jobs: Sequence[Job], size: int) -> bool:
        """Whether jobs, longest prompt first and `size` nodes in sum, make one wave: all with a kept prefix or none."""
        longest = jobs[0].prompt.tokens
        return (
            self._has_prefix(jobs[0]) == self._has_prefix(jobs[-1])
            and size * longest <= self.memory.batch_tokens
            and len(jobs) * (longest + self.max_new_tokens) <= self.memory.decode_tokens
        )

    def prefill(self, wave: Sequence[Job]) -> tuple[Prefilled, list[int]]:
        """Run a wave's prompts; with each job's first token."""
        places = _prompt_indices(wave)
        prompts = list({job.prompt.key: job.prompt for job in wave}.values())
        kept = [self.prefixes.get(prompt.key) for prompt in prompts]
        prefix = join_prefixes([part for part in kept if part]) if all(kept) else None
        x = None if prefix is not None else pad_rows([part.unsqueeze(0) for part in self.prompts.embed(prompts)])
        language = self.model.language
        prefilled = language.prefill(
            x,
            [prompt.tokens for prompt in prompts],
            [places[job.prompt.key] for job in wave],
            [job.top_k for job in wave],
            prefix=prefix,
            experts=self.model.experts,
        )
        return prefilled, language.next_logits(prefilled.last).argmax(-1).tolist()


class Session:
    """One call of `Executor.run`: waves to prefill, rows that wait to decode, and the batch that is decoded.

    Prefill comes first, as in any engine that batches continuously: many rows share the fixed cost of a decoding step.
    It stops while the cache is full, and starts again when so many rows have ended that a refill pays.
    """

    def __init__(self, executor: Executor, waves: list[list[Job]]) -> None:
        self.executor = executor
        self.waves = waves
        self.waiting: list[_Waiting] = []
        self.batch: DecodeBatch | None = None
        # A row that has ended is None until the batch is cut down.
        self.rows: list[_Row | None] = []
        self.full_size = 0
        self.finished: list[Finished] = []

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to run."""
        return bool(self.waves or self.waiting or self.rows)

    def can_prefill(self) -> bool:
        """Whether the next wave may run before decoding continues."""
        if not self.waves:
            return False
        if not (self.rows or self.waiting):
            return True
        if len(self.rows) > _REFILL * self.full_size:
            return False
        wave = self.waves[-1]
        count = len(self.rows) + sum(len(part.rows) for part in self.waiting) + len(wave)
        lengths = [max(job.prompt.tokens for job in wave), *(max(part.prefilled.lengths) for part in self.waiting)]
        lengths += self.batch.lengths if self.batch is not None else []
        return count * (max(lengths) + self.executor.max_new_tokens) <= self.executor.memory.decode_tokens

    def prefill(self) -> None:
        """Run the next wave. Rows that end immediately are finished, the others wait to decode."""
        wave = self.waves.pop()
        prefilled, tokens = self.executor.prefill(wave)
        rows = [self._take_token(_Row(job, []), token) for job, token in zip(wave, tokens, strict=True)]
        places = [place for place, row in enumerate(rows) if row is not None]
        if places:
            self.waiting.append(_Waiting(prefilled, places, [row for row in rows if row is not None]))

    def step(self) -> None:
        """One token for every row, those included that waited. Rows that end leave once enough have to pay for it."""
        if self.waiting:
            self._join()
        if self.batch is None or not self.rows:
            return
        fed = [0 if row is None else row.token_ids[-1] for row in self.rows]
        tokens = self.batch.step(fed, self.executor.model.experts).argmax(-1).tolist()
        self.rows = [row and self._take_token(row, token) for row, token in zip(self.rows, tokens, strict=True)]
        going = [place for place, row in enumerate(self.rows) if row is not None]
        if not going:
            self.rows, self.batch = [], None
        elif len(going) <= _COMPACT * len(self.rows):
            self.batch.keep(going)
            self.rows = [self.rows[place] for place in going]

    def _join(self) -> None:
        fresh = DecodeBatch(self.executor.model.language, [(part.prefilled, part.places) for part in self.waiting])
        self.rows += [row for part in self.waiting for row in part.rows]
        if self.batch is None:
            self.batch = fresh
        else:
            self.batch.extend(fresh)
        self.waiting, self.full_size = [], len(self.rows)

    def _take_token(self, row: _Row, token: int) -> _Row | None:
        """Append a token; the row, or None where that ended it."""
        ended = token == self.executor.model.config.eos_token_id
        if not ended:
            row.token_ids.append(token)
        if ended or len(row.token_ids) >= self.executor.max_new_tokens:
            self.finished.append(Finished(row.job, tuple(row.token_ids), ended))
            return None
        return row


def _prompt_indices(jobs: Sequence[Job]) -> dict[PromptKey, int]:
    """Each prompt's place among the different ones, in order of first use."""
    places: dict[PromptKey, int] = {}
    for job in jobs:
        places.setdefault(job.prompt.key, len(places))
    return places
