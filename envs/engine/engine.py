"""RolloutEngine: (sample, plan) in, outcomes out; latency tokens for the second stage; and nothing computed twice.

What is known comes from memory or the store; what is not is run in shared, mixed batches (see `executor`).
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from cachetools import LRUCache
from torch import Tensor

from envs.data.sample import Sample
from envs.data.scoring import score
from envs.engine.caches import keep, prefix_cache, tensor_bytes
from envs.engine.executor import Executor, Job
from envs.engine.keys import EngineFingerprint, ExecutionKey, PromptKey, latency_key, outcome_key
from envs.engine.memory import plan_memory
from envs.engine.prompts import Prompt, Prompts, Tiling
from envs.engine.single_request import Decider, SingleRequests
from envs.engine.store import OutcomeStore, StoredOutcome, StoredStates
from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.latency.record import LatencyRecord, RequestShape
from envs.latency_token import LEVELS, level_token
from envs.model.block_importance import PUBLISHED_IMPORTANCE
from envs.model.language import MAX_INSERTION
from envs.model.molmoe import AdaptiveMolmoE
from envs.processing.processor import MolmoEProcessor

# Answers are short and latency tokens few; these cover a large training set before the store is asked again.
_OUTCOMES_KEPT = 1 << 20
_STATES_BYTES = 256 * 2**20
_FEATURES_BYTES = 64 * 2**20
# Executions between two writes to the store: an interruption loses no more.
_WRITE_EVERY = 512


@dataclass(frozen=True)
class Outcome:
    """A greedy answer: its token ids without end-of-text, and whether it ended before the token limit."""

    token_ids: tuple[int, ...]
    finished: bool = True

    @property
    def n_tokens(self) -> int:
        """Answer tokens, end-of-text not counted."""
        return len(self.token_ids)


class RolloutEngine:
    """Runs requests of one frozen model.

    Args:
        model: in eval mode; its `device` and `experts` decide where and how things run.
        processor: of the same model.
        store: a store, the path of one, or None to keep results in memory only.
        importance: block scores, for whoever builds a KnobSpace; the published ones where None.
        encoder_seed: seed of the encoder from budget level to latency token.
        max_new_tokens: token limit of an answer.
        batch_tokens: padded prompt tokens of one prefill; computed from free memory where None.
        device: move the model there first.

    Raises:
        UserError: a limit below 1, or a processor of another model.
    """

    def __init__(
        self,
        model: AdaptiveMolmoE,
        processor: MolmoEProcessor,
        *,
        store: OutcomeStore | str | Path | None = None,
        importance: Sequence[float] | None = None,
        encoder_seed: int = 0,
        max_new_tokens: int,
        batch_tokens: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: give at least 1")
        if batch_tokens is not None and batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}: give at least 1, or null to compute it")
        _check_fit(model, processor)
        self.model = model if device is None else model.to(device)
        self.processor = processor
        self.store = OutcomeStore(store) if isinstance(store, str | Path) else store
        self.importance = tuple(importance or PUBLISHED_IMPORTANCE)
        self.encoder_seed = encoder_seed
        self.max_new_tokens = max_new_tokens
        self.memory = plan_memory(model.config, model.dtype, model.device, batch_tokens)
        self.prompts = Prompts(model, processor, self.memory.feature_bytes, self.memory.crops)
        self.prefixes = prefix_cache(self.memory.prefix_bytes)
        self.executor = Executor(model, self.prompts, self.prefixes, self.memory, max_new_tokens)
        self.fingerprint = EngineFingerprint.of(model, processor, max_new_tokens).to_json()
        self._tokens_LD = self._level_tokens()
        self.single = SingleRequests(model, processor, self._tokens_LD, max_new_tokens)
        norm = float(self._tokens_LD[0].norm())
        self._encoder = {"seed": encoder_seed, "levels": LEVELS, "norm": round(norm, 4)}
        self._known: LRUCache[ExecutionKey, StoredOutcome] = LRUCache(_OUTCOMES_KEPT)
        self._states: LRUCache[PromptKey, Tensor] = LRUCache(_STATES_BYTES, tensor_bytes)
        self._features: LRUCache[str, Tensor] = LRUCache(_FEATURES_BYTES, tensor_bytes)
        self._accuracy = lru_cache(maxsize=1 << 18)(self._score)
        names = ("outcome_hits", "outcome_misses", "executed", "latency_token_hits", "latency_token_misses")
        self._stats = dict.fromkeys((*names, "seconds", "seconds_saved"), 0.0)

    def tiling(self, sample: Sample, tier: str) -> Tiling | None:
        """Rows and columns of crops that `sample` gets at `tier`; None for a text-only request."""
        return self.prompts.tiling(sample, tier)

    def shape(self, sample: Sample, tier: str) -> RequestShape:
        """Sizes of the request, without decoding its image."""
        return self.prompts.shape(sample, tier)

    @torch.inference_mode()
    def language_features(self, samples: Sequence[Sample]) -> Tensor:
        """Mean word embedding of each question (B, D), float32 on the CPU."""
        return torch.stack([self._language_feature(sample.question) for sample in samples])

    def latency_tokens(self, samples: Sequence[Sample], tiers: Sequence[str], levels: Sequence[int]) -> Tensor:
        """The latency token of each request after blocks 1..5, (B, 5, D) float32 on the CPU.

        One pass over a prompt gives all levels and positions, and leaves its prefix for `outcomes`.

        Raises:
            UserError: a level or tier that does not exist.
        """
        bad = [level for level in levels if not 0 <= level < LEVELS]
        if bad:
            raise UserError(f"budget level {bad[0]!r} is not allowed: levels are 0 to {LEVELS - 1}")
        prompts = [self.prompts.prompt(sample, tier) for sample, tier in zip(samples, tiers, strict=True)]
        states = self._load_states({prompt.key for prompt in prompts})
        missing = {prompt.key: prompt for prompt in prompts if prompt.key not in states}
        if missing:
            states.update(self._run_states(list(missing.values())))
        misses = sum(prompt.key in missing for prompt in prompts)
        self._stats["latency_token_misses"] += misses
        self._stats["latency_token_hits"] += len(prompts) - misses
        found = [states[prompt.key][:, level] for prompt, level in zip(prompts, levels, strict=True)]
        return torch.stack(found).float()

    def outcomes(self, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]) -> list[Outcome]:
        """The answer of each sample under its plan. Equal executions run once; what is known is not run."""
        jobs = self._jobs(samples, plans)
        found, ran = self._get_or_run({job.key: job for job in jobs})
        misses = sum(job.key in ran for job in jobs)
        self._stats["outcome_misses"] += misses
        self._stats["outcome_hits"] += len(jobs) - misses
        self._stats["seconds_saved"] += sum(found[job.key].seconds for job in jobs if job.key not in ran)
        return [Outcome(found[job.key].token_ids, found[job.key].finished) for job in jobs]

    def known_outcomes(self, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]) -> list[Outcome | None]:
        """The answers that are in memory or in the store; None for those that would have to be run."""
        jobs = self._jobs(samples, plans)
        found = self._find({job.key for job in jobs})
        return [Outcome(found[j.key].token_ids, found[j.key].finished) if j.key in found else None for j in jobs]

    def text(self, outcome: Outcome) -> str:
        """The answer as text."""
        return self.processor.decode(outcome.token_ids)

    def accuracy(self, sample: Sample, outcome: Outcome) -> float:
        """How right the answer is, 0 to 1, by the sample's metric."""
        return self._accuracy(sample.metric, sample.answers, outcome.token_ids)

    def run_measured(
        self, sample: Sample, plan: ExecutionPlan, controller: Decider | None = None
    ) -> tuple[Outcome, LatencyRecord]:
        """Run one request at batch 1 under `plan`, stages timed, nothing reused; `controller` only costs its time."""
        done = self.single.measure(sample, plan, controller)
        return Outcome(done.token_ids, done.finished), done.record

    def run_decided(self, sample: Sample, controller: Decider) -> tuple[Outcome, LatencyRecord, ExecutionPlan]:
        """Serve one request as `controller` decides, stages timed."""
        done = self.single.measure(sample, None, controller)
        return Outcome(done.token_ids, done.finished), done.record, done.plan

    def stats(self) -> dict[str, float]:
        """Counters since the start: requests served from memory or store (hits), run (misses), seconds spent, saved."""
        found = {f"engine/{name}": value for name, value in self._stats.items()}
        found["engine/images_encoded"] = float(self.prompts.images_encoded)
        found["engine/disagreements"] = float(self.store.disagreements if self.store else 0)
        return found

    def _level_tokens(self) -> Tensor:
        """The latency token of every level (16, D), as long as the model's average word embedding."""
        norm = float(self.model.language.wte.detach().float().norm(dim=-1).mean())
        tokens = [level_token(level, self.model.config.d_model, self.encoder_seed, norm) for level in range(LEVELS)]
        return torch.stack(tokens).to(self.model.device, self.model.dtype)

    def _score(self, metric: str, answers: tuple[str, ...], token_ids: tuple[int, ...]) -> float:
        return score(metric, self.processor.decode(token_ids), answers)

    def _language_feature(self, question: str) -> Tensor:
        if (known := self._features.get(question)) is not None:
            return known
        feature = self.model.language_feature(self.processor.question_ids(question)).float().cpu()
        keep(self._features, question, feature)
        return feature

    def _jobs(self, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]) -> list[Job]:
        pairs = zip(samples, plans, strict=True)
        return [Job(self.prompts.prompt(sample, plan.tier), plan.top_k_per_block) for sample, plan in pairs]

    def _find(self, keys: Collection[ExecutionKey]) -> dict[ExecutionKey, StoredOutcome]:
        """Outcomes in memory, else in the store."""
        found = {key: value for key in keys if (value := self._known.get(key)) is not None}
        if self.store is not None:
            digests = {outcome_key(self.fingerprint, *key): key for key in keys if key not in found}
            found |= {digests[digest]: value for digest, value in self.store.get_outcomes(list(digests)).items()}
        self._known.update(found)
        return found

    def _get_or_run(
        self, jobs: Mapping[ExecutionKey, Job]
    ) -> tuple[dict[ExecutionKey, StoredOutcome], set[ExecutionKey]]:
        """Every job's outcome from memory, else from the store, else by running it; and which were run."""
        found = self._find(jobs)
        missing = [job for key, job in jobs.items() if key not in found]
        missing.sort(key=lambda job: (job.prompt.key in self.prefixes, job.prompt.tokens))
        for start in range(0, len(missing), _WRITE_EVERY):
            ran = self._run(missing[start : start + _WRITE_EVERY])
            self._known.update(ran)
            found |= ran
        return found, {job.key for job in missing}

    def _run(self, jobs: Sequence[Job]) -> dict[ExecutionKey, StoredOutcome]:
        """Execute and store jobs; what counts from now on (another process may have been first)."""
        began = time.perf_counter()
        with torch.inference_mode():
            finished = self.executor.run(jobs)
        spent = time.perf_counter() - began
        self._stats["seconds"] += spent
        self._stats["executed"] += len(jobs)
        each = spent / len(jobs)
        results = {done.job.key: StoredOutcome(done.token_ids, done.complete, each) for done in finished}
        if self.store is None:
            return results
        digests = {outcome_key(self.fingerprint, *key): key for key in results}
        entries = {
            digest: (json.dumps(asdict(key.prompt)), json.dumps(key.top_k), results[key])
            for digest, key in digests.items()
        }
        canonical = self.store.put_outcomes(self.fingerprint, entries)
        return {key: canonical.get(digest, results[key]) for digest, key in digests.items()}

    def _load_states(self, keys: set[PromptKey]) -> dict[PromptKey, Tensor]:
        """Latency tokens (5, 16, D) of the prompts in memory or in the store."""
        held = {key: state for key in keys if (state := self._states.get(key)) is not None}
        if self.store is None or len(held) == len(keys):
            return held
        digests = {latency_key(self.fingerprint, key, self._encoder): key for key in keys if key not in held}
        for digest, value in self.store.get_states(list(digests)).items():
            held[digests[digest]] = self._from_bytes(value.states)
            keep(self._states, digests[digest], held[digests[digest]])
            self._stats["seconds_saved"] += value.seconds
        return held

    def _run_states(self, prompts: Sequence[Prompt]) -> dict[PromptKey, Tensor]:
        """Latency tokens (5, 16, D) of prompts, run, stored and kept."""
        began = time.perf_counter()
        with torch.inference_mode():
            states = {
                prompt.key: state.cpu() for prompt, state in self.executor.read_latency_tokens(prompts, self._tokens_LD)
            }
        spent = time.perf_counter() - began
        self._stats["seconds"] += spent
        if self.store is not None:
            digests = {latency_key(self.fingerprint, key, self._encoder): key for key in states}
            encoder, each = json.dumps(self._encoder, sort_keys=True), spent / len(states)
            entries = {
                digest: (json.dumps(asdict(key)), encoder, StoredStates(_to_bytes(states[key]), each))
                for digest, key in digests.items()
            }
            for digest, stored in self.store.put_states(self.fingerprint, entries).items():
                states[digests[digest]] = self._from_bytes(stored.states)
        for key, state in states.items():
            keep(self._states, key, state)
        return states

    def _from_bytes(self, raw: bytes) -> Tensor:
        flat = torch.frombuffer(bytearray(raw), dtype=self.model.dtype)
        return flat.view(MAX_INSERTION, LEVELS, self.model.config.d_model)


def _to_bytes(states: Tensor) -> bytes:
    return states.contiguous().view(torch.uint8).numpy().tobytes()


def _check_fit(model: AdaptiveMolmoE, processor: MolmoEProcessor) -> None:
    vision, geometry = model.config.vision, processor.geometry
    expected = (vision.crop_size, vision.patch_size)
    given = (geometry.crop, geometry.patch)
    if expected != given:
        raise UserError(
            f"the processor cuts crops of {given[0]} px with patches of {given[1]}, the model reads {expected[0]} and "
            f"{expected[1]}: use the processor of the same model"
        )
