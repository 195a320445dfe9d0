"""The guardrail: plans predicted to meet a budget, before the request runs. Pure numpy.

Latency follows from a request's sizes, the plan and the answer's length. The length is predicted from the question as a
quantile over similar questions; unexpected lengths and noise are covered by one factor on the predicted latency,
calibrated on validation samples by split conformal prediction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, HEAD_SIZES, INSERTIONS, LEGAL, TIERS, TOP_KS, KnobSpace
from envs.latency.clock import Clock
from envs.latency.profiled import stage_ms
from envs.latency.record import LatencyRecord, RequestShape

if TYPE_CHECKING:
    from envs.contracts import Engine

Array = npt.NDArray[np.float64]
WIDTH: Final = 32
"""Dimensions of a question's key: distances survive a random projection (Johnson and Lindenstrauss 1984)."""
NEIGHBORS: Final = 16
_ENTRIES: Final = 1 << 14
"""Request sizes whose predictions are remembered; a server sees no end of them."""


class Costs(Protocol):
    """Predicts latencies: a `Clock` or `ProfileCosts`."""

    def latency(self, shape: RequestShape, plan: Any, new_tokens: int) -> LatencyRecord: ...


@dataclass(frozen=True)
class ProfileCosts:
    """A profile's fitted costs, without its measurements.

    Attributes:
        stages: cost, ms, of each quantity of each stage (see `envs.latency.profiled.quantities`).
    """

    stages: Mapping[str, Sequence[float]]

    def latency(self, shape: RequestShape, plan: Any, new_tokens: int) -> LatencyRecord:
        return LatencyRecord(*stage_ms(self.stages, shape, plan.insertion, plan.top_k, len(plan.blocks), new_tokens))

    def all_plans(self, shapes: Sequence[RequestShape], new_tokens: int) -> Array:
        """Latency, ms, of every action at one answer length, (3, 5, 5, 5), illegal ones included.

        Args:
            shapes: sizes of the request at the three tiers.
        """
        names = ("prompt_tokens", "crops", "pixels")
        columns = np.array([[getattr(shape, name) for shape in shapes] for name in names]).reshape(3, -1, 1, 1, 1)
        insertion, top_k, blocks = np.ix_(np.array(INSERTIONS), np.array(TOP_KS), np.array(BLOCK_COUNTS))
        sizes = SimpleNamespace(**dict(zip(names, columns, strict=True)))
        return np.asarray(sum(stage_ms(self.stages, sizes, insertion, top_k, blocks, new_tokens)))


@dataclass(frozen=True)
class AnswerLengths:
    """Predicts an answer's length as a quantile over the nearest known questions.

    Attributes:
        keys: (S, 32) of the known questions.
        lengths: (S, R) tokens of their answers under R plans.
        quantile: over all answers to the nearest questions, 0 to 1.
    """

    keys: tuple[tuple[float, ...], ...]
    lengths: tuple[tuple[int, ...], ...]
    quantile: float

    @classmethod
    def fit(cls, features: npt.ArrayLike, lengths: npt.ArrayLike, quantile: float) -> "AnswerLengths":
        """The model of S questions.

        Args:
            features: (S, D) language features.
            lengths: (S,) or (S, R): lengths of R answers to the same question under several plans.

        Raises:
            UserError: no questions, or a quantile outside 0 to 1.
        """
        rows = np.asarray(lengths)
        if not rows.size or not 0.0 <= quantile <= 1.0:
            raise UserError(
                f"{len(rows)} questions at quantile {quantile} do not give a length model: give one answer or more "
                "and a quantile of 0 to 1"
            )
        keys, rows = np.round(_keys(features), 4), rows.reshape(len(rows), -1).astype(int)
        return cls(tuple(map(tuple, keys.tolist())), tuple(map(tuple, rows.tolist())), float(quantile))

    def predict(self, features: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Predicted lengths (B,), 1 or more, for language features (B, D)."""
        keys, lengths = self._known
        distance = ((_keys(features)[:, None] - keys) ** 2).sum(-1)
        nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEIGHBORS]
        near = np.sort(lengths[nearest].reshape(len(nearest), -1), axis=1)
        place = math.ceil((near.shape[1] - 1) * self.quantile)  # the quantile, the higher of two neighbors
        return np.maximum(near[:, place], 1)

    @cached_property
    def _known(self) -> tuple[Array, npt.NDArray[np.int64]]:
        return np.asarray(self.keys, np.float64), np.asarray(self.lengths, np.int64)


@dataclass(frozen=True)
class Guardrail:
    """A calibrated guardrail, sent to env runners and exported with the controller.

    Attributes:
        confidence: share of requests that should meet their budget under a plan that just meets it as predicted.
        lengths: predicts the answer's length.
        factor: conformal factor on predicted latencies, for the latency source of training and evaluation.
        noise: factor for serving on the wall clock, at least as large.
        costs: predicts latencies; None takes the latency source in use.
    """

    confidence: float
    lengths: AnswerLengths
    factor: float
    noise: float = 1.0
    costs: ProfileCosts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Guardrail":
        """The inverse of `to_dict`; a UserError if fields are missing or unknown."""
        try:
            values = dict(stored)
            raw = values["lengths"]
            keys = tuple(tuple(map(float, key)) for key in raw["keys"])
            rows = tuple(tuple(map(int, row)) for row in raw["lengths"])
            values["lengths"] = AnswerLengths(keys, rows, float(raw["quantile"]))
            if values.get("costs") is not None:
                values["costs"] = ProfileCosts(values["costs"]["stages"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"guardrail cannot be read ({error!r}): train again, or set guardrail.confidence=null"
            ) from None


class LatencyPredictor:
    """Predicted latencies of all plans of a request.

    Args:
        guardrail: calibrated.
        clock: predicts latencies if the guardrail has no costs.
        factor: on predicted latencies; None takes the guardrail's.
    """

    def __init__(
        self, guardrail: Guardrail, engine: "Engine", space: KnobSpace, clock: Clock | None, factor: float | None = None
    ) -> None:
        costs = guardrail.costs or clock
        if costs is None:
            raise UserError("the guardrail has no profile to predict latencies from: profile this device first")
        self.guardrail, self.engine, self.space, self.costs = guardrail, engine, space, costs
        self.factor = guardrail.factor if factor is None else factor
        self._known: LRUCache[tuple[Any, ...], Array] = LRUCache(_ENTRIES)

    def predicted_ms(self, sample: Any) -> Array:
        """Latency times the conformal factor, ms, of every plan on `sample`, (3, 5, 5, 5); infinite if illegal."""
        shapes = tuple(self.engine.shape(sample, tier) for tier in TIERS)
        key = (shapes, self.length(sample))
        if key not in self._known:
            self._known[key] = plan_latencies(self.costs, self.space, *key) * self.factor
        return self._known[key]

    def length(self, sample: Any) -> int:
        """Predicted length of the answer, tokens."""
        return int(self.guardrail.lengths.predict(self.engine.language_features([sample]).numpy())[0])


def plan_latencies(clock: Costs, space: KnobSpace, shapes: Sequence[RequestShape], new_tokens: int) -> Array:
    """Latency, ms, of every action at one answer length, (3, 5, 5, 5); infinite for illegal actions.

    Args:
        shapes: sizes of the request at the three tiers.
    """
    if isinstance(clock, ProfileCosts):
        return np.where(LEGAL, clock.all_plans(shapes, new_tokens), np.inf)
    ms = np.full(HEAD_SIZES, np.inf)
    known: dict[tuple[RequestShape, Any], float] = {}
    for knobs in space.all:
        action, plan = space.encode(knobs), space.plan(knobs)
        key = (shapes[action[0]], (plan.insertion, plan.top_k, plan.blocks))
        if key not in known:
            known[key] = clock.latency(key[0], plan, new_tokens).total
        ms[action] = known[key]
    return ms


def conformal_factor(ratios: npt.ArrayLike, confidence: float) -> float:
    """Factor f such that measured <= f x predicted for a new request with probability >= `confidence`.

    Split conformal prediction (Papadopoulos et al. 2002; Lei et al. 2018). Ratios of one sample are alike, so samples
    are what is exchangeable (Dunn, Wasserman and Ramdas 2022): f is the ceil((S + 1) R confidence)-th smallest of the
    S R ratios, as if all of a new sample's were larger. Where that rank exceeds S R the largest ratio is taken, and the
    guarantee is S / (S + 1).

    Args:
        ratios: (S,) or (S, R), measured over predicted latency of R requests about each of S samples that prediction
            has not seen.

    Raises:
        UserError: no ratios, one that is not finite and above 0, or a confidence not in (0, 1).
    """
    rows = np.asarray(ratios, np.float64)
    values = np.sort(rows, axis=None)
    if not values.size or not np.isfinite(values).all() or values[0] <= 0 or not 0.0 < confidence < 1.0:
        raise UserError(
            f"{values.size} latency ratios at confidence {confidence} cannot be calibrated: give finite ratios above 0 "
            "and a confidence between 0 and 1"
        )
    rank = math.ceil((values.size + values.size // len(rows)) * confidence)
    return float(values[min(rank, values.size) - 1])


def _keys(features: npt.ArrayLike) -> Array:
    """Unit vectors (B, 32) by a fixed random projection of features (B, D)."""
    rows = np.asarray(features, np.float64)
    keys = np.einsum("bd,dw->bw", rows, _mix(rows.shape[1]))
    return np.asarray(keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12), np.float64)


@lru_cache(maxsize=4)
def _mix(width: int) -> Array:
    """The projection (width, 32)."""
    return np.random.Generator(np.random.Philox(width)).standard_normal((width, WIDTH))
