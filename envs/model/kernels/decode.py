"""Triton kernels for one token of one row: each reads its weights once, with 16-byte loads from every multiprocessor.

Weights do not depend on earlier kernels, so with programmatic dependent launch (`PDL`, compute capability 9) they are
asked for before `_after_previous` waits for the inputs: the memory stays busy across kernel boundaries. Sums over
programs (attention splits, down projection, argmax) are added up in a fixed order by the program that arrives last, so
that results are reproducible. Vectors between kernels are float32, except the normed expert input, which is rounded to
the weights' dtype as everywhere else.

`decode_step` launches the kernels; `static` decides whether they are used.
Letters: D model width, E experts, N rows of a weight; BLOCK, WIDTH ... powers of two at or above a size.
"""

import triton
import triton.language as tl


@triton.jit
def _after_previous(PDL: tl.constexpr):
    """Let the next kernel start loading its weights, then wait until the previous one's results are visible."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _arrive(counter, total):
    """True in the last of `total` programs to get here; it sees all that the others stored, and resets the counter."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = before == total - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _normed(x, norm, cols, inside, D, eps):
    """RMS-normed x in float32."""
    value = tl.load(x + cols, mask=inside, other=0.0)
    return value * tl.rsqrt(tl.sum(value * value) / D + eps) * norm


@triton.jit
def embed(token, wte, x, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x (D,) = the embedding of `token`."""
    cols = tl.arange(0, BLOCK)
    if PDL:
        # In this order, so that no later kernel starts before the last step has moved `position`.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.maximum(tl.load(token), 0).to(tl.int64)
    tl.store(x + cols, tl.load(wte + row * D + cols, mask=cols < D, other=0.0).to(tl.float32), mask=cols < D)


@triton.jit
def norm_project(
    x, norm, weight, out, squares, eps, D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out (N,) = weight (N, D) @ rms_norm(x), and each program's sum of squares, for the norms of query and key."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    tile = tl.load(weight + rows[:, None] * D + cols[None, :], mask=(rows < N)[:, None] & inside[None, :], other=0.0)
    scale = tl.load(norm + cols, mask=inside, other=0.0).to(tl.float32)
    _after_previous(PDL)
    normed = _normed(x, scale, cols, inside, D, eps).to(weight.dtype.element_ty).to(tl.float32)
    sums = tl.sum(tile.to(tl.float32) * normed[None, :], 1)
    tl.store(out + rows, sums, mask=rows < N)
    tl.store(squares + tl.program_id(0), tl.sum(sums * sums))


@triton.jit
def _rotated(qkv, weight, start, lane, inside, scale, cos, sin):
    """One head of a query or key, normed and rotated; its rotary pairs are side by side."""
    pair = lane ^ 1
    own = tl.load(qkv + start + lane, mask=inside, other=0.0) * tl.load(weight + start + lane, mask=inside, other=0.0)
    other = tl.load(qkv + start + pair, mask=inside, other=0.0) * tl.load(weight + start + pair, mask=inside, other=0.0)
    sign = tl.where(lane % 2 == 0, -1.0, 1.0)
    return (own * cos + sign * other * sin) * scale


@triton.jit
def _seen(keys, values, inside, query, highest, weight, mixed):
    """Softmax and sum over cached tokens so far, a tile of them added."""
    scores = tl.where(inside, tl.sum(keys.to(tl.float32) * query[None, :], 1), -float("inf"))
    new = tl.maximum(highest, tl.max(scores))
    shares = tl.exp(scores - new)
    fade = tl.exp(highest - new)
    return new, weight * fade + tl.sum(shares), mixed * fade + tl.sum(values.to(tl.float32) * shares[:, None], 0)


@triton.jit
def _cached(keys, values, slots, end, start, lane, inside, D: tl.constexpr):
    """Key and value tiles (SLOTS, WIDTH) of one head at cache slots before `end`, 0 elsewhere."""
    where = slots[:, None] * D + start + lane[None, :]
    seen = (slots < end)[:, None] & inside[None, :]
    return tl.load(keys + where, mask=seen, other=0.0), tl.load(values + where, mask=seen, other=0.0)


@triton.jit
def _combined(partial, extremes, each, lane, inside, HEAD: tl.constexpr):
    """Softmax over all cached tokens from the parts of its splits, which other programs have stored."""
    highs = tl.load(extremes + each * 2, cache_modifier=".cg")
    faded = tl.exp(highs - tl.max(highs))
    total = tl.sum(tl.load(extremes + each * 2 + 1, cache_modifier=".cg") * faded)
    where = each[:, None] * HEAD + lane[None, :]
    parts = tl.load(partial + where, mask=inside[None, :], other=0.0, cache_modifier=".cg")
    return tl.sum(parts * faded[:, None], 0) / total


@triton.jit
def attention(
    qkv, squares, qk_norm, rope, keys, values, position, partial, extremes, arrived, out, eps, softmax_scale,
    D: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr, SUMS_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention (D,) of one token over `position` cached ones and itself; its key and value join the cache.

    Grid (heads, SPLITS). `squares` has SUMS partial sums for the query, then as many for the key; `rope` (C, HEAD/2,
    2) cosines and sines; caches are (C, D); `partial` (heads, SPLITS, HEAD), `extremes` (heads, SPLITS, 2).
    """
    head, split = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    inside = lane < HEAD
    start = head * HEAD
    # Cached tokens and their number are older than the kernel before this one: asked for without waiting for it.
    place = tl.load(position).to(tl.int64)
    share = (place + SPLITS - 1) // SPLITS
    end = tl.minimum((split + 1) * share, place)
    first = split * share
    slots = first + tl.arange(0, SLOTS)
    key_tile, value_tile = _cached(keys, values, slots, end, start, lane, inside, D)
    cos = tl.load(rope + place * HEAD + (lane // 2) * 2, mask=inside, other=0.0)
    sin = tl.load(rope + place * HEAD + (lane // 2) * 2 + 1, mask=inside, other=0.0)
    _after_previous(PDL)
    lot = tl.arange(0, SUMS_WIDTH)
    q_square = tl.sum(tl.load(squares + lot, mask=lot < SUMS, other=0.0))
    query = _rotated(qkv, qk_norm, start, lane, inside, tl.rsqrt(q_square / D + eps) * softmax_scale, cos, sin)
    highest, weight, mixed = -float("inf"), 0.0, tl.zeros((WIDTH,), tl.float32)
    if split == 0:
        k_square = tl.sum(tl.load(squares + SUMS + lot, mask=lot < SUMS, other=0.0))
        key = _rotated(qkv + D, qk_norm + D, start, lane, inside, tl.rsqrt(k_square / D + eps), cos, sin)
        key = key.to(keys.dtype.element_ty)
        mixed = tl.load(qkv + 2 * D + start + lane, mask=inside, other=0.0).to(values.dtype.element_ty)
        tl.store(keys + place * D + start + lane, key, mask=inside)
        tl.store(values + place * D + start + lane, mixed, mask=inside)
        mixed = mixed.to(tl.float32)
        highest, weight = tl.sum(query * key.to(tl.float32)), 1.0
    if first < end:
        highest, weight, mixed = _seen(key_tile, value_tile, slots < end, query, highest, weight, mixed)
    first += SLOTS
    while first < end:
        slots = first + tl.arange(0, SLOTS)
        key_tile, value_tile = _cached(keys, values, slots, end, start, lane, inside, D)
        highest, weight, mixed = _seen(key_tile, value_tile, slots < end, query, highest, weight, mixed)
        first += SLOTS
    here = head * SPLITS + split
    tl.store(partial + here * HEAD + lane, mixed, mask=inside)
    tl.store(extremes + here * 2, highest)
    tl.store(extremes + here * 2 + 1, weight)
    if _arrive(arrived + head, SPLITS):
        each = head * SPLITS + tl.arange(0, SPLITS)
        tl.store(out + start + lane, _combined(partial, extremes, each, lane, inside, HEAD), mask=inside)


@triton.jit
def project_add(
    mixed, weight, x, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """x (D,) += weight (D, D) @ mixed."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    tile = tl.load(weight + rows[:, None] * D + cols[None, :], mask=(rows < D)[:, None] & inside[None, :], other=0.0)
    _after_previous(PDL)
    mix = tl.load(mixed + cols, mask=inside, other=0.0)
    before = tl.load(x + rows, mask=rows < D, other=0.0)
    tl.store(x + rows, before + tl.sum(tile.to(tl.float32) * mix[None, :], 1), mask=rows < D)


@triton.jit
def route(
    x, norm, router, normed, logits, chosen, shares, arrived, eps,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Normed input, float32 router logits, experts `chosen` (E,) from highest to lowest and their softmax `shares`.

    Of equal logits the lower index comes first.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    tile = tl.load(router + rows[:, None] * D + cols[None, :], mask=(rows < E)[:, None] & inside[None, :], other=0.0)
    scale = tl.load(norm + cols, mask=inside, other=0.0).to(tl.float32)
    _after_previous(PDL)
    value = _normed(x, scale, cols, inside, D, eps).to(router.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(normed + cols, value, mask=inside)
    tl.store(logits + rows, tl.sum(tile.to(tl.float32) * value.to(tl.float32)[None, :], 1), mask=rows < E)
    if _arrive(arrived, tl.num_programs(0)):
        each = tl.arange(0, WIDTH)
        score = tl.load(logits + each, mask=each < E, other=-float("inf"), cache_modifier=".cg")
        rival = tl.arange(0, WIDTH)
        against = tl.load(logits + rival, mask=rival < E, other=-float("inf"), cache_modifier=".cg")
        ahead = (against[None, :] > score[:, None]) | (
            (against[None, :] == score[:, None]) & (rival[None, :] < each[:, None])
        )
        rank = tl.sum(ahead.to(tl.int32), 1)
        odds = tl.exp(score - tl.max(score))
        tl.store(chosen + rank, each, mask=each < E)
        tl.store(shares + rank, odds / tl.sum(odds), mask=each < E)


@triton.jit
def gate_up(
    normed, weight, top_k, chosen, shares, inner,
    D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner (K, HIDDEN) = silu(gate) * up * share of each chosen expert. Grid (tiles, 8); slots >= top_k do nothing."""
    slot = tl.program_id(1)
    if slot >= tl.load(top_k):
        return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    where = rows[:, None] * D + cols[None, :]
    inside = (rows < HIDDEN)[:, None] & (cols < D)[None, :]
    if PDL:
        # In this order, so that `down` starts when `route` is done for certain and may read `chosen` immediately.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    base = weight + tl.load(chosen + slot, cache_modifier=".cg").to(tl.int64) * (2 * HIDDEN * D)
    gate_tile = tl.load(base + where, mask=inside, other=0.0)
    up_tile = tl.load(base + HIDDEN * D + where, mask=inside, other=0.0)
    value = tl.load(normed + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    gate = tl.sum(gate_tile.to(tl.float32) * value, 1)
    up = tl.sum(up_tile.to(tl.float32) * value, 1)
    mixed = gate / (1.0 + tl.exp(-gate)) * up * tl.load(shares + slot)
    tl.store(inner + slot * HIDDEN + rows, mixed, mask=rows < HIDDEN)


@triton.jit
def down(
    inner, weight, top_k, chosen, partial, arrived, x,
    D: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
    ALL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (D,) += sum of inner (K, HIDDEN) @ the chosen experts' weight (HIDDEN, D).

    Grid (tiles of COLS, 8 * PARTS): each program takes DEPTH hidden units of one expert. ALL >= 8 * PARTS.
    """
    part = tl.program_id(1)
    used = tl.load(top_k)
    slot = part // PARTS
    if slot >= used:
        return
    hidden = (part % PARTS) * DEPTH + tl.arange(0, DEPTH)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < D
    where = hidden[:, None] * D + cols[None, :]
    here = (hidden < HIDDEN)[:, None] & inside[None, :]
    base = weight + tl.load(chosen + slot, cache_modifier=".cg").to(tl.int64) * (HIDDEN * D)
    tile = tl.load(base + where, mask=here, other=0.0)
    _after_previous(PDL)
    value = tl.load(inner + slot * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0)
    tl.store(partial + part * D + cols, tl.sum(tile.to(tl.float32) * value[:, None], 0), mask=inside)
    if _arrive(arrived + tl.program_id(0), used * PARTS):
        parts = tl.arange(0, ALL)
        rest = tl.load(
            partial + parts[:, None] * D + cols[None, :],
            mask=(parts < used * PARTS)[:, None] & inside[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        tl.store(x + cols, tl.load(x + cols, mask=inside, other=0.0) + tl.sum(rest, 0), mask=inside)


@triton.jit
def choose(
    x, norm, weight, logits, best, arrived, token, position, finished, ids, count, eos, eps,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    PROGRAMS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits (N,) of the next token; its id becomes `token` and joins `ids`, `position` and `count` go up by one.

    Of equal logits the lowest id wins. `best` (2, PROGRAMS) is each program's highest logit and its id, as float32
    (exact below 2**24).
    """
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    scale = tl.load(norm + cols, mask=inside, other=0.0).to(tl.float32)
    _after_previous(PDL)
    normed = _normed(x, scale, cols, inside, D, eps).to(weight.dtype.element_ty).to(tl.float32)
    highest, winner = -float("inf"), N
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        data = tl.load(
            weight + rows[:, None] * D + cols[None, :], mask=(rows < N)[:, None] & inside[None, :], other=0.0
        )
        sums = tl.sum(data.to(tl.float32) * normed[None, :], 1)
        tl.store(logits + rows, sums, mask=rows < N)
        sums = tl.where(rows < N, sums, -float("inf"))
        top = tl.max(sums)
        first = tl.min(tl.where((sums == top) & (rows < N), rows, N))
        winner = tl.where(top > highest, first, winner)
        highest = tl.maximum(top, highest)
    tl.store(best + tl.program_id(0), highest)
    tl.store(best + PROGRAMS + tl.program_id(0), winner.to(tl.float32))
    if _arrive(arrived, PROGRAMS):
        each = tl.arange(0, WIDTH)
        highs = tl.load(best + each, mask=each < PROGRAMS, other=-float("inf"), cache_modifier=".cg")
        winners = tl.load(best + PROGRAMS + each, mask=each < PROGRAMS, other=N, cache_modifier=".cg")
        chosen = tl.min(tl.where(highs == tl.max(highs), winners, N)).to(tl.int64)
        tl.store(token, chosen)
        step = tl.load(count)
        tl.store(ids + step, chosen)
        tl.store(count, step + 1)
        tl.store(position, tl.load(position) + 1)
        tl.store(finished, tl.maximum(tl.load(finished), (chosen == eos).to(tl.int32)))
