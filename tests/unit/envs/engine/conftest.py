"""A small untrained model with the embedded tokenizer, and samples with drawn images."""

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from envs.data.sample import ImageRef, Sample
from envs.engine import RolloutEngine
from envs.knobs import KnobSpace
from envs.model.block_importance import PUBLISHED_IMPORTANCE
from recipes.embedded_model.fresh_weights import initialise
from recipes.embedded_model.shape import build_config, build_processor

torch.set_num_threads(1)
LIMIT = 8


@dataclass(frozen=True)
class NoiseImage(ImageRef):
    """An image of seeded noise; counts how often any is loaded."""

    seed: int
    width: int
    height: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.seed} {self.width} {self.height}".encode()).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def load(self) -> Image.Image:
        noise = np.random.default_rng(self.seed).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        return Image.fromarray(noise)


QUESTIONS = ("what color is the shape?", "how many circles are there?", "is it red?")


def make_samples(count):
    sizes = [(60, 60), (170, 60), (150, 110), (56, 168)]
    samples = []
    for i in range(count):
        image = None if i % 5 == 4 else NoiseImage(i // 2, *sizes[(i // 2) % len(sizes)])
        samples.append(Sample(f"s{i}", image, QUESTIONS[i % len(QUESTIONS)], ("red", "2")))
    return samples


@pytest.fixture(scope="session")
def samples():
    return make_samples(10)


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture(scope="session")
def small_model(processor):
    """The embedded shape, narrower; end-of-text made likely enough that answers differ in length."""
    config = build_config(len(processor.tokenizer))
    vision = replace(config.vision, width=32, heads=2, head_dim=16, mlp_dim=48, layers=2)
    config = replace(
        config, d_model=32, n_heads=2, moe_num_experts=10, mlp_hidden_size=16, vision_backbone=vision.to_published(),
        vit_layers=[-1],
    )  # fmt: skip
    model = initialise(config, seed=3).eval().requires_grad_(False)
    model.language.lm_head[config.eos_token_id] *= 2.0
    return model


@pytest.fixture(scope="session")
def space():
    return KnobSpace(PUBLISHED_IMPORTANCE)


@pytest.fixture
def pairs(samples, space):
    """Random (sample, plan) pairs, repeats among them."""
    rng = random.Random(0)
    chosen = [(rng.choice(samples), space.plan(rng.choice(space.all))) for _ in range(24)]
    chosen += chosen[:3]
    return [sample for sample, _ in chosen], [plan for _, plan in chosen]


@pytest.fixture
def engine(small_model, processor):
    return RolloutEngine(small_model, processor, max_new_tokens=LIMIT)


@pytest.fixture(scope="session")
def naive(small_model, processor):
    """One request at batch 1, the plain way."""

    @cache
    def run(sample, plan, limit=LIMIT):
        inputs = processor(sample.image, sample.question, plan.tier, sample.style)
        return tuple(small_model.generate(inputs, plan, limit)[0])

    return run
