"""The controller for one request at a time: the stage that decides alone, in a few numpy operations.

Layer norms are folded into the projections behind them, and both heads into one matrix over pairs of choices. Logits
equal those of `Controller` up to the order of floating-point sums.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import gelu

from envs.knobs import BLOCK_COUNTS, INSERTIONS, STAGE1_PAIRS, BoolArray
from policies.controller import Controller
from policies.networks import Projections, budget_waves

Array = npt.NDArray[np.float32]
# Of `policies.networks.budget_feature`.
_FREQUENCIES = (2 * math.pi / budget_waves()).numpy()


class _Stage:
    """Weights of one stage: (H, width) per input, (H, H), and (pairs, H) of both heads."""

    def __init__(self, trunk: Projections, first: nn.Linear, second: nn.Linear) -> None:
        folded = [_folded(norm, layer) for norm, layer in zip(trunk.norms, trunk.inputs, strict=True)]
        (self.input, bias), (self.budget, budget_bias) = folded
        self.bias: Array = bias + budget_bias
        norm: Any = trunk.norms[0]
        hidden: Any = trunk.mlp[1]
        self.epsilon = float(norm.eps)
        self.hidden, self.hidden_bias = _array(hidden.weight), _array(hidden.bias)
        pairs = first.weight[:, None] + second.weight[None]
        self.pairs = _array(pairs.flatten(0, 1))
        self.pairs_bias = _array((first.bias[:, None] + second.bias[None]).flatten())

    def budget_term(self, feature_F: Array) -> Array:
        """The part of the first layer that the budget alone decides, (H,)."""
        return np.asarray(self.budget @ _normed(feature_F, self.epsilon) + self.bias)

    def best(self, input_D: Array, term_H: Array, legal: BoolArray, width: int) -> tuple[int, int]:
        """Both indices of the most likely legal pair."""
        hidden = _gelu(self.input @ _normed(input_D, self.epsilon) + term_H)
        logits = self.pairs @ _gelu(self.hidden @ hidden + self.hidden_bias) + self.pairs_bias
        return divmod(int(np.where(legal, logits, -np.inf).argmax()), width)


class FusedController:
    """Decides for one request at a time as `Controller.act` does; a copy of the weights at the time it is made."""

    @torch.no_grad()
    def __init__(self, controller: Controller) -> None:
        one, two = controller.stage1, controller.stage2
        self.stage1 = _Stage(one.trunk, one.tier, one.insertion)
        self.stage2 = _Stage(two.trunk, two.top_k, two.blocks)
        self.positions = _array(two.position.weight)
        self.reads = [np.float32(part not in controller.without) for part in ("question", "token")]
        self.open_pairs = controller.open_pairs.numpy()

    def budget_terms(self, log_ratio: float) -> tuple[Array, Array]:
        """What both stages need of a budget, computed once a request.

        Args:
            log_ratio: log(budget / latency of the full plan on this device's reference request).
        """
        angles = np.float32(log_ratio) * _FREQUENCIES
        feature_F = np.concatenate((np.sin(angles), np.cos(angles)))
        return self.stage1.budget_term(feature_F), self.stage2.budget_term(feature_F)

    def decide_stage1(self, language_feature_D: Array, term_H: Array, legal: BoolArray) -> tuple[int, int]:
        """Indices of tier and insertion position.

        Args:
            legal: action mask (40,).
        """
        legal = legal[:STAGE1_PAIRS] & self.open_pairs
        return self.stage1.best(language_feature_D * self.reads[0], term_H, legal, len(INSERTIONS))

    def decide_stage2(self, latency_token_D: Array, term_H: Array, insertion: int, legal: BoolArray) -> tuple[int, int]:
        """Indices of top-k and blocks at an insertion position 1 to 5."""
        term_H = term_H + self.positions[insertion]
        return self.stage2.best(latency_token_D * self.reads[1], term_H, legal[STAGE1_PAIRS:], len(BLOCK_COUNTS))


def _folded(norm: Any, layer: Any) -> tuple[Array, Array]:
    """Weight and bias of a linear layer behind a norm, with the norm's scale and shift inside."""
    weight, bias, scale, shift = (t.double() for t in (layer.weight, layer.bias, norm.weight, norm.bias))
    return _array(weight * scale), _array(weight @ shift + bias)


def _normed(x: Array, epsilon: float) -> Array:
    centered = x - x.mean()
    return np.asarray(centered / np.sqrt(centered @ centered / x.size + epsilon))


def _gelu(x: Array) -> Array:
    found: Array = gelu(torch.from_numpy(x)).numpy()
    return found


def _array(tensor: torch.Tensor) -> Array:
    return np.ascontiguousarray(tensor.float().cpu().numpy())
