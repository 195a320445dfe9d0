"""One request at batch 1, timed stage by stage; nothing shared with other requests, nothing reused."""

import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from envs.data.sample import Sample
from envs.knobs import ExecutionPlan
from envs.latency.record import STAGES, LatencyRecord
from envs.model.molmoe import AdaptiveMolmoE
from envs.processing.processor import MolmoEProcessor


class Decider(Protocol):
    """A controller at work on one request under one budget. `policies` has none of this; whoever serves writes it.

    `level` is the budget's level of the latency token.
    """

    level: int

    def decide_stage1(self, language_feature_D: Tensor, has_image: bool) -> tuple[str, int]:
        """Tier and insertion position."""
        ...

    def decide_stage2(self, latency_token_D: Tensor, insertion: int) -> tuple[int, tuple[int, ...]]:
        """Top-k and kept blocks, from the latency token's state (D,) float32 after block `insertion`."""
        ...


@dataclass(frozen=True)
class Measured:
    """What one timed request gave: answer ids, whether it ended by itself, the plan that ran, milliseconds by stage."""

    token_ids: tuple[int, ...]
    finished: bool
    plan: ExecutionPlan
    record: LatencyRecord


@dataclass
class _Stopwatch:
    """Sums milliseconds by stage, waiting for the device at each boundary."""

    device: torch.device
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _since: float = 0.0

    def start(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last boundary on `stage`."""
        self._wait()
        now = time.perf_counter()
        self.spent[stage] += (now - self._since) * 1e3
        self._since = now

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class SingleRequests:
    """Runs and times requests of one model, from decoded image to answer text.

    Attributes:
        latency_tokens_LD: the latency token of every budget level, on the model's device.
    """

    model: AdaptiveMolmoE
    processor: MolmoEProcessor
    latency_tokens_LD: Tensor
    max_new_tokens: int

    @torch.inference_mode()
    def measure(self, sample: Sample, plan: ExecutionPlan | None, decider: Decider | None) -> Measured:
        """Run and time one request.

        With a plan, `decider` only costs its time; without one, it decides. The latency token always runs along with
        the prefix, as it does in serving.
        """
        captured = self.model.single_row.captured
        done = self._measure(sample, plan, decider)
        if plan is not None and self.model.single_row.captured > captured:
            # The first request of its size captured CUDA graphs; how long that took is not asked.
            done = self._measure(sample, plan, decider)
        return done

    def _measure(self, sample: Sample, plan: ExecutionPlan | None, decider: Decider | None) -> Measured:
        model, processor, single = self.model, self.processor, self.model.single_row
        watch = _Stopwatch(model.device)
        image = None if sample.image is None else sample.image.load()
        watch.start()
        tier, insertion = self._decide_first(sample, plan, decider)
        watch.lap("controller")
        inputs = processor(image, sample.question, tier, sample.style)
        watch.lap("processor")
        features = single.encode_images(inputs["images"], inputs["image_masks"]) if "images" in inputs else None
        watch.lap("vision")
        token_D = self.latency_tokens_LD[len(self.latency_tokens_LD) // 2 if decider is None else decider.level]
        x = torch.cat((model.embed(inputs, features), token_D[None, None].to(model.dtype)), 1)
        # As the last token of a causal sequence it sees the prompt and itself, and cutting it off leaves no trace.
        run = single.run_prefix(x, insertion)
        state_D = run.hidden[-1][0, -1].float()
        prefix = run.mapped(lambda part: part[:, :-1], (run.lengths[0] - 1,))
        watch.lap("prefix")
        if decider is not None:
            top_k, blocks = decider.decide_stage2(state_D, insertion)
            chosen = plan or ExecutionPlan(tier, insertion, top_k, blocks)
            watch.lap("controller")
        else:
            assert plan is not None
            chosen = plan
        prefilled = single.prefill(x[:, :-1], chosen.top_k_per_block, prefix)
        watch.lap("suffix")
        ids, finished = single.decode(prefilled, self.max_new_tokens)
        processor.decode(ids)
        watch.lap("decode")
        return Measured(tuple(ids), finished, chosen, LatencyRecord(**watch.spent))

    def _decide_first(self, sample: Sample, plan: ExecutionPlan | None, decider: Decider | None) -> tuple[str, int]:
        if decider is None:
            assert plan is not None
            return plan.tier, plan.insertion
        feature = self.model.language_feature(self.processor.question_ids(sample.question)).float()
        tier, insertion = decider.decide_stage1(feature, sample.image is not None)
        return (tier, insertion) if plan is None else (plan.tier, plan.insertion)
