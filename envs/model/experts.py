"""Mixture of experts: routing and two ways to compute it.

Letters: N tokens, D model width, E experts, H hidden width of an expert, K most experts any token of the call uses.
`grouped` sorts (token, expert) pairs by expert and multiplies group by group: cost in proportion to the experts used.
`dense` runs every expert on every token as two wide products: cheaper where calls cost more than arithmetic (few
tokens, small experts), and fast to differentiate; a lone token gets its own experts alone. Both give the same numbers
within rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.errors import UserError
from envs.model import fused
from envs.model.device_indices import DeviceIndices

KERNELS = ("auto", "dense", "grouped")
# Up to these sizes two wide products are over before the pairs are even sorted (measured, one CPU thread).
_DENSE_TOKENS = 32
_DENSE_WEIGHTS = 2**19
# On a CPU, slices of this many tokens keep their pairs in the caches: two to three times as fast as all together.
_SLICE_TOKENS = 1024
# What grouped products ask of every row.
_ALIGNMENT = 16


@dataclass(frozen=True)
class TopK:
    """How many experts each token gets, where tokens differ.

    `per_token` (N,) may be 0, for padding. `maximum` and `pairs` (its sum) come from the host, not the device.
    """

    per_token: Tensor
    maximum: int
    pairs: int


def expand_top_k(
    top_k_R: Sequence[int],
    lengths_R: Sequence[int] | None,
    tokens: int,
    device: torch.device,
    on_device: tuple[Tensor, Tensor] | None = None,
) -> int | TopK:
    """Experts per token of R rows padded to `tokens`: an int where all agree, and nothing spent on padding.

    `on_device` is `top_k_R` and `lengths_R` where they are on the device already.
    """
    padded = lengths_R is not None and any(length != tokens for length in lengths_R)
    if not padded and len(set(top_k_R)) == 1:
        return top_k_R[0]
    lengths_R = lengths_R if lengths_R is not None and padded else [tokens] * len(top_k_R)
    if on_device is None:
        indices = DeviceIndices(device)
        handles = indices.add(top_k_R), indices.add(lengths_R)
        indices.send()
        on_device = indices[handles[0]], indices[handles[1]]
    per_token = on_device[0].unsqueeze(1).expand(-1, tokens)
    if padded:
        per_token = per_token * (torch.arange(tokens, device=device) < on_device[1].unsqueeze(1))
    pairs = sum(k * length for k, length in zip(top_k_R, lengths_R, strict=True))
    return TopK(per_token.reshape(-1), max(top_k_R), pairs)


def route(logits_NE: Tensor, top_k: int | TopK) -> tuple[Tensor, Tensor]:
    """Weights (N, K) in float32 and expert indices (N, K): softmax over all experts, then top-k, not renormalised.

    Slots beyond a token's own top-k get weight 0. The softmax is taken of the chosen only, over the sum of all: the
    same numbers, without a softmax kernel that is slow along short rows.
    """
    most = top_k if isinstance(top_k, int) else top_k.maximum
    logits_NE = logits_NE.float()
    best_NK, experts_NK = logits_NE.topk(most, -1)
    highest_N1 = best_NK[:, :1]
    weights_NK = (best_NK - highest_N1).exp() / (logits_NE - highest_N1).exp().sum(-1, keepdim=True)
    if isinstance(top_k, TopK):
        used = torch.arange(most, device=logits_NE.device) < top_k.per_token.unsqueeze(1)
        weights_NK = weights_NK * used
    return weights_NK, experts_NK


def mixture(
    x_ND: Tensor,
    logits_NE: Tensor,
    gate_up_EGD: Tensor,
    down_EHD: Tensor,
    top_k: int | TopK,
    kernel: str = "auto",
    residual_ND: Tensor | None = None,
) -> Tensor:
    """Weighted sum (N, D) of each token's experts, `down(silu(gate) * up)`, added to `residual_ND` where given.

    Args:
        x_ND: tokens.
        logits_NE: router logits.
        gate_up_EGD: gate over up projections, G = 2H rows an expert.
        down_EHD: down projections, transposed.
        top_k: experts per token, 4 to 8, alike or per token.
        kernel: "dense", "grouped", or "auto" to choose by size.
    """
    if (kernel := _choose(kernel, x_ND, gate_up_EGD, down_EHD)) != "fused":
        mixed = _by_torch(x_ND, logits_NE, gate_up_EGD, down_EHD, top_k, kernel)
        return mixed if residual_ND is None else residual_ND + mixed
    return _fused(x_ND, logits_NE, gate_up_EGD, down_EHD, top_k, residual_ND)


def _by_torch(
    x_ND: Tensor, logits_NE: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor, top_k: int | TopK, kernel: str
) -> Tensor:
    if kernel == "dense":
        return _dense(x_ND, *route(logits_NE, top_k), gate_up_EGD, down_EHD)
    weights = (gate_up_EGD, down_EHD)
    if x_ND.device.type != "cpu" or len(x_ND) <= _SLICE_TOKENS:
        return _grouped(x_ND, logits_NE, *weights, top_k)
    parts = zip(x_ND.split(_SLICE_TOKENS), logits_NE.split(_SLICE_TOKENS), _split(top_k, len(x_ND)), strict=True)
    return torch.cat([_grouped(x, logits, *weights, k) for x, logits, k in parts])


def _choose(kernel: str, x_ND: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor) -> str:
    """Dense, grouped, or fused: grouped without the glue, where there are kernels for it."""
    if kernel not in KERNELS:
        raise UserError(f"experts kernel {kernel!r} is not allowed: choose one of {', '.join(KERNELS)}")
    if kernel != "dense" and not _aligned(x_ND, down_EHD):
        if kernel == "grouped":
            raise UserError(
                f"grouped experts need rows of a multiple of {_ALIGNMENT} bytes; widths {x_ND.shape[1]} and "
                f"{down_EHD.shape[1]} in {x_ND.dtype} are not: use 'dense'"
            )
        kernel = "dense"
    if kernel == "auto":
        small = len(x_ND) <= _DENSE_TOKENS and gate_up_EGD.numel() + down_EHD.numel() <= _DENSE_WEIGHTS
        kernel = "dense" if small else "grouped"
    return "fused" if kernel == "grouped" and fused.available(x_ND) else kernel


def _aligned(x_ND: Tensor, down_EHD: Tensor) -> bool:
    widths = (x_ND.shape[1], down_EHD.shape[1])
    return all(width * x_ND.element_size() % _ALIGNMENT == 0 for width in widths)


def _split(top_k: int | TopK, tokens: int) -> Sequence[int | TopK]:
    """Experts per token, slice by slice."""
    if isinstance(top_k, int):
        return [top_k] * -(-tokens // _SLICE_TOKENS)
    slices = top_k.per_token.split(_SLICE_TOKENS)
    return [TopK(part, top_k.maximum, int(part.sum())) for part in slices]


def _dense(x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor) -> Tensor:
    n, experts, hidden = len(x_ND), len(gate_up_EGD), down_EHD.shape[1]
    if n == 1 and experts_NK.shape[1] < experts:
        # A lone token, as in decoding, waits for weights to be read: those of its own experts alone.
        used = experts_NK[0]
        gate_up_EGD, down_EHD = gate_up_EGD.index_select(0, used), down_EHD.index_select(0, used)
        experts, experts_NK = len(used), torch.arange(len(used), device=used.device).unsqueeze(0)
    gate_up = F.linear(x_ND, gate_up_EGD.flatten(0, 1)).view(n, experts, 2 * hidden)
    share_NE = weights_NK.new_zeros(n, experts).scatter(1, experts_NK, weights_NK).to(gate_up.dtype)
    inner = F.silu(gate_up[..., :hidden]) * gate_up[..., hidden:] * share_NE.unsqueeze(-1)
    return inner.view(n, -1) @ down_EHD.flatten(0, 1)


def _grouped(x_ND: Tensor, logits_NE: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor, top_k: int | TopK) -> Tensor:
    weights_NK, experts_NK = route(logits_NE, top_k)
    (n, k), experts, hidden = experts_NK.shape, len(gate_up_EGD), down_EHD.shape[1]
    slots = experts_NK.reshape(-1)
    if isinstance(top_k, TopK):
        # Unused slots sort behind the last expert and are cut off: they cost nothing.
        unused = torch.arange(k, device=slots.device) >= top_k.per_token.unsqueeze(1)
        slots = slots.masked_fill(unused.reshape(-1), experts)
    ordered, order = slots.sort(stable=True)
    if isinstance(top_k, TopK):
        ordered, order = ordered[: top_k.pairs], order[: top_k.pairs]
    ends_E = torch.searchsorted(ordered, torch.arange(experts, device=slots.device), right=True).to(torch.int32)
    tokens = order // k
    gate_up = F.grouped_mm(x_ND.index_select(0, tokens), gate_up_EGD.transpose(1, 2), offs=ends_E)
    inner = F.silu(gate_up[:, :hidden]) * gate_up[:, hidden:]
    shares = weights_NK.reshape(-1).index_select(0, order).unsqueeze(1).to(x_ND.dtype)
    pairs_D = F.grouped_mm(inner, down_EHD, offs=ends_E) * shares
    if x_ND.device.type == "cpu":
        return torch.zeros_like(x_ND).index_add(0, tokens, pairs_D)
    # Elsewhere adding at repeated places is not reproducible: back to token order, then one sum.
    results = pairs_D.new_zeros(n * k, pairs_D.shape[1]).index_copy(0, order, pairs_D)
    return results.view(n, k, -1).sum(1)


def _fused(
    x_ND: Tensor,
    logits_NE: Tensor,
    gate_up_EGD: Tensor,
    down_EHD: Tensor,
    top_k: int | TopK,
    residual_ND: Tensor | None,
) -> Tensor:
    """As `_grouped`, in one kernel each: route, sort, gather, product, silu, product, combine."""
    each = None if isinstance(top_k, int) else top_k.per_token
    most, pairs = (top_k, top_k * len(x_ND)) if isinstance(top_k, int) else (top_k.maximum, top_k.pairs)
    weights_NK, experts_NK = fused.route(logits_NE, most, each)
    tokens, shares, inverse, ends = fused.sort_pairs(weights_NK, experts_NK, len(gate_up_EGD), pairs)
    gate_up = fused.grouped_product(x_ND, gate_up_EGD.transpose(1, 2), ends, tokens, pairs)
    inner = fused.silu_mul(gate_up, shares)
    out: Tensor = fused.combine(fused.grouped_product(inner, down_EHD, ends, None, pairs), inverse, residual_ND)
    return out
