"""A trained controller at work on one request, as the engine's timed runs take it."""

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


def shown_budget(budget_ms: float, metadata: Mapping[str, Any], reference_ms: float) -> float:
    """The budget that a controller is shown: `budget_ms`, or the nearest one that it was trained for.

    Args:
        metadata: what was exported with the controller: its budgets, and the latency of the reference request there.
        reference_ms: that latency here.

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
        metadata: what was exported with the controller. None is returned if it has no guardrail with a profile.
        reference_ms: latency of the reference request here; predictions are scaled by its ratio to that in training.
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


class Steering:
    """Decides both stages by argmax, from the observations that the environment shows in training.

    Args:
        space: of the model being steered.
        budget_ms, reference_ms: the budget that the controller observes, and the device's reference latency it is seen
            relative to.
        fits: (3, 5, 5, 5), which plans are predicted to meet the request's budget; None without a guardrail.
    """

    def __init__(
        self,
        controller: Controller,
        space: KnobSpace,
        budget_ms: float,
        reference_ms: float,
        fits: BoolArray | None = None,
    ) -> None:
        self.controller, self.space = controller, space
        log_ratio = math.log(budget_ms / reference_ms)
        self.level = budget_level(log_ratio)
        self.budget = torch.tensor([[log_ratio]], dtype=torch.float32)
        self.none = torch.zeros(1, controller.d_model)
        self.knobs: Knobs | None = None
        self._first = ("", 0)
        self.fits = fits

    @property
    def feasible(self) -> bool:
        """Whether some plan is predicted to meet the budget; without a guardrail nobody can tell, and it is true."""
        return self.fits is None or bool(self.fits.any())

    def first(self, language_feature_D: Tensor, has_image: bool) -> tuple[str, int]:
        """Tier and insertion position."""
        mask = self.space.stage1_mask(has_image=has_image, fits=self.fits)
        action = self._act(language_feature_D[None].float().cpu(), self.none, 0, mask)
        self._first = (TIERS[action[0]], INSERTIONS[action[1]])
        return self._first

    def second(self, latency_token_D: Tensor, insertion: int) -> tuple[int, tuple[int, ...]]:
        """Top-k and kept blocks."""
        tier = self._first[0] or TIERS[0]
        fits = None if self.fits is None else self.fits[TIERS.index(tier), INSERTIONS.index(insertion)]
        mask = self.space.stage2_mask(insertion, fits)
        action = self._act(self.none, latency_token_D[None].float().cpu(), insertion, mask)
        self.knobs = self.space.decode((TIERS.index(tier), INSERTIONS.index(insertion), action[2], action[3]))
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
