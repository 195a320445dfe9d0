"""A controller serving one request decides exactly as it does in the environment it was trained in."""

from typing import Any

import numpy as np
import pytest
import torch

from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from envs.budgets import BudgetDistribution
from envs.env_resources import World
from envs.knobs import KnobSpace
from envs.reward import RewardSettings
from envs.tasks.sample import ImageRef, Sample
from policies.controller import Controller
from ray_ctrl.steering import Steering

WIDTH = 8
SPACE = KnobSpace([1.0 - 0.05 * block for block in range(16)])


class _Clock:
    name, deterministic, reference_ms = "fixed", True, 80.0


class _Engine:
    """Features and tokens of one request, and the size of the model they come from."""

    def __init__(self) -> None:
        self.model = type("Model", (), {"config": type("Config", (), {"d_model": WIDTH})()})()
        draw = torch.Generator().manual_seed(3)
        self.language = torch.randn(WIDTH, generator=draw)
        self.tokens = torch.randn(16, 5, WIDTH, generator=draw)

    def language_features(self, samples: Any) -> torch.Tensor:
        return self.language.expand(len(samples), -1)

    def latency_tokens(self, samples: Any, tiers: Any, levels: Any) -> torch.Tensor:
        return torch.stack([self.tokens[level] for level in levels])


def _environment_choice(controller: Controller, engine: Any, sample: Sample, budget_ms: float) -> Any:
    world = World(engine, (sample,), _Clock(), BudgetDistribution(10.0, 90.0), RewardSettings(), SPACE)  # type: ignore[arg-type]
    environment = AdaptiveVQAVectorEnv({"world": world, "num_envs": 1, "contexts": [(0, budget_ms)]})
    observation, _ = environment.reset()
    first = controller.act({k: torch.as_tensor(v) for k, v in observation.items()}).numpy()
    observation, *_ = environment.step(first)
    second = controller.act({k: torch.as_tensor(v) for k, v in observation.items()}).numpy()
    return SPACE.decode((*first[0, :2], *second[0, 2:]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget_ms", [5.0, 40.0, 200.0])
@pytest.mark.parametrize("has_image", [True, False])
def test_serving_equals_the_environment(seed: int, budget_ms: float, has_image: bool) -> None:
    torch.manual_seed(seed)
    controller, engine = Controller(WIDTH, 16).eval(), _Engine()
    for parameter in controller.parameters():  # far from uniform, so that a wrong input would show
        torch.nn.init.normal_(parameter, std=0.7)
    image = _Picture() if has_image else None
    steering = Steering(controller, SPACE, budget_ms, _Clock.reference_ms)
    tier, insertion = steering.first(engine.language, has_image)
    top_k, blocks = steering.second(engine.tokens[steering.level, insertion - 1], insertion)
    wanted = _environment_choice(controller, engine, Sample("s", image, "what?", ("a",)), budget_ms)
    assert steering.knobs == wanted
    assert (tier, insertion, top_k) == (wanted.tier, wanted.insertion, wanted.top_k)
    assert blocks == SPACE.plan(wanted).blocks
    assert has_image or tier == "low"


class _Picture(ImageRef):
    digest = "0" * 64

    def load(self) -> Any:
        raise AssertionError("no pixels are needed to decide")

    @property
    def size(self) -> tuple[int, int]:
        return 64, 64


def test_budget_level_is_the_environments() -> None:
    controller = Controller(WIDTH, 16)
    levels = [Steering(controller, SPACE, ms, 80.0).level for ms in np.geomspace(5, 300, 30)]
    assert levels == sorted(levels)
    assert len(set(levels)) > 8
