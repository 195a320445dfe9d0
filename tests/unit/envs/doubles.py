"""A stand-in for the rollout engine: obeys its contract with arithmetic instead of a model."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from envs.budgets import BudgetDistribution
from envs.config import RewardSettings
from envs.data.sample import ImageRef, Sample
from envs.env_resources import EnvResources
from envs.knobs import TIER_CROPS, TIERS, ExecutionPlan, KnobSpace
from envs.latency import LatencyRecord, RequestShape, RooflineClock
from envs.model.config import AdaptiveMolmoEConfig
from envs.processing import MolmoEProcessor
from envs.processing.image_processor import AdaptiveMolmoEImageProcessor

GOLDEN = Path(__file__).parents[2] / "golden"
PUBLISHED_IMPORTANCE = (
    0.56, 0.08, 0.004, 0.03, 0.001, 0.08, 0.04, 0.05, 0.07, 0.06, 0.003, 0.04, 0.06, 0.002, 0.06, 0.06,
)  # fmt: skip


@dataclass(frozen=True)
class Picture(ImageRef):
    digest: str
    width: int = 640
    height: int = 480

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def load(self) -> Image.Image:
        return Image.new("RGB", self.size)


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    finished: bool = True

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


class Weights(torch.nn.Module):
    def __init__(self, config: AdaptiveMolmoEConfig) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = "f" * 64
        self.weight = torch.nn.Parameter(torch.zeros(1))


def with_geometry(processor: MolmoEProcessor, **changes: Any) -> MolmoEProcessor:
    """The processor of other crops."""
    geometry = replace(processor.geometry, **changes)
    return MolmoEProcessor(AdaptiveMolmoEImageProcessor(**geometry.to_config()), processor.tokenizer)


class EngineDouble:
    """Answers are right when enough is run for the sample; everything is a function of its arguments."""

    def __init__(self, config: AdaptiveMolmoEConfig) -> None:
        self.model = Weights(config)
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.noise = np.random.default_rng(0)
        self.truth = RooflineClock(config, "laptop-core")
        self.scale = 1.0

    def tiling(self, sample: Sample, tier: str) -> tuple[int, int] | None:
        if sample.image is None:
            return None
        width, height = sample.image.size
        if width < 100:
            return (1, 1)
        crops = TIER_CROPS[tier]
        return {3: (1, 3), 6: (2, 3), 12: (3, 4)}[crops] if width >= height else (crops, 1)

    def shape(self, sample: Sample, tier: str) -> RequestShape:
        tiling = self.tiling(sample, tier)
        image = self.model.config.image_tokens(tiling)
        text = 10 + len(sample.question.split())
        if tiling is None or sample.image is None:
            return RequestShape(0, 0, text, 0)
        width, height = sample.image.size
        return RequestShape(tiling[0] * tiling[1] + 1, image, image + text, width * height)

    def language_features(self, samples: Sequence[Sample]) -> torch.Tensor:
        self.calls["features"] += 1
        return torch.stack([self._vector(sample.id) for sample in samples])

    def latency_tokens(self, samples: Sequence[Sample], tiers: Sequence[str], levels: Sequence[int]) -> torch.Tensor:
        self.calls["tokens"] += 1
        self.rows["tokens"] += len(samples)
        rows = []
        for sample, tier, level in zip(samples, tiers, levels, strict=True):
            rows.append(torch.stack([self._vector(sample.id, tier, level, p) for p in range(1, 6)]))
        return torch.stack(rows)

    def outcomes(self, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]) -> list[Answer]:
        self.calls["outcomes"] += 1
        self.rows["outcomes"] += len(samples)
        return [self.outcome(s, p) for s, p in zip(samples, plans, strict=True)]

    def outcome(self, sample: Sample, plan: ExecutionPlan) -> Answer:
        effort = (TIERS.index(plan.tier) + 1) / 3 * sum(plan.top_k_per_block) / 128
        need = int(hashlib.sha256(sample.id.encode()).hexdigest(), 16) % 100 / 100
        return Answer((1,) * (1 + int(need * 5)) if effort >= need else (0, 0))

    def known_outcomes(self, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]) -> list[Answer | None]:
        return [self.outcome(s, p) if self.is_known(s, p) else None for s, p in zip(samples, plans, strict=True)]

    def is_known(self, sample: Sample, plan: ExecutionPlan) -> bool:
        """Some outcomes of every third sample, all of the others."""
        return bool(int(sample.id[1:]) % 3) or plan.top_k < 7

    def accuracy(self, sample: Sample, outcome: Answer) -> float:
        return float(outcome.token_ids[0] == 1)

    def run_measured(self, sample: Sample, plan: ExecutionPlan, controller: Any = None) -> tuple[Answer, LatencyRecord]:
        self.calls["measured"] += 1
        answer = self.outcome(sample, plan)
        true = self.truth.latency(self.shape(sample, plan.tier), plan, answer.n_tokens)
        noisy = {
            stage: ms * self.scale * float(self.noise.lognormal(0.0, 0.03))
            for stage, ms in replace(true, controller=0.0).to_dict().items()
        }
        return answer, LatencyRecord(**noisy)

    def text(self, outcome: Answer) -> str:
        return " ".join(map(str, outcome.token_ids))

    def stats(self) -> dict[str, float]:
        return {"engine/executed": float(self.rows["outcomes"])}

    def _vector(self, *key: object) -> torch.Tensor:
        seed = int(hashlib.sha256(repr(key).encode()).hexdigest()[:8], 16)
        return torch.randn(self.model.config.d_model, generator=torch.Generator().manual_seed(seed))


def make_samples(count: int = 20, text_only: bool = False) -> list[Sample]:
    samples = []
    for i in range(count):
        width, height = ((640, 480), (480, 640), (64, 64))[i % 3]
        image = None if text_only else Picture(f"{i:064x}", width, height)
        question = "what is " + "very " * (i % 7) + f"red{i}?"  # no two samples share their text
        samples.append(Sample(f"s{i}", image, question, ("yes",)))
    return samples


def make_resources(count: int = 20, *, text_only: bool = False, **changes: Any) -> EnvResources:
    config = AdaptiveMolmoEConfig.from_pretrained(GOLDEN)
    resources = EnvResources(
        engine=EngineDouble(config),
        samples=make_samples(count, text_only),
        clock=RooflineClock(config, "laptop-2-core"),
        budgets=BudgetDistribution.over(8.0, 40.0),
        reward=RewardSettings(),
        space=KnobSpace(PUBLISHED_IMPORTANCE),
    )
    return replace(resources, **changes)
