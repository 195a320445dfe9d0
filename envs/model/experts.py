"""Mixture of experts: routing and two ways to compute it.

Letters: N tokens, D model width, E experts, H hidden width of an expert, K most experts any token of the call uses.
`grouped` sorts (token, expert) pairs by expert and multiplies group by group: cost in proportion to the experts used.
`dense` runs every expert on every token as two wide products: cheaper where calls cost more than arithmetic (few
tokens, small experts), and fast to differentiate. Both give the same numbers within rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.errors import UserError

KERNELS = ("auto", "dense", "grouped")
# Up to these sizes two wide products are over before the pairs are even sorted (measured, one CPU thread).
_DENSE_TOKENS = 32
_DENSE_WEIGHTS = 2**19


@dataclass(frozen=True)
class TopK:
    """How many experts each token gets, where tokens differ.

    `per_token` (N,) may hold 0, for padding. `maximum` and `pairs` (its sum) come from the host, not the device.
    """

    per_token: Tensor
    maximum: int
    pairs: int


def spread_top_k(
    top_k_R: Sequence[int], lengths_R: Sequence[int] | None, tokens: int, device: torch.device
) -> int | TopK:
    """Experts per token of R rows padded to `tokens`: an int where all agree, and nothing spent on padding."""
    padded = lengths_R is not None and any(length != tokens for length in lengths_R)
    if not padded and len(set(top_k_R)) == 1:
        return top_k_R[0]
    per_row = torch.tensor(top_k_R, device=device).unsqueeze(1).expand(-1, tokens)
    if lengths_R is None or not padded:
        return TopK(per_row.reshape(-1), max(top_k_R), tokens * sum(top_k_R))
    inside = torch.arange(tokens, device=device) < torch.tensor(lengths_R, device=device).unsqueeze(1)
    pairs = sum(k * length for k, length in zip(top_k_R, lengths_R, strict=True))
    return TopK((per_row * inside).reshape(-1), max(top_k_R), pairs)


def route(logits_NE: Tensor, top_k: int | TopK) -> tuple[Tensor, Tensor]:
    """Weights (N, K) in float32 and expert indices (N, K): softmax over all experts, then top-k, not renormalised.

    Slots beyond a token's own top-k get weight 0.
    """
    most = top_k if isinstance(top_k, int) else top_k.maximum
    weights_NK, experts_NK = logits_NE.softmax(-1, dtype=torch.float32).topk(most, -1)
    if isinstance(top_k, TopK):
        used = torch.arange(most, device=logits_NE.device) < top_k.per_token.unsqueeze(1)
        weights_NK = weights_NK * used
    return weights_NK, experts_NK


def mixture(
    x_ND: Tensor, logits_NE: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor, top_k: int | TopK, kernel: str = "auto"
) -> Tensor:
    """Weighted sum (N, D) of each token's experts, `down(silu(gate) * up)`.

    Args:
        x_ND: tokens.
        logits_NE: router logits.
        gate_up_EGD: gate over up projections, G = 2H rows an expert.
        down_EHD: down projections, transposed.
        top_k: experts per token, 4 to 8, alike or per token.
        kernel: "dense", "grouped", or "auto" to choose by size.
    """
    if kernel not in KERNELS:
        raise UserError(f"experts kernel {kernel!r} is not allowed: choose one of {', '.join(KERNELS)}")
    weights_NK, experts_NK = route(logits_NE, top_k)
    if kernel == "auto":
        small = len(x_ND) <= _DENSE_TOKENS and gate_up_EGD.numel() + down_EHD.numel() <= _DENSE_WEIGHTS
        kernel = "dense" if small else "grouped"
    if kernel == "dense":
        return _dense(x_ND, weights_NK, experts_NK, gate_up_EGD, down_EHD)
    return _grouped(x_ND, weights_NK, experts_NK, gate_up_EGD, down_EHD, top_k)


def _dense(x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor) -> Tensor:
    n, experts, hidden = len(x_ND), len(gate_up_EGD), down_EHD.shape[1]
    gate_up = F.linear(x_ND, gate_up_EGD.flatten(0, 1)).view(n, experts, 2 * hidden)
    share_NE = weights_NK.new_zeros(n, experts).scatter(1, experts_NK, weights_NK).to(gate_up.dtype)
    inner = F.silu(gate_up[..., :hidden]) * gate_up[..., hidden:] * share_NE.unsqueeze(-1)
    return inner.view(n, -1) @ down_EHD.flatten(0, 1)


def _grouped(
    x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor, top_k: int | TopK
) -> Tensor:
    (n, k), experts, hidden = experts_NK.shape, len(gate_up_EGD), down_EHD.shape[1]
    slots = experts_NK.reshape(-1)
    if isinstance(top_k, TopK):
        # Unused slots sort behind the last expert and are cut off: they cost nothing.
        slots = slots.masked_fill(weights_NK.reshape(-1) == 0, experts)
    ordered, order = slots.sort(stable=True)
    if isinstance(top_k, TopK):
        ordered, order = ordered[: top_k.pairs], order[: top_k.pairs]
    ends_E = torch.searchsorted(ordered, torch.arange(experts, device=slots.device), right=True).to(torch.int32)
    gate_up = F.grouped_mm(x_ND[order // k], gate_up_EGD.transpose(1, 2), offs=ends_E)
    inner = F.silu(gate_up[:, :hidden]) * gate_up[:, hidden:]
    pairs_D = F.grouped_mm(inner, down_EHD, offs=ends_E)
    # Back to token order before summing: the sum then runs over a token's experts in one fixed order.
    if isinstance(top_k, TopK):
        results = pairs_D.new_zeros(n * k, pairs_D.shape[1]).index_copy(0, order, pairs_D)
    else:
        results = torch.empty_like(pairs_D).index_copy_(0, order, pairs_D)
    return torch.bmm(weights_NK.to(x_ND.dtype).unsqueeze(1), results.view(n, k, -1)).squeeze(1)
