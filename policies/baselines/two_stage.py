"""Methods that decide twice: stage 1 by the question, stage 2 by the latency token."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from envs.errors import UserError
from envs.knobs import HEAD_SIZES, INSERTIONS, PAIRS, STAGE1_PAIRS
from policies.baselines.rules import (
    Array,
    BoolArray,
    IntArray,
    KnownOutcomes,
    Requests,
    Rule,
    fit_regressor,
    small_network,
)
from policies.controller import Controller

SECOND_PAIRS: Final = PAIRS - STAGE1_PAIRS
TEMPERATURE: Final = 0.1
"""Of the soft maximum by which value heads prefer pairs that leave stage 2 a choice; in units of accuracy."""


@dataclass(frozen=True)
class StageScores:
    """Scores of both stages for B requests; a pair of stage 1 is open while any of its completions is allowed.

    Attributes:
        first: (B, 15) of the (tier, position) pairs.
        second: (B, 15, 25) of the (top-k, blocks) pairs after each.
        actions: (P, 4) indices of each plan's knobs.
    """

    first: Array
    second: Array
    actions: IntArray

    def best(self, allowed: BoolArray) -> IntArray:
        before, after = _pairs(self.actions)
        rows = np.arange(len(allowed))
        open_pairs = np.zeros((len(allowed), STAGE1_PAIRS, SECOND_PAIRS), np.bool_)
        open_pairs[:, before, after] = allowed
        first = np.where(open_pairs.any(2), self.first, -np.inf).argmax(1)
        second = np.where(open_pairs[rows, first], self.second[rows, first], -np.inf).argmax(1)
        plans = np.full((STAGE1_PAIRS, SECOND_PAIRS), -1)
        plans[before, after] = np.arange(len(self.actions))
        return np.where(allowed.any(1), plans[first, second], -1)


@dataclass
class Trained(Rule):
    """A trained controller by argmax: what it does in the environment, under any mask.

    Attributes:
        lacks: inputs replaced by their mean over the requests: `question`, `token`.
    """

    controller: Controller
    name: str
    lacks: tuple[str, ...] = ()
    ignores_budget = True

    def fit(self, known: KnownOutcomes) -> None:
        self._actions = known.actions

    @torch.no_grad()
    def scores(self, requests: Requests) -> StageScores:
        if requests.tokens is None or requests.log_ratio is None:
            raise UserError("a trained controller needs latency tokens and observed budgets of the requests")
        features, tokens, count = requests.features, requests.tokens, len(requests.features)
        if "question" in self.lacks:
            features = np.broadcast_to(features.mean(0), features.shape)
        if "token" in self.lacks:
            tokens = np.broadcast_to(tokens.mean(0), tokens.shape)
        pair = np.arange(STAGE1_PAIRS)
        first = self._logits(requests.log_ratio, features, np.zeros_like(features), np.zeros(count))
        second = self._logits(
            np.repeat(requests.log_ratio, STAGE1_PAIRS),
            np.zeros((count * STAGE1_PAIRS, features.shape[1])),
            tokens.reshape(count * STAGE1_PAIRS, -1),
            np.tile(pair % len(INSERTIONS) + INSERTIONS[0], count),
        )
        stages = second[:, STAGE1_PAIRS:].reshape(count, STAGE1_PAIRS, SECOND_PAIRS)
        return StageScores(first[:, :STAGE1_PAIRS], stages, self._actions)

    def _logits(self, log_ratio: Array, features: Array, tokens: Array, insertion: Array) -> Array:
        observation = {
            "budget": log_ratio[:, None],
            "language_feature": features,
            "latency_token": tokens,
            "insertion": insertion[:, None],
            "action_mask": np.ones((len(log_ratio), PAIRS)),
        }
        tensors = {name: torch.tensor(np.asarray(rows), dtype=torch.float32) for name, rows in observation.items()}
        return self.controller(tensors).double().numpy()


@dataclass
class ValueHeads(Rule):
    """Predicts the accuracy of each completion twice: from the question, then from the latency token, too.

    Small MLPs with weight decay on the inputs that the controller has; the budget enters through the mask alone.
    """

    seed: int = 0
    name = "value heads"

    def fit(self, known: KnownOutcomes) -> None:
        if known.tokens is None:
            raise UserError("value heads need the latency tokens of the training samples")
        before, after = _pairs(known.actions)
        # Illegal completions keep the mean of their pair: they are never chosen.
        accuracy = np.full((len(known.accuracy), STAGE1_PAIRS, SECOND_PAIRS), np.nan)
        accuracy[:, before, after] = known.accuracy
        accuracy = np.where(np.isnan(accuracy), np.nanmean(accuracy, axis=2, keepdims=True), accuracy)
        self._actions = known.actions
        second = self._inputs(known.features, known.tokens)
        targets = (accuracy.reshape(len(accuracy), -1), accuracy.reshape(-1, SECOND_PAIRS))
        inputs = (known.features, second)
        self._models = [fit_regressor(small_network(self.seed), x, y) for x, y in zip(inputs, targets, strict=True)]

    def scores(self, requests: Requests) -> "ValueScores":
        if requests.tokens is None:
            raise UserError("value heads need the latency tokens of the requests")
        count = len(requests.features)
        expected = self._models[0].predict(requests.features).reshape(count, STAGE1_PAIRS, SECOND_PAIRS)
        second = self._models[1].predict(self._inputs(requests.features, requests.tokens))
        return ValueScores(expected, second.reshape(count, STAGE1_PAIRS, SECOND_PAIRS), self._actions)

    def _inputs(self, features: Array, tokens: Array) -> Array:
        """Rows (B * 15, ...) of stage 2: token, question and which pair."""
        count = len(features)
        pairs = np.tile(np.eye(STAGE1_PAIRS), (count, 1))
        return np.hstack((tokens.reshape(count * STAGE1_PAIRS, -1), np.repeat(features, STAGE1_PAIRS, axis=0), pairs))


@dataclass(frozen=True)
class ValueScores:
    """As `StageScores`, with stage 1 scored by the soft maximum over the completions that are allowed.

    Attributes:
        expected: (B, 15, 25) accuracy that stage 1 expects of each completion.
    """

    expected: Array
    second: Array
    actions: IntArray

    def best(self, allowed: BoolArray) -> IntArray:
        before, after = _pairs(self.actions)
        expected = np.full_like(self.expected, -np.inf)
        expected[:, before, after] = np.where(allowed, self.expected[:, before, after], -np.inf)
        first = TEMPERATURE * np.logaddexp.reduce(expected / TEMPERATURE, axis=2)
        return StageScores(first, self.second, self.actions).best(allowed)


def _pairs(actions: IntArray) -> tuple[IntArray, IntArray]:
    """Pair indices (P,) of stage 1 and of stage 2 of each plan."""
    return actions[:, 0] * HEAD_SIZES[1] + actions[:, 1], actions[:, 2] * HEAD_SIZES[3] + actions[:, 3]
