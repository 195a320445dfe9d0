"""A comparison without a model: two kinds of questions, latencies of plans and noise, all made up."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from envs.budgets import BudgetDistribution
from envs.knobs import KnobSpace
from ray_ctrl.comparison import outcomes
from ray_ctrl.comparison.outcomes import PlanOutcomes

SPACE = KnobSpace([1.0 - 0.05 * block for block in range(16)])
ACTIONS = np.array([SPACE.encode(knobs) for knobs in SPACE.all])
BUDGETS = BudgetDistribution.over(20.0, 50.0)


class Picture:
    size = (64, 48)

    def load(self) -> Any:
        return Image.fromarray(np.full((48, 64, 3), 90, np.uint8))


def made_up(samples: int, seed: int) -> PlanOutcomes:
    """Two samples an image. Even families need the high tier, odd ones many blocks; latency has 5 % noise."""
    rng = np.random.default_rng(seed)
    family = rng.integers(0, 2, samples)
    features = np.eye(8)[family] + 0.05 * rng.normal(size=(samples, 8))
    right = np.where(family[:, None] == 0, ACTIONS[:, 0] == 2, ACTIONS[:, 3] == 4)
    accuracy = np.where(rng.random(right.shape) < 0.05, ~right, right).astype(float)
    size = rng.uniform(0.8, 1.2, samples)
    predicted = size[:, None] * (10.0 + ACTIONS @ np.array([8.0, 0.5, 1.0, 4.0]))
    latency = predicted * np.exp(0.05 * rng.normal(size=predicted.shape))
    asked = [
        SimpleNamespace(question=f"Question {i}?", family=f"family {f}", answers=("yes", "yes"), image=Picture())
        for i, f in enumerate(family)
    ]
    engine = SimpleNamespace(shape=lambda sample, tier: SimpleNamespace(prompt_tokens=10))
    resources: Any = SimpleNamespace(
        samples=asked, space=SPACE, engine=engine, clock=SimpleNamespace(reference_ms=50.0), budgets=BUDGETS
    )
    return PlanOutcomes(
        resources,
        ACTIONS,
        accuracy,
        latency,
        predicted,
        np.where(accuracy > 0.5, "yes", "no"),
        features,
        np.arange(samples) // 2,
        np.array([sample.family for sample in asked]),
    )


@pytest.fixture(scope="session")
def sets() -> tuple[PlanOutcomes, PlanOutcomes, PlanOutcomes]:
    """Training, validation and test samples; the latency token says which family it is."""
    patch = pytest.MonkeyPatch()
    patch.setattr(outcomes.PlanOutcomes, "tokens", lambda self, level: np.repeat(self.features[:, None], 15, axis=1))
    yield made_up(120, 0), made_up(150, 1), made_up(200, 2)  # type: ignore[misc]
    patch.undo()
