"""Rules fitted on the outcomes of all plans on training samples: one interface, with or without the guardrail.

A rule scores every plan for every request; the best of those allowed is chosen: with the guardrail those predicted to
fit this very request, without it those that kept the budget on nearly all training samples. Predict-then-choose rules
score a plan by its predicted accuracy. Numpy and scikit-learn only; rules of two stages are in `two_stage`.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from envs.errors import UserError
from envs.knobs import KNOBS, KnobSpace

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
SAFE_RATE: Final = 0.05
"""Share of training samples on which an allowed plan may exceed the budget, without the guardrail."""
COMPONENTS: Final = 32
"""Principal components of each wide input of gradient boosting."""


@dataclass(frozen=True)
class KnownOutcomes:
    """All P plans on S training samples.

    Attributes:
        features: (S, D) language features.
        actions: (P, 4) indices of each plan's knobs.
        accuracy, latency_ms: (S, P).
        families: (S,) kinds of question, where the task names them.
        sizes: (S, K) of each request, such as its image's width and height.
        tokens: (S, 15, D) latency tokens after each (tier, position) pair; None for rules that see the question alone.
    """

    features: Array
    actions: IntArray
    accuracy: Array
    latency_ms: Array
    families: npt.NDArray[Any] | None = None
    sizes: Array | None = None
    tokens: Array | None = None

    def __post_init__(self) -> None:
        samples, plans = self.accuracy.shape
        if not samples or self.latency_ms.shape != (samples, plans) or len(self.features) != samples:
            raise UserError(
                f"outcomes of shape {self.accuracy.shape} do not go with latencies {self.latency_ms.shape} and "
                f"{len(self.features)} features: give one row per sample and at least one sample"
            )


@dataclass(frozen=True)
class Requests:
    """B requests to choose for.

    Attributes:
        features: (B, D).
        budget_ms: (B,).
        predicted_ms: (B, P) latencies with the guardrail's margin; None chooses without the guardrail.
        families: (B,), where the task names them.
        accuracy: (B, P) true accuracies, for the oracle alone.
        sizes, tokens: as in `KnownOutcomes`, for the requests.
        log_ratio: (B,) log(observed budget / reference latency), for trained controllers.
    """

    features: Array
    budget_ms: Array
    predicted_ms: Array | None = None
    families: npt.NDArray[Any] | None = None
    accuracy: Array | None = None
    sizes: Array | None = None
    tokens: Array | None = None
    log_ratio: Array | None = None


class Scores(Protocol):
    """What a rule makes of B requests."""

    def best(self, allowed: BoolArray) -> IntArray:
        """Plan (B,) with the highest score among those allowed (B, P); -1 for a request with none."""


@dataclass(frozen=True)
class PlanScores:
    """One score per plan, (B, P); those of -inf are never chosen."""

    values: Array

    def best(self, allowed: BoolArray) -> IntArray:
        scores = np.where(allowed, self.values, -np.inf)
        return np.where(np.isfinite(scores).any(1), scores.argmax(1), -1)


class Rule(ABC):
    """A way to score plans.

    Attributes:
        name: for reports.
        ignores_budget: without the guardrail it takes its favorite plan whatever the budget.
    """

    name: str
    ignores_budget = False

    @abstractmethod
    def fit(self, known: KnownOutcomes) -> None: ...

    @abstractmethod
    def scores(self, requests: Requests) -> Scores: ...


def allowed_plans(rule: Rule, known: KnownOutcomes, requests: Requests, margin: float = 1.0) -> BoolArray:
    """Plans (B, P) that `rule` may choose: with the guardrail those predicted to fit, else those safe in training.

    Args:
        margin: factor on the latencies that are compared with the budget.
    """
    if requests.predicted_ms is not None:
        return requests.predicted_ms * margin <= requests.budget_ms[:, None]
    if rule.ignores_budget:
        return np.ones((len(requests.budget_ms), known.accuracy.shape[1]), np.bool_)
    budgets, rows = np.unique(requests.budget_ms, return_inverse=True)
    return np.stack([(known.latency_ms * margin > ms).mean(0) for ms in budgets])[rows] <= SAFE_RATE


def choose(
    rule: Rule, known: KnownOutcomes, requests: Requests, margin: float = 1.0, scores: Scores | None = None
) -> IntArray:
    """Plan (B,) of each request, by a fitted rule; if none is allowed, the plan that is cheapest on average.

    Args:
        margin: see `allowed_plans`.
        scores: of these requests; None computes them.
    """
    found = (scores or rule.scores(requests)).best(allowed_plans(rule, known, requests, margin))
    return np.where(found < 0, known.latency_ms.mean(0).argmin(), found)


class _ByPlan(Rule):
    """One score per plan, the same for every request."""

    _scores: Array

    def scores(self, requests: Requests) -> PlanScores:
        return PlanScores(np.broadcast_to(self._scores, (len(requests.budget_ms), len(self._scores))))


class Full(_ByPlan):
    """The most expensive plan; with the guardrail the most expensive that fits."""

    name = "full"
    ignores_budget = True

    def fit(self, known: KnownOutcomes) -> None:
        self._scores = known.latency_ms.mean(0)


class Cheapest(_ByPlan):
    """The cheapest plan."""

    name = "cheapest"
    ignores_budget = True

    def fit(self, known: KnownOutcomes) -> None:
        self._scores = -known.latency_ms.mean(0)


class BestMean(_ByPlan):
    """The plan of best mean accuracy: one plan per budget without the guardrail, best mean among feasible with it."""

    name = "best mean"

    def fit(self, known: KnownOutcomes) -> None:
        self._scores = known.accuracy.mean(0)


class SingleKnob(_ByPlan):
    """A controller of one knob: the others stay as in the full plan; the best mean accuracy counts."""

    def __init__(self, knob: str = "tier") -> None:
        if knob not in KNOBS:
            raise UserError(f"knob {knob!r} is not known: choose one of {', '.join(KNOBS)}")
        self.name = f"{knob} alone"
        self._others = [index for index, name in enumerate(KNOBS) if name != knob]

    def fit(self, known: KnownOutcomes) -> None:
        full = np.array(KnobSpace.encode(KnobSpace.full))
        mine = (known.actions[:, self._others] == full[self._others]).all(axis=1)
        self._scores = np.where(mine, known.accuracy.mean(0), -np.inf)


@dataclass
class RandomFeasible(Rule):
    """Every allowed plan equally likely, seeded."""

    seed: int = 0
    name = "random"

    def fit(self, known: KnownOutcomes) -> None:
        self._plans = known.accuracy.shape[1]

    def scores(self, requests: Requests) -> PlanScores:
        return PlanScores(np.random.default_rng(self.seed).random((len(requests.budget_ms), self._plans)))


@dataclass
class MeanByFamily(Rule):
    """Mean accuracy within the request's kind of question; of all samples where that was never seen.

    Attributes:
        prior: weight of the overall mean, in samples.
    """

    prior: float = 2.0
    name = "per family"

    def fit(self, known: KnownOutcomes) -> None:
        if known.families is None:
            raise UserError("the task does not name families of questions: leave out the rule per family")
        self._mean = known.accuracy.mean(0)
        self._means = {}
        for family in np.unique(known.families):
            rows = known.accuracy[known.families == family]
            self._means[family] = (rows.sum(0) + self.prior * self._mean) / (len(rows) + self.prior)

    def scores(self, requests: Requests) -> PlanScores:
        if requests.families is None:
            raise UserError("requests without families cannot be chosen for by the rule per family")
        return PlanScores(np.stack([self._means.get(family, self._mean) for family in requests.families]))


class Oracle(Rule):
    """The right plan of each request: unattainable, an upper bound. Ties go to better plans on average."""

    name = "oracle (unattainable)"

    def fit(self, known: KnownOutcomes) -> None:
        self._mean = known.accuracy.mean(0)

    def scores(self, requests: Requests) -> PlanScores:
        if requests.accuracy is None:
            raise UserError("the oracle needs the true accuracies of the requests")
        return PlanScores(requests.accuracy + 1e-6 * self._mean)


class _Predictor(Rule):
    """Predicted accuracy of every plan from the language feature, by a scikit-learn model of several outputs."""

    def fit(self, known: KnownOutcomes) -> None:
        self._model = fit_regressor(self._regressor(len(known.features)), known.features, known.accuracy)

    def scores(self, requests: Requests) -> PlanScores:
        return PlanScores(np.asarray(self._model.predict(requests.features), np.float64))

    @abstractmethod
    def _regressor(self, samples: int) -> Any: ...


class Ridge(_Predictor):
    """Ridge regression; the penalty by leave-one-out cross-validation."""

    name = "ridge"

    def _regressor(self, samples: int) -> Any:
        from sklearn.linear_model import RidgeCV

        return RidgeCV(alphas=np.logspace(-1, 4, 11))


@dataclass
class Nearest(_Predictor):
    """Mean over the k training questions nearest in the language feature."""

    neighbors: int = 16
    name = "k nearest"

    def _regressor(self, samples: int) -> Any:
        from sklearn.neighbors import KNeighborsRegressor

        return KNeighborsRegressor(n_neighbors=min(self.neighbors, samples))


@dataclass
class Neural(_Predictor):
    """A small MLP with weight decay."""

    seed: int = 0
    name = "MLP"

    def _regressor(self, samples: int) -> Any:
        return small_network(self.seed)


def small_network(seed: int) -> Any:
    """An MLP of one hidden layer with weight decay."""
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(hidden_layer_sizes=(64,), alpha=1.0, max_iter=100, random_state=seed)


def fit_regressor(regressor: Any, inputs: Array, targets: Array) -> Any:
    """A scikit-learn regressor fitted on standardized inputs (N, D), targets (N, K)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weight decay, not the optimizer, sets the fit
        return make_pipeline(StandardScaler(), regressor).fit(inputs, targets)


@dataclass
class Boosted(Rule):
    """Gradient boosting over (request, plan) rows: the practical ceiling.

    A row has the main components of the language feature and of the latency tokens, the sizes and the knobs.
    """

    iterations: int = 200
    seed: int = 0
    name = "gradient boosting"

    def fit(self, known: KnownOutcomes) -> None:
        from sklearn.decomposition import PCA
        from sklearn.ensemble import HistGradientBoostingRegressor

        self._actions = known.actions
        self._parts = [PCA(min(COMPONENTS, *rows.shape)).fit(rows) for rows in _dense(known)]
        self._model = HistGradientBoostingRegressor(
            max_iter=self.iterations,
            learning_rate=0.1,
            max_leaf_nodes=31,
            l2_regularization=1.0,
            random_state=self.seed,
        )
        self._model.fit(self._rows(known), known.accuracy.reshape(-1))

    def scores(self, requests: Requests) -> PlanScores:
        predicted = self._model.predict(self._rows(requests))
        return PlanScores(np.asarray(predicted, np.float64).reshape(len(requests.features), -1))

    def _rows(self, some: Requests | KnownOutcomes) -> Array:
        parts = [part.transform(rows) for part, rows in zip(self._parts, _dense(some), strict=True)]
        features = np.hstack([*parts, *([] if some.sizes is None else [some.sizes])])
        plans = len(self._actions)
        return np.hstack((np.repeat(features, plans, axis=0), np.tile(self._actions, (len(features), 1))))


def _dense(some: Requests | KnownOutcomes) -> list[Array]:
    """Wide inputs that boosting reads by their main components: the question, and the tokens of all pairs."""
    return [some.features, *([] if some.tokens is None else [some.tokens.reshape(len(some.tokens), -1)])]
