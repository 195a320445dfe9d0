"""A trained controller that serves one request, as the engine's timed runs use it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from envs.budgets import BudgetDistribution
from envs.data.sample import Sample
from envs.knobs import INSERTIONS, TIERS, TOP_KS, BoolArray, Knobs, KnobSpace
from envs.latency.guardrail import Guardrail, LatencyPredictor
from envs.latency_token import budget_level
from policies.controller import Controller


def clamped_budget_ms(budget_ms: float, metadata: Mapping[str, Any], reference_ms: float) -> float:
    """`budget_ms` clamped to the training range: a controller does not extrapolate reliably.

    Args:
        metadata: of the exported controller: its budgets, and the reference latency they were drawn for.
        reference_ms: reference latency of this device; the range scales with it.

    Raises:
        UserError: budgets that cannot be read.
    """
    if not {"budgets", "reference_ms"} <= set(metadata):
        return budget_ms
    scale = reference_ms / metadata["reference_ms"]
    return BudgetDistribution.restored(metadata["budgets"]).nearest(budget_ms, scale)


def plans_within(
    metadata: Mapping[str, Any], engine: Any, space: KnobSpace, sample: Sample, budget_ms: float, reference_ms: float
) -> BoolArray | None:
    """Which plans (3, 5, 5, 5) the exported guardrail predicts to meet the budget on this device's wall clock.

    Args:
        metadata: of the exported controller. None is returned if it has no guardrail with a profile.
        reference_ms: reference latency of this device; predictions scale with it.
    """
    if not metadata.get("guardrail"):
        return None
    guardrail = Guardrail.from_dict(metadata["guardrail"])
    if guardrail.costs is None:
        return None
    predictor = LatencyPredictor(guardrail, engine, space, None, factor=guardrail.noise)
    scale = reference_ms / float(metadata["reference_ms"])
    fits: BoolArray = predictor.predicted_ms(sample) * scale <= budget_ms
    return fits


class RequestController:
    """Decides both stages of one request by argmax, on the observations that the environment gives in training.

    Args:
        space: of the model that is served.
        budget_ms, reference_ms: the observed budget and this device's reference latency, which scales it.
        fits: (3, 5, 5, 5), which plans are predicted to meet the budget; None without a guardrail.
    """

    def __init__(
        self,
        controller: Controller,
        space: KnobSpace,
        budget_ms: float,
        reference_ms: float,
        fits: BoolArray | None = None,
    ) -> None:
        self.controller, self.space, self.fits = controller, space, fits
        log_ratio = math.log(budget_ms / reference_ms)
        self.level = budget_level(log_ratio)
        self.budget = torch.tensor([[log_ratio]], dtype=torch.float32)
        self.none = torch.zeros(1, controller.d_model)
        self.knobs: Knobs | None = None
        self._tier = 0

    @property
    def feasible(self) -> bool:
        """Whether some plan is predicted to meet the budget; true without a guardrail, which alone can tell."""
        return self.fits is None or bool(self.fits.any())

    def decide_stage1(self, language_feature_D: Tensor, has_image: bool) -> tuple[str, int]:
        """Tier and insertion position."""
        mask = self.space.stage1_mask(has_image=has_image, fits=self.fits)
        action = self._act(language_feature_D[None].float().cpu(), self.none, 0, mask)
        self._tier = action[0]
        return TIERS[action[0]], INSERTIONS[action[1]]

    def decide_stage2(self, latency_token_D: Tensor, insertion: int) -> tuple[int, tuple[int, ...]]:
        """Top-k and kept blocks."""
        position = INSERTIONS.index(insertion)
        mask = self.space.stage2_mask(insertion, None if self.fits is None else self.fits[self._tier, position])
        action = self._act(self.none, latency_token_D[None].float().cpu(), insertion, mask)
        self.knobs = self.space.decode((self._tier, position, action[2], action[3]))
        return TOP_KS[action[2]], self.space.plan(self.knobs).blocks

    def _act(self, language: Tensor, token: Tensor, insertion: int, mask: object) -> list[int]:
        observation = {
            "budget": self.budget,
            "language_feature": language,
            "latency_token": token,
            "insertion": torch.tensor([[float(insertion)]]),
            "action_mask": torch.as_tensor(mask, dtype=torch.float32)[None],
        }
        chosen: list[int] = self.controller.act(observation)[0].tolist()
        return chosen
