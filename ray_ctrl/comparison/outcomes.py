"""Outcomes, latencies and predictions of all plans on the samples of one split."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from envs.env_resources import EnvConfig, EnvResources
from envs.errors import UserError
from envs.knobs import TIERS
from envs.latency.guardrail import plan_latencies
from envs.latency_token import LEVELS, budget_level
from policies.baselines.rules import Array, KnownOutcomes, Requests
from ray_ctrl.all_plans import fill_store, run_all_plans

RULE_LEVEL: Final = LEVELS // 2
"""Budget level of the latency tokens that rules read: they take the budget from the mask."""


@dataclass(frozen=True, eq=False)
class PlanOutcomes:
    """All P plans on S samples.

    Attributes:
        actions: (P, 4) indices of each plan's knobs.
        accuracy: (S, P).
        latency_ms: (S, P) by the latency source, with its noise where that is on.
        predicted_ms: (S, P) by the guardrail, or without one by the latency source; infinite where not allowed.
        answers: (S, P) texts.
        features: (S, D) language features.
        images: (S,) which image each sample asks about; samples without one count as images of their own.
        families: (S,) kinds of question; None if the task names none.
    """

    resources: EnvResources
    actions: npt.NDArray[np.int64]
    accuracy: Array
    latency_ms: Array
    predicted_ms: Array
    answers: npt.NDArray[Any]
    features: Array
    images: npt.NDArray[np.int64]
    families: npt.NDArray[Any] | None

    @property
    def cheapest(self) -> int:
        """Index of the cheapest plan."""
        return int(self.latency_ms.mean(0).argmin())

    def known(self, rows: Any = slice(None)) -> KnownOutcomes:
        """What rules are fitted on; `rows` selects samples."""
        return KnownOutcomes(
            self.features[rows],
            self.actions,
            self.accuracy[rows],
            self.latency_ms[rows],
            None if self.families is None else self.families[rows],
            self.sizes[rows],
            self.tokens(RULE_LEVEL)[rows],
        )

    def requests(self, budget_ms: float, observed_ms: float | None = None, *, masked: bool = True) -> Requests:
        """Every sample under one budget.

        Args:
            observed_ms: budget in the observation of a trained controller; None is for rules.
            masked: with the guardrail's predictions.
        """
        ratio = 0.0 if observed_ms is None else math.log(observed_ms / self.resources.clock.reference_ms)
        return Requests(
            self.features,
            np.full(len(self.features), budget_ms),
            self.predicted_ms if masked else None,
            self.families,
            self.accuracy,
            self.sizes,
            self.tokens(RULE_LEVEL if observed_ms is None else budget_level(ratio)),
            np.full(len(self.features), ratio),
        )

    @cached_property
    def sizes(self) -> Array:
        """(S, 5): width and height of the image, prompt tokens at the three tiers."""
        engine, samples = self.resources.engine, self.resources.samples
        return np.array(
            [
                [*(s.image.size if s.image else (0, 0)), *(engine.shape(s, tier).prompt_tokens for tier in TIERS)]
                for s in samples
            ],
            np.float64,
        )

    @cache  # noqa: B019 (the few sets of a comparison are kept to its end)
    def tokens(self, level: int) -> Array:
        """Latency tokens (S, 15, D) after each (tier, position) pair, at one budget level."""
        samples = [sample for sample in self.resources.samples for _ in TIERS]
        found = self.resources.engine.latency_tokens(samples, list(TIERS) * len(self.features), [level] * len(samples))
        return found.numpy().astype(np.float64).reshape(len(self.features), -1, found.shape[-1])


def run_all(config: EnvConfig, what: str) -> PlanOutcomes:
    """Runs every plan on every sample of a split, as far as the store does not know the outcome.

    Args:
        what: the samples' name in progress lines.

    Raises:
        UserError: a measuring latency source.
    """
    if config.latency.source == "measured":
        raise UserError(
            "latency.source=measured cannot time every plan of every sample: compare with latency.source=profiled, and "
            "time a controller with ray-ctrl evaluate RUN latency.source=measured"
        )
    resources = fill_store(config, what)
    samples, space, clock = resources.samples, resources.space, resources.clock
    plans = [space.plan(knobs) for knobs in space.all]
    actions = np.array([space.encode(knobs) for knobs in space.all])
    place = tuple(actions.T)
    shape = (len(samples), len(plans))
    accuracy, latency, predicted, answers = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.empty(shape, object)
    execution = space.executions[place]
    for row, (sample, distinct) in enumerate(zip(samples, run_all_plans(resources, samples, what), strict=True)):
        outcomes = [distinct[number] for number in execution]
        accuracy[row] = [resources.engine.accuracy(sample, outcome) for outcome in outcomes]
        answers[row] = [resources.engine.text(outcome) for outcome in outcomes]
        shapes = [resources.engine.shape(sample, tier) for tier in TIERS]
        lengths = np.array([outcome.n_tokens for outcome in outcomes])
        for length in np.unique(lengths):
            found = plan_latencies(clock, space, shapes, int(length))[place]  # type: ignore[arg-type]
            latency[row] = np.where(lengths == length, found, latency[row])
        if resources.noise is not None:
            latency[row] *= [resources.noise.factor(sample.id, plan) for plan in plans]
        predicted[row] = _predicted(resources, sample, shapes)[place]
    images = [sample.image.digest if sample.image else sample.id for sample in samples]
    families = [sample.family for sample in samples]
    return PlanOutcomes(
        resources,
        actions,
        accuracy,
        latency,
        predicted,
        answers,
        resources.engine.language_features(samples).numpy().astype(np.float64),
        np.unique(images, return_inverse=True)[1],
        np.array(families) if all(families) else None,
    )


def _predicted(resources: EnvResources, sample: Any, shapes: Any) -> Array:
    """Predicted latency, ms, of every action (3, 5, 5, 5)."""
    if resources.predictor is not None:
        found = np.array(resources.predictor.predicted_ms(sample))
    else:
        found = plan_latencies(resources.clock, resources.space, shapes, 1)  # type: ignore[arg-type]
    if sample.image is None:
        found[1:] = np.inf  # without an image the tier is low
    return found
