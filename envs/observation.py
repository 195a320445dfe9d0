"""The controller's observation at each stage, for a batch of B requests."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.env_resources import EnvResources
from envs.knobs import INSERTIONS, PAIRS, TIERS, BoolArray
from envs.latency_token import budget_level
from envs.schedule import Context

Observation = dict[str, npt.NDArray[Any]]
Fits = Sequence[BoolArray | None]


def observation_bounds(d_model: int) -> dict[str, tuple[float, float, int]]:
    """Lowest value, highest value and width of each part of an observation.

    `stage` is 0 or 1; `budget` is log(budget / latency of the full plan on the reference request); `language_feature`
    is zero at stage 2, `latency_token` at stage 1; `insertion` is 0 at stage 1, then the chosen position; `action_mask`
    is 1 for each legal pair: the 15 of stage 1, then the 25 of stage 2.
    """
    return {
        "stage": (0.0, 1.0, 1),
        "budget": (-math.inf, math.inf, 1),
        "language_feature": (-math.inf, math.inf, d_model),
        "latency_token": (-math.inf, math.inf, d_model),
        "insertion": (0.0, float(max(INSERTIONS)), 1),
        "action_mask": (0.0, 1.0, PAIRS),
    }


def plans_that_fit(resources: EnvResources, contexts: Sequence[Context]) -> Fits:
    """Which plans (3, 5, 5, 5) are predicted to meet each request's budget; None each without a guardrail."""
    predictor = resources.predictor
    if predictor is None:
        return [None] * len(contexts)
    distinct = {(context.sample, context.budget_ms) for context in contexts}
    known = {key: predictor.predicted_ms(resources.samples[key[0]]) <= key[1] for key in distinct}
    return [known[context.sample, context.budget_ms] for context in contexts]


def observe_question(
    resources: EnvResources, contexts: Sequence[Context], log_ratios: Sequence[float], fits: Fits
) -> Observation:
    """Stage 1: the question's language feature, the budget, and the legal (tier, insertion) pairs."""
    observation = _blank(resources, 0, log_ratios)
    distinct, rows = np.unique([context.sample for context in contexts], return_inverse=True)
    samples = [resources.samples[int(index)] for index in distinct]
    observation["language_feature"][:] = resources.engine.language_features(samples).numpy()[rows]
    known: dict[tuple[int, float], BoolArray] = {}
    for row, context in enumerate(contexts):
        key = (context.sample, context.budget_ms)
        if key not in known:
            has_image = resources.samples[context.sample].image is not None
            known[key] = resources.space.stage1_mask(has_image=has_image, fits=fits[row])
        observation["action_mask"][row] = known[key]
    return observation


def observe_latency_token(
    resources: EnvResources,
    contexts: Sequence[Context],
    log_ratios: Sequence[float],
    fits: Fits,
    choices: npt.NDArray[np.int64],
) -> Observation:
    """Stage 2: the latency token after the chosen position, the budget, and the legal (top-k, blocks) pairs.

    Args:
        choices: (B, 4); the first two are those of stage 1.
    """
    observation = _blank(resources, 1, log_ratios)
    insertions = choices[:, 1] + 1
    keys = [
        (context.sample, TIERS[tier], budget_level(log_ratio))
        for context, tier, log_ratio in zip(contexts, choices[:, 0].tolist(), log_ratios, strict=True)
    ]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    samples, tiers, levels = zip(*places, strict=True)
    tokens = resources.engine.latency_tokens([resources.samples[s] for s in samples], tiers, levels)
    rows = np.array([places[key] for key in keys])
    observation["latency_token"][:] = tokens.numpy()[rows, insertions - 1]
    observation["insertion"][:, 0] = insertions
    known: dict[tuple[int, float, int, int], BoolArray] = {}
    for row, (context, (tier, place)) in enumerate(zip(contexts, choices[:, :2].tolist(), strict=True)):
        key = (context.sample, context.budget_ms, tier, place)
        if key not in known:
            fitting = fits[row]
            known[key] = resources.space.stage2_mask(
                INSERTIONS[place], None if fitting is None else fitting[tier, place]
            )
        observation["action_mask"][row] = known[key]
    return observation


def _blank(resources: EnvResources, stage: int, log_ratios: Sequence[float]) -> Observation:
    count = len(log_ratios)
    observation = {
        name: np.zeros((count, width), np.float32)
        for name, (_, _, width) in observation_bounds(resources.d_model).items()
    }
    observation["stage"][:] = stage
    observation["budget"][:, 0] = log_ratios
    return observation
