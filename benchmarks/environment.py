"""What the environment itself costs per rollout: everything but the model, which is replaced by constants.

Run: python benchmarks/environment.py [--envs 256] [--group 8] [--repeats 20]
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from envs.budgets import BudgetDistribution
from envs.config import RewardSettings
from envs.data.sample import Sample
from envs.env_resources import EnvResources
from envs.knobs import TIER_CROPS, ExecutionPlan, KnobSpace
from envs.latency import LatencyProfile, LatencyRecord, ProfiledClock, RequestShape, RooflineClock
from envs.latency.profiler import profile
from envs.model.block_importance import PUBLISHED_IMPORTANCE
from envs.model.config import AdaptiveMolmoEConfig, VisionConfig

VISION = VisionConfig(56, 7, 64, 3, 4, 16, 128, 1e-5, (-1, -2), (2, 2))
CONFIG = AdaptiveMolmoEConfig(
    d_model=64, n_heads=4, moe_num_experts=16, mlp_hidden_size=32, vocab_size=2000, embedding_size=2000,
    overlap_margins=(2, 2), vision_backbone=VISION.to_published(), vit_layers=(-1, -2),
)  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """An answer of two tokens."""

    n_tokens: int = 2


class FreeEngine:
    """Answers immediately: what is left to measure is the environment."""

    def __init__(self, count: int) -> None:
        self.model = SimpleNamespace(config=CONFIG, fingerprint="free", parameters=lambda: iter([torch.zeros(1)]))
        self.answer = Constant()
        self.shapes = {
            (f"{i}", tier): RequestShape(crops + 1, 20 * crops, 20 * crops + 12 + i % 9, 28224)
            for i in range(count)
            for tier, crops in TIER_CROPS.items()
        }

    def tiling(self, sample: Sample, tier: str) -> int:
        return TIER_CROPS[tier]

    def shape(self, sample: Sample, tier: str) -> RequestShape:
        return self.shapes[sample.id, tier]

    def language_features(self, samples: Sequence[Sample]) -> torch.Tensor:
        return torch.zeros(len(samples), CONFIG.d_model)

    def latency_tokens(self, samples: Sequence[Sample], tiers: Any, levels: Any) -> torch.Tensor:
        return torch.zeros(len(samples), 5, CONFIG.d_model)

    def outcomes(self, samples: Sequence[Sample], plans: Sequence[ExecutionPlan]) -> list[Constant]:
        return [self.answer] * len(samples)

    def accuracy(self, sample: Sample, outcome: Constant) -> float:
        return 1.0

    def run_measured(self, sample: Sample, plan: ExecutionPlan, controller: Any) -> Any:
        record = RooflineClock(CONFIG, "laptop-2-core").latency(self.shape(sample, plan.tier), plan, 2)
        return self.answer, LatencyRecord(**{**record.to_dict(), "controller": 0.0})


def legal_actions(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random legal actions (B, 4), drawn outside the timed part."""
    noise = np.where(masks > 0, rng.random(masks.shape), -1.0)
    return np.stack([part.argmax(1) for part in np.split(noise, [3, 8, 13], axis=1)], axis=1)


def episodes(env: AdaptiveVQAVectorEnv, repeats: int) -> list[float]:
    """Seconds of every repeat: reset and both steps."""
    rng, times = np.random.default_rng(0), []
    for _ in range(repeats):
        spent = -time.perf_counter()
        observation, _ = env.reset()
        spent += time.perf_counter()
        for _ in range(2):
            actions = legal_actions(observation["action_mask"], rng)
            spent -= time.perf_counter()
            observation, *_ = env.step(actions)
            spent += time.perf_counter()
        times.append(spent)
    return times


def main() -> None:
    """Print the cost per rollout for each computed clock, batched and one environment at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=int, default=256)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    engine = FreeEngine(512)
    samples = [Sample(str(i), None, "what?", ("yes",)) for i in range(512)]
    table: LatencyProfile = profile(engine, samples[:20], repeats=1, per_tiling=16)
    print(f"{'clock':<10}{'environments':>14}{'ms per rollout':>16}{'rollouts / s':>14}")
    for clock in (RooflineClock(CONFIG, "laptop-2-core"), ProfiledClock(table)):
        resources = EnvResources(
            engine,
            [dataclasses.replace(s, image=object()) for s in samples],
            clock,
            BudgetDistribution.over(5.0, 50.0),
            RewardSettings(),
            KnobSpace(PUBLISHED_IMPORTANCE),
        )
        for count, group in ((options.envs, options.group), (1, 1)):
            env = AdaptiveVQAVectorEnv({"resources": resources, "num_envs": count, "group_size": group})
            seconds = median(episodes(env, options.iterations)) / count
            print(f"{clock.name:<10}{count:>14}{seconds * 1e3:>16.3f}{1 / seconds:>14.0f}")


if __name__ == "__main__":
    main()
