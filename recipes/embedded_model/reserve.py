"""Training steps in which only the last of each token's experts, those of the reserve, learn.

Letters: N tokens, D model width, E experts, G = 2H rows of gate over up, H hidden width, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.errors import UserError
from envs.knobs import TOP_KS
from envs.model import language
from envs.model.experts import TopK, route


@contextmanager
def reserve_learns(first: int) -> Iterator[None]:
    """Inside, no model's experts pass a gradient to the `first` experts of a token; all numbers stay the same.

    Raises:
        UserError: a `first` that leaves no expert to teach, or none fixed.
    """
    if not 0 < first < max(TOP_KS):
        raise UserError(f"reserve behind {first} experts is not allowed: give 1 to {max(TOP_KS) - 1}")
    usual = language.mixture
    language.mixture = partial(_mixture, first)
    try:
        yield
    finally:
        language.mixture = usual


def _mixture(
    first: int,
    x_ND: Tensor,
    logits_NE: Tensor,
    gate_up_EGD: Tensor,
    down_EHD: Tensor,
    top_k: int | TopK,
    kernel: str,
    residual_ND: Tensor | None = None,
) -> Tensor:
    """The package's `mixture` in two parts: weights of a token's first experts are constants, the others learn."""
    weights_NK, experts_NK = route(logits_NE, top_k)
    leading = torch.arange(weights_NK.shape[1], device=x_ND.device) < first
    fixed = _weighted_sum(x_ND, weights_NK * leading, experts_NK, gate_up_EGD.detach(), down_EHD.detach())
    mixed = fixed + _weighted_sum(x_ND, weights_NK * ~leading, experts_NK, gate_up_EGD, down_EHD)
    return mixed if residual_ND is None else residual_ND + mixed


def _weighted_sum(
    x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor
) -> Tensor:
    """All experts on all tokens (N, D), weighted; experts that a token does not use get weight 0."""
    experts, hidden = down_EHD.shape[:2]
    gate, up = F.linear(x_ND, gate_up_EGD.flatten(0, 1)).view(len(x_ND), experts, 2 * hidden).chunk(2, -1)
    share_NE = weights_NK.new_zeros(len(x_ND), experts).scatter(1, experts_NK, weights_NK).to(gate.dtype)
    inner = F.silu(gate) * up * share_NE.unsqueeze(-1)
    return inner.view(len(x_ND), -1) @ down_EHD.flatten(0, 1)
