"""A trained controller that serves one request, as the engine's timed runs use it."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from envs.budgets import BudgetDistribution
from envs.knobs import INSERTIONS, TIERS, TOP_KS, BoolArray, Knobs, KnobSpace
from envs.latency_token import budget_level
from policies.fused import FusedController


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


class RequestController:
    """Decides both stages of one request by argmax, on the observations that the environment gives in training.

    Args:
        space: of the model that is served.
        budget_ms, reference_ms: the observed budget and this device's reference latency, which scales it.
        fits: (3, 5, 5, 5), which plans are predicted to meet the budget; None without a guardrail.
    """

    def __init__(
        self,
        controller: FusedController,
        space: KnobSpace,
        budget_ms: float,
        reference_ms: float,
        fits: BoolArray | None = None,
    ) -> None:
        self.controller, self.space, self.fits = controller, space, fits
        log_ratio = math.log(budget_ms / reference_ms)
        self.level = budget_level(log_ratio)
        self.terms = controller.budget_terms(log_ratio)
        self.knobs: Knobs | None = None
        self._first = (0, 0)

    @property
    def feasible(self) -> bool:
        """Whether some plan is predicted to meet the budget; true without a guardrail, which alone can tell."""
        return self.fits is None or bool(self.fits.any())

    def decide_stage1(self, language_feature_D: Tensor, has_image: bool) -> tuple[str, int]:
        """Tier and insertion position."""
        legal = self.space.stage1_mask(has_image=has_image, fits=self.fits)
        self._first = self.controller.decide_stage1(language_feature_D.float().cpu().numpy(), self.terms[0], legal)
        return TIERS[self._first[0]], INSERTIONS[self._first[1]]

    def decide_stage2(self, latency_token_D: Tensor, insertion: int) -> tuple[int, tuple[int, ...]]:
        """Top-k and kept blocks."""
        tier, position = self._first[0], INSERTIONS.index(insertion)
        legal = self.space.stage2_mask(insertion, None if self.fits is None else self.fits[tier, position])
        token_D = latency_token_D.float().cpu().numpy()
        second = self.controller.decide_stage2(token_D, self.terms[1], insertion, legal)
        self.knobs = self.space.decode((tier, position, *second))
        return TOP_KS[second[0]], self.space.plan(self.knobs).blocks
