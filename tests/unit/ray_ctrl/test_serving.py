"""A controller serving one request decides exactly as it does in the environment it was trained in."""

from typing import Any

import numpy as np
import pytest
import torch

from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from envs.budgets import BudgetDistribution
from envs.config import RewardSettings
from envs.data.sample import ImageRef, Sample
from envs.env_resources import EnvResources
from envs.knobs import TIERS, ExecutionPlan, KnobSpace
from envs.latency import LatencyRecord, RequestShape
from envs.latency.guardrail import AnswerLengths, Guardrail, LatencyPredictor
from policies.controller import Controller
from policies.fused import FusedController
from ray_ctrl.serving import RequestController

WIDTH = 8
SPACE = KnobSpace([1.0 - 0.05 * block for block in range(16)])


class _Clock:
    name, reference_ms = "fixed", 80.0

    def latency(self, shape: RequestShape, plan: ExecutionPlan, new_tokens: int) -> LatencyRecord:
        return LatencyRecord(vision=4.0 * shape.crops, suffix=0.4 * sum(plan.top_k_per_block), decode=0.3 * new_tokens)


class _Engine:
    """Features and tokens of one request, and the size of the model they come from."""

    def __init__(self) -> None:
        self.model = type("Model", (), {"config": type("Config", (), {"d_model": WIDTH})()})()
        draw = torch.Generator().manual_seed(3)
        self.language = torch.randn(WIDTH, generator=draw)
        self.tokens = torch.randn(16, 5, WIDTH, generator=draw)

    def language_features(self, samples: Any) -> torch.Tensor:
        return self.language.expand(len(samples), -1)

    def shape(self, sample: Sample, tier: str) -> RequestShape:
        return RequestShape(0 if sample.image is None else 1 + TIERS.index(tier), 0, 9, 0)

    def latency_tokens(self, samples: Any, tiers: Any, levels: Any) -> torch.Tensor:
        return torch.stack([self.tokens[level] for level in levels])


def _environment_choice(
    controller: Controller, engine: Any, sample: Sample, budget_ms: float, guardrail: Guardrail | None
) -> Any:
    resources = EnvResources(
        engine, (sample,), _Clock(), BudgetDistribution(10.0, 90.0), RewardSettings(), SPACE, guardrail
    )  # type: ignore[arg-type]
    environment = AdaptiveVQAVectorEnv({"resources": resources, "num_envs": 1, "contexts": [(0, budget_ms)]})
    observation, _ = environment.reset()
    first = controller.act({k: torch.as_tensor(v) for k, v in observation.items()}).numpy()
    observation, *_ = environment.step(first)
    second = controller.act({k: torch.as_tensor(v) for k, v in observation.items()}).numpy()
    return SPACE.decode((*first[0, :2], *second[0, 2:]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget_ms", [5.0, 40.0, 200.0])
@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("guarded", [True, False])
def test_serving_equals_the_environment(seed: int, budget_ms: float, has_image: bool, guarded: bool) -> None:
    torch.manual_seed(seed)
    controller, engine = Controller(WIDTH, 16).eval(), _Engine()
    for parameter in controller.parameters():  # far from uniform, so that a wrong input would show
        torch.nn.init.normal_(parameter, std=0.7)
    image = _Picture() if has_image else None
    sample = Sample("s", image, "what?", ("a",))
    guardrail, fits = None, None
    if guarded:
        guardrail = Guardrail(0.9, AnswerLengths.fit(engine.language[None], [2], 0.9), 1.05)
        fits = LatencyPredictor(guardrail, engine, SPACE, _Clock()).predicted_ms(sample) <= budget_ms  # type: ignore[arg-type]
    serving = RequestController(FusedController(controller), SPACE, budget_ms, _Clock.reference_ms, fits)
    tier, insertion = serving.decide_stage1(engine.language, has_image)
    top_k, blocks = serving.decide_stage2(engine.tokens[serving.level, insertion - 1], insertion)
    wanted = _environment_choice(controller, engine, sample, budget_ms, guardrail)
    assert serving.feasible == (fits is None or bool(fits.any()))
    if fits is not None:
        assert fits[SPACE.encode(wanted)] if fits.any() else wanted == SPACE.cheapest
    assert serving.knobs == wanted
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
    levels = [RequestController(FusedController(controller), SPACE, ms, 80.0).level for ms in np.geomspace(5, 300, 30)]
    assert levels == sorted(levels)
    assert len(set(levels)) > 8
