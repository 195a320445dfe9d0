"""Fused operations of prefill and vision: Triton on a GPU, plain torch elsewhere, shapes alone on `meta`.

Each is one registered operator (`torch.ops.ray_ctrl.*`), so that `benchmarks/ledger.py` counts it as the one kernel it
is. The torch versions are the definitions that the kernels are tested against.

Letters: N tokens, D model width, E experts, K experts a token, P (token, expert) pairs sorted by expert, H hidden width
of an expert, G = 2H, S positions, d head width.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = torch.library.Library("ray_ctrl", "DEF")
Cost = Callable[[tuple[Any, ...], Any], tuple[float, float]]
COSTS: dict[str, Cost] = {}
"""Bytes and floating-point operations of operators that do not read their inputs and write their outputs just once."""


def register(
    schema: str, reference: Callable[..., Any], meta: Callable[..., Any] | None = None, cost: Cost | None = None
) -> Callable[..., Any]:
    """Define `torch.ops.ray_ctrl.NAME`: its Triton version on CUDA, `reference` on the CPU, `meta` on `meta`.

    Args:
        schema: as in torch, such as "name(Tensor x) -> Tensor".
        meta: None takes the reference.
        cost: bytes and operations from the flat arguments and the result, see `COSTS`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _launch(name), "CUDA")
    _LIBRARY.impl(name, reference, "CPU")
    _LIBRARY.impl(name, meta or reference, "Meta")
    if cost is not None:
        COSTS[f"ray_ctrl.{name}.default"] = cost
    operator: Callable[..., Any] = getattr(torch.ops.ray_ctrl, name).default
    return operator


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        importlib.import_module("envs.model.kernels.prefill")
    except ImportError:
        return False
    return True


def available(x: Tensor) -> bool:
    """Whether fused operators serve `x`: a GPU with Triton, or `meta`. They have no gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    return x.is_meta or (x.is_cuda and _has_triton())


def _launch(name: str) -> Callable[..., Any]:
    """The Triton version of an operator, imported at its first use."""
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module("envs.model.kernels.prefill"), name))
        return found[0](*args)

    return call


def _route(logits_NE: Tensor, top_k: int, per_token_N: Tensor | None) -> tuple[Tensor, Tensor]:
    experts = logits_NE.float().topk(top_k, -1).indices
    weights = torch.softmax(logits_NE.float(), -1).gather(-1, experts)
    if per_token_N is None:
        return weights, experts.int()
    used = torch.arange(top_k, device=logits_NE.device) < per_token_N.unsqueeze(1)
    return weights * used, experts.masked_fill(~used, logits_NE.shape[1]).int()


def _route_meta(logits_NE: Tensor, top_k: int, _: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (len(logits_NE), top_k)
    return logits_NE.new_empty(shape, dtype=torch.float32), logits_NE.new_empty(shape, dtype=torch.int32)


def _sort_pairs(
    weights_NK: Tensor, experts_NK: Tensor, experts: int, pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = experts_NK.reshape(-1)
    ordered, order = slots.sort(stable=True)
    ordered, order = ordered[:pairs], order[:pairs]
    ends = torch.searchsorted(ordered, torch.arange(experts, device=slots.device, dtype=slots.dtype), right=True)
    inverse = torch.full_like(slots, -1)
    inverse[order] = torch.arange(pairs, dtype=slots.dtype, device=slots.device)
    tokens = (order // experts_NK.shape[1]).int()
    return tokens, weights_NK.reshape(-1)[order], inverse.view_as(experts_NK), ends.int()


def _sort_pairs_meta(
    weights_NK: Tensor, experts_NK: Tensor, experts: int, pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = experts_NK.new_empty
    return new(pairs), weights_NK.new_empty(pairs), torch.empty_like(experts_NK), new(experts)


def _silu_mul(gate_up_PG: Tensor, shares_P: Tensor | None) -> Tensor:
    gate, up = gate_up_PG.float().chunk(2, -1)
    inner = F.silu(gate) * up
    return (inner if shares_P is None else inner * shares_P.unsqueeze(1)).to(gate_up_PG.dtype)


def _silu_mul_meta(gate_up_PG: Tensor, _: Tensor | None) -> Tensor:
    return gate_up_PG.new_empty(len(gate_up_PG), gate_up_PG.shape[1] // 2)


def _combine(pairs_PD: Tensor, inverse_NK: Tensor, residual_ND: Tensor | None) -> Tensor:
    used = (inverse_NK >= 0).unsqueeze(-1)
    total = (pairs_PD.float()[inverse_NK.clamp(min=0).long()] * used).sum(1) if len(pairs_PD) else 0.0
    if residual_ND is not None:
        total = total + residual_ND.float()
    return torch.as_tensor(total).to(pairs_PD.dtype)


def _combine_meta(pairs_PD: Tensor, inverse_NK: Tensor, _: Tensor | None) -> Tensor:
    return pairs_PD.new_empty(len(inverse_NK), pairs_PD.shape[1])


def _norm_rope(x_NPD: Tensor, weight_PD: Tensor, rope_Sd: Tensor, eps: float) -> Tensor:
    n, parts, width = x_NPD.shape
    normed = F.rms_norm(x_NPD.float(), (width,), None, eps) * weight_PD.float()
    pairs = torch.view_as_complex(normed.view(n, parts, -1, rope_Sd.shape[1], 2))
    turn = torch.view_as_complex(rope_Sd)[torch.arange(n, device=x_NPD.device) % len(rope_Sd)]
    return torch.view_as_real(pairs * turn[:, None, None]).reshape(x_NPD.shape).to(x_NPD.dtype)


def _empty_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _grouped_mm(x_ND: Tensor, weight_EDH: Tensor, ends_E: Tensor, rows_P: Tensor | None, pairs: int) -> Tensor:
    source = x_ND if rows_P is None else x_ND.index_select(0, rows_P)
    return F.grouped_mm(source[:pairs], weight_EDH, offs=ends_E)


def _grouped_mm_meta(x_ND: Tensor, weight_EDH: Tensor, _: Tensor, __: Tensor | None, pairs: int) -> Tensor:
    return x_ND.new_empty(pairs, weight_EDH.shape[2])


def _grouped_cost(args: tuple[Any, ...], out: Tensor) -> tuple[float, float]:
    x_ND, weight_EDH, _, rows_P, pairs = args
    read = pairs * x_ND.shape[1] if rows_P is not None else x_ND.numel()
    return x_ND.element_size() * (read + weight_EDH.numel() + out.numel()), 2.0 * pairs * weight_EDH[0].numel()


route = register("route(Tensor logits, int top_k, Tensor? per_token) -> (Tensor, Tensor)", _route, _route_meta)
"""Weights (N, K) float32 and experts (N, K) int32: softmax over all, then top-k; of equal logits the first expert.

Slots beyond a token's own top-k have weight 0 and expert E.
"""
sort_pairs = register(
    "sort_pairs(Tensor weights, Tensor experts, int n_experts, int pairs) -> (Tensor, Tensor, Tensor, Tensor)",
    _sort_pairs,
    _sort_pairs_meta,
)
"""Pairs by expert, in token order: token (P,), weight (P,), place of each slot (N, K; -1 unused), ends (E,)."""
silu_mul = register("silu_mul(Tensor gate_up, Tensor? shares) -> Tensor", _silu_mul, _silu_mul_meta)
"""`silu(gate) * up * share` (P, H) of (P, G)."""
combine = register("combine(Tensor pairs, Tensor inverse, Tensor? residual) -> Tensor", _combine, _combine_meta)
"""Residual plus the sum of each token's pairs (N, D), through the places of `sort_pairs`."""
norm_rope = register("norm_rope(Tensor x, Tensor weight, Tensor rope, float eps) -> Tensor", _norm_rope, _empty_like)
"""RMS norm of each part of (N, parts, D) over D, times weight (parts, D), heads rotated by rope (S, d/2, 2) float32.

Row n stands at position n modulo S. The input may be strided along N; its parts are side by side.
"""
quick_gelu = register("quick_gelu(Tensor x) -> Tensor", _quick_gelu, _empty_like)
"""`x * sigmoid(1.702 x)`."""
grouped_mm = register(
    "grouped_mm(Tensor x, Tensor weight, Tensor ends, Tensor? rows, int pairs) -> Tensor",
    _grouped_mm,
    _grouped_mm_meta,
    _grouped_cost,
)
"""Each group of rows times its expert's matrix (E, D, H); with `rows`, row p is x[rows[p]]. (P, H)."""


@lru_cache(maxsize=8)
def _native_grouped(device: torch.device) -> bool:
    """Whether torch's grouped product is one kernel there. Elsewhere it reads offsets back and loops over experts."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def grouped_product(x_ND: Tensor, weight_EDH: Tensor, ends_E: Tensor, rows_P: Tensor | None, pairs: int) -> Tensor:
    """`grouped_mm` by torch where that is one kernel, by Triton where it would loop over experts."""
    if x_ND.dtype == torch.bfloat16 and _native_grouped(x_ND.device):
        return F.grouped_mm(x_ND if rows_P is None else x_ND.index_select(0, rows_P), weight_EDH, offs=ends_E)
    result: Tensor = grouped_mm(x_ND, weight_EDH, ends_E, rows_P, pairs)
    return result


def router_logits(x_ND: Tensor, router_ED: Tensor) -> Tensor:
    """Router logits (N, E) in float32, products summed in float32: rounded to bfloat16, 3 % of tokens would tie."""
    if x_ND.dtype == torch.float32 or available(x_ND):
        return float32_logits(x_ND, router_ED)
    return F.linear(x_ND.float(), router_ED.float())


def float32_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits (N, E), summed and left in float32 where one product does so; in the dtype of `x` elsewhere."""
    if x_ND.dtype != torch.float32 and available(x_ND) and x_ND.dtype == weight_ED.dtype:
        return torch.mm(x_ND, weight_ED.t(), out_dtype=torch.float32)
    return F.linear(x_ND, weight_ED)
