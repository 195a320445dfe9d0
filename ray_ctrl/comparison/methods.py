"""The methods, the margin of each, and their rollouts.

All rules are fitted on the same samples. Each method has one margin, a factor on predicted latencies, calibrated on
validation samples and training budgets, so that all are compared at equal violation rates.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pandas as pd

from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, INSERTIONS, TIERS, TOP_KS
from policies.baselines import rules
from policies.baselines.rules import Array, KnownOutcomes, Requests, Rule, Scores, allowed_plans, choose
from policies.baselines.two_stage import Trained, ValueHeads
from ray_ctrl.comparison.outcomes import PlanOutcomes

TARGET: Final = 0.03
"""Mean violation rate that the margins aim at on validation, so that a budget rarely has more than 5 %."""
MARGINS: Final = np.geomspace(0.8, 2.0, 47)
FEASIBLE: Final = 0.95
"""A budget is feasible if the cheapest plan meets it for this share of requests."""
ORACLE: Final = "oracle (unattainable)"
ONE_PLAN: Final = "one plan per budget"
WITHOUT: Final = {part: f"without the {part}" for part in ("question", "token", "mask")}
"""Labels of a controller without a part."""


@dataclass(frozen=True)
class Method:
    """A fitted rule or a trained controller, with or without the guardrail.

    Attributes:
        label: for reports; seeds of one method share it.
        observed_ms: budget that a trained controller observes, by budget; empty for rules.
    """

    label: str
    rule: Rule
    masked: bool
    seed: int = 0
    observed_ms: Mapping[float, float] | None = None

    def requests(self, outcomes: PlanOutcomes, budget_ms: float) -> Requests:
        """Every sample of `outcomes` under one budget, as this method sees them."""
        observed = None if self.observed_ms is None else self.observed_ms.get(budget_ms, budget_ms)
        found = outcomes.requests(budget_ms, observed, masked=self.masked)
        return replace(found, predicted_ms=outcomes.latency_ms) if isinstance(self.rule, rules.Oracle) else found


def all_rules(seed: int, families: bool = True) -> list[Rule]:
    """Every rule, not fitted yet; with or without the one per family."""
    found: list[Rule] = [rules.Full(), rules.Cheapest(), rules.RandomFeasible(seed), rules.BestMean()]
    found += [rules.SingleKnob(knob) for knob in ("tier", "top_k", "blocks")]
    found += [rules.MeanByFamily()] if families else []
    learned: list[Rule] = [rules.Nearest(), rules.Ridge(), rules.Neural(seed=seed), ValueHeads(seed=seed)]
    return [*found, *learned, rules.Boosted(seed=seed), rules.Oracle()]


def methods_of(rule: Rule) -> list[Method]:
    """A rule without and with the mask; the cheapest plan needs none, the oracle always has it."""
    if isinstance(rule, rules.Oracle):
        return [Method(ORACLE, rule, True)]
    plain = Method(ONE_PLAN if isinstance(rule, rules.BestMean) else rule.name, rule, False)
    return [plain] if isinstance(rule, rules.Cheapest) else [plain, Method(f"{rule.name} + mask", rule, True)]


def fitted(known: KnownOutcomes, seed: int) -> Iterator[Method]:
    """Every rule fitted on `known`, without and with the mask."""
    for rule in all_rules(seed, known.families is not None):
        rule.fit(known)
        yield from methods_of(rule)


def feasible_budgets(outcomes: PlanOutcomes, budgets: Iterable[float]) -> list[float]:
    """Those that the cheapest plan meets for `FEASIBLE` of the requests."""
    cheapest_ms = outcomes.latency_ms[:, outcomes.cheapest]
    return [ms for ms in budgets if (cheapest_ms <= ms).mean() >= FEASIBLE]


class Choices:
    """What methods choose on one set; the scores of each rule are computed once."""

    def __init__(self, outcomes: PlanOutcomes, known: KnownOutcomes) -> None:
        self.outcomes, self.known = outcomes, known
        self._scores: dict[tuple[int, float], Scores] = {}

    def plans(self, method: Method, budget_ms: float, margin: float) -> np.ndarray:
        """Plan (S,) of each sample."""
        requests = method.requests(self.outcomes, budget_ms)
        return choose(method.rule, self.known, requests, margin, self._scored(method, requests, budget_ms))

    def stuck(self, method: Method, budget_ms: float, margin: float) -> np.ndarray:
        """(S,) whether no plan was allowed, so that the cheapest one runs."""
        requests = method.requests(self.outcomes, budget_ms)
        return np.asarray(~allowed_plans(method.rule, self.known, requests, margin).any(1))

    def _scored(self, method: Method, requests: Requests, budget_ms: float) -> Scores:
        key = (id(method.rule), 0.0 if method.observed_ms is None else budget_ms)
        if key not in self._scores:
            self._scores[key] = method.rule.scores(requests)
        return self._scores[key]

    def violation_rates(self, method: Method, budgets: Sequence[float], margin: float) -> Array:
        """Share of requests over each budget, (budgets,)."""
        rows = np.arange(len(self.outcomes.latency_ms))
        chosen = [self.plans(method, ms, margin) for ms in budgets]
        return np.array(
            [(self.outcomes.latency_ms[rows, p] > ms).mean() for p, ms in zip(chosen, budgets, strict=True)]
        )


def calibrated_margin(method: Method, validation: Choices, budgets: Sequence[float]) -> float:
    """The smallest margin with at most `TARGET` violations over all budgets; NaN if no margin of the grid has that.

    The mean counts, as the largest of several rates is mostly chance. Methods that no margin affects get 1.

    Raises:
        UserError: no budgets.
    """
    if not budgets:
        raise UserError(
            "no budget is feasible on the validation samples: no margin can be calibrated; train with others"
        )
    if isinstance(method.rule, rules.Oracle):
        return 1.0
    affected = method.masked or not method.rule.ignores_budget
    for margin in MARGINS if affected else (1.0,):
        if validation.violation_rates(method, budgets, float(margin)).mean() <= TARGET:
            return float(margin)
    return float("nan")


def rollouts(method: Method, choices: Choices, budgets: Sequence[float], margin: float) -> pd.DataFrame:
    """One row per (sample, budget): what the method chose, and what came of it."""
    outcomes, parts = choices.outcomes, []
    rows = np.arange(len(outcomes.accuracy))
    used = 1.0 if np.isnan(margin) else margin
    for budget_ms in budgets:
        plan = choices.plans(method, budget_ms, used)
        tier, insertion, top_k, blocks = outcomes.actions[plan].T
        latency = outcomes.latency_ms[rows, plan]
        parts.append(
            pd.DataFrame(
                {
                    "method": method.label,
                    "seed": method.seed,
                    "masked": method.masked,
                    "margin": margin,
                    "sample": rows,
                    "image": outcomes.images,
                    "family": None if outcomes.families is None else outcomes.families,
                    "budget_ms": budget_ms,
                    "plan": plan,
                    "tier": np.array(TIERS)[tier],
                    "insertion": insertion + INSERTIONS[0],
                    "top_k": top_k + TOP_KS[0],
                    "blocks": blocks + BLOCK_COUNTS[0],
                    "accuracy": outcomes.accuracy[rows, plan],
                    "latency_ms": latency,
                    "violation": latency > budget_ms,
                    "fallback": choices.stuck(method, budget_ms, used),
                    "answer": outcomes.answers[rows, plan],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def without_parts(method: Method) -> Iterator[Method]:
    """A trained controller without each of its parts; inputs are replaced by their means, nothing is trained again."""
    if not isinstance(method.rule, Trained):
        return
    for part in ("question", "token"):
        yield replace(method, label=WITHOUT[part], rule=replace(method.rule, lacks=(part,)))
    yield replace(method, label=WITHOUT["mask"], masked=False)
