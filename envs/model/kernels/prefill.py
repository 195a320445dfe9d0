"""Triton kernels of prefill and vision. `fused` chooses between them and torch; only it imports this module.

Letters: N tokens, D model width, E experts, K experts a token, P (token, expert) pairs, H hidden width of an expert.
All arithmetic is in float32, rounded once where a result is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route(logits, per_token, weights, experts, E, K: tl.constexpr, RAGGED: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    x = tl.load(logits + token * E + column, mask=column < E, other=float("-inf")).to(tl.float32)
    highest = tl.max(x, 0)
    total = tl.sum(tl.exp(x - highest), 0)
    used = tl.load(per_token + token) if RAGGED else K
    for slot in tl.static_range(K):
        best = tl.max(x, 0)
        # Of equal logits the first expert wins, whatever the batch.
        expert = tl.min(tl.where(x == best, column, WIDTH), 0)
        inside = slot < used
        tl.store(weights + token * K + slot, tl.where(inside, tl.exp(best - highest) / total, 0.0))
        tl.store(experts + token * K + slot, tl.where(inside, expert, E).to(tl.int32))
        x = tl.where(column == expert, float("-inf"), x)


@triton.jit
def _sort_pairs(weights, experts, tokens, shares, inverse, ends, n, E, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program an expert: where its pairs begin, then each pair's place, in token order. No atomics."""
    expert = tl.program_id(0)
    before, own = 0, 0
    for start in range(0, n, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        found = tl.load(experts + slot, mask=slot < n, other=E)
        before += tl.sum((found < expert).to(tl.int32), 0)
        own += tl.sum((found == expert).to(tl.int32), 0)
    tl.store(ends + expert, before + own)
    for start in range(0, n, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        found = tl.load(experts + slot, mask=slot < n, other=E)
        match = found == expert
        place = before + tl.cumsum(match.to(tl.int32), 0) - 1
        tl.store(tokens + place, slot // K, mask=match)
        tl.store(shares + place, tl.load(weights + slot, mask=match, other=0.0), mask=match)
        tl.store(inverse + slot, place, mask=match)
        before += tl.sum(match.to(tl.int32), 0)
        if expert == 0:
            tl.store(inverse + slot, -1, mask=(found >= E) & (slot < n))


@triton.jit
def _silu_mul(gate_up, shares, out, H, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    gate = tl.load(gate_up + row * 2 * H + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * H + H + column, mask=inside).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    if SHARED:
        result *= tl.load(shares + row)
    tl.store(out + row * H + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine(residual, pairs, inverse, out, D, K: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        place = tl.load(inverse + token * K + slot).to(tl.int64)
        total += tl.load(pairs + place * D + column, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    if ADDED:
        total += tl.load(residual + token * D + column, mask=inside).to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope(x, weight, rope, out, stride, parts, positions, eps, D: tl.constexpr, d: tl.constexpr):
    """One program a (token, part): RMS norm over the width, weight, then rotation of neighboring pairs."""
    token, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    column = tl.arange(0, D)
    value = tl.load(x + token * stride + part * D + column).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value = value * scale * tl.load(weight + part * D + column).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (D // 2, 2)))
    pair = (token % positions) * (d // 2) + tl.arange(0, D // 2) % (d // 2)
    cos, sin = tl.load(rope + 2 * pair), tl.load(rope + 2 * pair + 1)
    turned = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (D,))
    tl.store(out + tl.program_id(0).to(tl.int64) * D + column, turned.to(out.dtype.element_ty))


@triton.jit
def _quick_gelu(x, out, n, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < n).to(tl.float32)
    tl.store(out + place, (value / (1.0 + tl.exp(-1.702 * value))).to(out.dtype.element_ty), mask=place < n)


@triton.jit
def _grouped_mm(
    x, rows, weight, ends, out, E, depth, width, stride_e, stride_k, stride_n,
    GATHER: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows grouped by expert, each times its expert's matrix. A program finds its tile from the offsets alone."""
    tile = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    end = tl.load(ends + column, mask=column < E, other=0)
    begin = tl.load(ends + column - 1, mask=(column > 0) & (column < E), other=0)
    tiles = tl.where(column < E, tl.cdiv(end - begin, BM), 0)
    after = tl.cumsum(tiles, 0)
    expert = tl.sum(((after <= tile) & (column < E)).to(tl.int32), 0)
    if expert < E:
        mine = column == expert
        first = tl.sum(tl.where(mine, begin + (tile - after + tiles) * BM, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
        row, wide = first + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
        inside = row < last
        source = tl.load(rows + row, mask=inside, other=0) if GATHER else tl.where(inside, row, first)
        k = tl.arange(0, BK)
        # Scalar bases move and 32-bit offsets stay: tiles of 64-bit pointers would not fit the registers.
        matrix = weight + expert.to(tl.int64) * stride_e
        left = source[:, None] * depth + k[None, :]
        right = k[:, None] * stride_k + (wide % width)[None, :] * stride_n
        total = tl.zeros((BM, BN), tl.float32)
        for start in range(0, depth, BK):
            # Rows and columns beyond the tile have others' numbers, and are not stored.
            deep = start + k < depth
            a = tl.load(x + start + left, mask=deep[None, :], other=0.0)
            b = tl.load(matrix + start * stride_k + right, mask=deep[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        place = out + row[:, None].to(tl.int64) * width + wide[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & (wide < width)[None, :])


def route(logits_NE: Tensor, top_k: int, per_token_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `fused.route`."""
    n, experts = logits_NE.shape
    weights = logits_NE.new_empty((n, top_k), dtype=torch.float32)
    chosen = logits_NE.new_empty((n, top_k), dtype=torch.int32)
    width = triton.next_power_of_2(experts)
    ragged = per_token_N is not None
    _route[(n,)](
        logits_NE.contiguous(), per_token_N if ragged else chosen, weights, chosen, experts, top_k, ragged, width,
        num_warps=1,
    )  # fmt: skip
    return weights, chosen


def sort_pairs(
    weights_NK: Tensor, experts_NK: Tensor, experts: int, pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fused.sort_pairs`."""
    tokens, inverse = experts_NK.new_empty(pairs), torch.empty_like(experts_NK)
    shares, ends = weights_NK.new_empty(pairs), experts_NK.new_empty(experts)
    slots = experts_NK.numel()
    block = min(4096, max(16, triton.next_power_of_2(slots)))
    _sort_pairs[(experts,)](
        weights_NK, experts_NK, tokens, shares, inverse, ends, slots, experts, experts_NK.shape[1], block, num_warps=8
    )
    return tokens, shares, inverse, ends


def silu_mul(gate_up_PG: Tensor, shares_P: Tensor | None) -> Tensor:
    """See `fused.silu_mul`."""
    pairs, hidden = gate_up_PG.shape[0], gate_up_PG.shape[1] // 2
    out = gate_up_PG.new_empty(pairs, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (pairs, triton.cdiv(hidden, block))
    shared = shares_P is not None
    if pairs:
        _silu_mul[grid](gate_up_PG, shares_P if shared else gate_up_PG, out, hidden, shared, block, num_warps=4)
    return out


def combine(pairs_PD: Tensor, inverse_NK: Tensor, residual_ND: Tensor | None) -> Tensor:
    """See `fused.combine`."""
    (n, top_k), width = inverse_NK.shape, pairs_PD.shape[1]
    out = pairs_PD.new_empty(n, width)
    block = min(1024, triton.next_power_of_2(width))
    grid = (n, triton.cdiv(width, block))
    added = residual_ND is not None
    if n:
        _combine[grid](
            residual_ND if added else out, pairs_PD, inverse_NK, out, width, top_k, added, block, num_warps=4
        )
    return out


def norm_rope(x_NPD: Tensor, weight_PD: Tensor, rope_Sd: Tensor, eps: float) -> Tensor:
    """See `fused.norm_rope`. The width must be a power of two."""
    n, parts, width = x_NPD.shape
    out = x_NPD.new_empty(x_NPD.shape)
    if n:
        _norm_rope[(n * parts,)](
            x_NPD, weight_PD, rope_Sd, out, x_NPD.stride(0), parts, rope_Sd.shape[0], eps, width,
            rope_Sd.shape[1] * 2, num_warps=8 if width >= 1024 else 1,
        )  # fmt: skip
    return out


def quick_gelu(x: Tensor) -> Tensor:
    """See `fused.quick_gelu`."""
    out = torch.empty_like(x)
    if x.numel():
        _quick_gelu[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), 1024, num_warps=4)
    return out


def tiles(rows: int, experts: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile, warps and stages: few rows an expert get small tiles."""
    each = rows / max(1, experts)
    if dtype == torch.float32:
        return (16, 64, 32, 4, 2) if each <= 16 else (64, 64, 32, 4, 2)
    if each <= 16:
        return 16, 128, 64, 4, 4
    return (64, 128, 64, 4, 3) if each <= 128 else (128, 128, 64, 8, 3)


def grouped_mm(x_ND: Tensor, weight_EDH: Tensor, ends_E: Tensor, rows_P: Tensor | None, pairs: int) -> Tensor:
    """See `fused.grouped_mm`."""
    experts, depth, width = weight_EDH.shape
    out = x_ND.new_empty(pairs, width)
    if not pairs:
        return out
    rows, columns, deep, warps, stages = tiles(pairs, experts, x_ND.dtype)
    # No more tiles than this whatever the split: a partly filled one per expert.
    grid = (triton.cdiv(width, columns), triton.cdiv(pairs, rows) + min(experts, pairs))
    precision = "ieee" if x_ND.dtype == torch.float32 else "tf32"
    gather = rows_P is not None
    _grouped_mm[grid](
        x_ND, rows_P if gather else ends_E, weight_EDH, ends_E, out, experts, depth, width, *weight_EDH.stride(),
        gather, triton.next_power_of_2(experts), precision, rows, columns, deep, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
