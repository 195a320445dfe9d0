"""The language part: embeddings, sixteen mixture-of-experts blocks, logits; run under plans, with or without caches.

Letters: B rows, T tokens, D model width, H heads, d head width, R rows or nodes a block runs on, L latency tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.knobs import INSERTIONS, ExecutionPlan
from envs.model import fused
from envs.model.config import MolmoEConfig
from envs.model.experts import Reserve, TopK, mixture, spread_top_k
from envs.model.schedule import FULL_TOP_K, Level, Nodes, build_schedule, entry_block, per_row

MAX_INSERTION = max(INSERTIONS)


class Block(nn.Module):
    """One pre-norm block. Rotary pairs lie side by side (see `checkpoint`), so that rotating is one complex product."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.expert_hidden
        self.heads, self.eps = config.n_heads, config.norm_eps
        self.attn_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Parameter(torch.empty(3 * width, width))
        self.qk_norm = nn.Parameter(torch.ones(2, width))
        self.attn_out = nn.Parameter(torch.empty(width, width))
        self.ff_norm = nn.Parameter(torch.ones(width))
        self.router = nn.Parameter(torch.empty(config.n_experts, width))
        self.gate_up = nn.Parameter(torch.empty(config.n_experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(config.n_experts, hidden, width))

    def project(self, x_RTD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (R, T, H, d), normed and rotated."""
        r, t, width = x_RTD.shape
        normed = F.rms_norm(x_RTD, (width,), self.attn_norm, self.eps)
        qkv = F.linear(normed, self.qkv).view(r, t, 3, width)
        qk = self._norm_rotate(qkv[:, :, :2], self.qk_norm, rope)
        return qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2].view(r, t, self.heads, -1)

    def project_last(
        self, x_RTD: Tensor, last_R1D: Tensor, rope: Tensor, last_rope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all tokens, the query of the last one only."""
        r, t, width = x_RTD.shape
        normed = F.rms_norm(x_RTD, (width,), self.attn_norm, self.eps)
        kv = F.linear(normed, self.qkv[width:]).view(r, t, 2, width)
        key = self._norm_rotate(kv[:, :, :1], self.qk_norm[1:], rope)
        query = F.linear(F.rms_norm(last_R1D, (width,), self.attn_norm, self.eps), self.qkv[:width])
        query = self._norm_rotate(query.unsqueeze(2), self.qk_norm[:1], last_rope)
        return query[:, :, 0], key[:, :, 0], kv[:, :, 1].view(r, t, self.heads, -1)

    def _norm_rotate(self, x_RTND: Tensor, weight_ND: Tensor, rope: Tensor) -> Tensor:
        """Norm and rotary positions of N projections side by side: (R, T, N, H, d)."""
        r, t, parts, width = x_RTND.shape
        if fused.available(x_RTND) and width & (width - 1) == 0:
            turns = torch.view_as_real(rope).reshape(-1, width // self.heads // 2, 2)
            normed = fused.norm_rope(x_RTND.flatten(0, 1), weight_ND, turns, self.eps)
            return normed.view(r, t, parts, self.heads, -1)
        normed = F.rms_norm(x_RTND, (width,), None, self.eps) * weight_ND
        return _rotate(normed.view(r, t, parts, self.heads, -1), rope)

    def finish(self, x_RTD: Tensor, mixed_RHTd: Tensor, top_k: int | TopK, kernel: str | Reserve) -> Tensor:
        """Output projection, then the mixture of experts, each added to its input."""
        shape = x_RTD.shape
        mixed = mixed_RHTd.transpose(1, 2).reshape(-1, shape[-1])
        # A plain sum keeps the residual stream in its own dtype under autocast.
        x_ND = x_RTD.reshape(-1, shape[-1]) + F.linear(mixed, self.attn_out)
        normed = F.rms_norm(x_ND, shape[-1:], self.ff_norm, self.eps)
        logits = fused.router_logits(normed, self.router)
        return mixture(normed, logits, self.gate_up, self.down, top_k, kernel, residual_ND=x_ND).view(shape)

    def forward(
        self, x_RTD: Tensor, rope: Tensor, mask: Tensor | None, top_k: int | TopK, kernel: str | Reserve
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens: output (R, T, D), keys and values (R, T, H, d). Without a mask, attention is causal."""
        query, key, value = self.project(x_RTD, rope)
        mixed = attend(query, key, value, mask, causal=mask is None)
        return self.finish(x_RTD, mixed, top_k, kernel), key, value


def _rotate(x_RTNHd: Tensor, rope: Tensor) -> Tensor:
    """Rotary positions on the last axis. `rope` is complex, broadcastable over (R, T, 1, 1, d/2)."""
    pairs = torch.view_as_complex(x_RTNHd.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x_RTNHd.dtype)


def attend(
    query_RTHd: Tensor, key_RSHd: Tensor, value_RSHd: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention (R, H, T, d); `mask` broadcasts over (R, H, T, S)."""
    return F.scaled_dot_product_attention(
        query_RTHd.transpose(1, 2), key_RSHd.transpose(1, 2), value_RSHd.transpose(1, 2), mask, is_causal=causal
    )


@dataclass(frozen=True)
class BlockCache:
    """Keys and values (M, T, H, d) of one block for M computed prompts, and each row's place (-1: block dropped)."""

    keys: Tensor
    values: Tensor
    places: tuple[int, ...]


@dataclass(frozen=True)
class Prefix:
    """Blocks 1..n run on prompts at full top-k: `hidden[i]` (B, T, D) after i blocks, keys and values of each block."""

    hidden: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Blocks run."""
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """Padded length."""
        return int(self.hidden[0].shape[1])


@dataclass(frozen=True)
class Prefilled:
    """What decoding starts from: each row's last hidden state (rows, D) before the final norm, caches, prompt lengths.

    `caches[b]` is None where no row ran block b after the prefix; rows that took it from the prefix find it there.
    """

    last: Tensor
    caches: tuple[BlockCache | None, ...]
    prefix: Prefix | None
    prompts: tuple[int, ...]
    lengths: tuple[int, ...]
    top_k: tuple[tuple[int, ...], ...]


class Language(nn.Module):
    """Word embeddings, blocks, final norm and output projection."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Parameter(torch.empty(config.embedding_size + config.additional_vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.Parameter(torch.ones(config.d_model))
        self.lm_head = nn.Parameter(torch.empty(config.embedding_size, config.d_model))
        self._rope_table: Tensor | None = None

    def rope(self, tokens: int) -> Tensor:
        """Rotations (>= tokens, 1, 1, d/2), complex64, for positions 0, 1, ...; grown when needed."""
        if self._rope_table is None or len(self._rope_table) < tokens or self._rope_table.device != self.wte.device:
            count = 1 << max(9, (tokens - 1).bit_length())
            half = self.config.head_dim // 2
            exponents = torch.arange(half, dtype=torch.float32) * (2.0 / self.config.head_dim)
            angles = torch.outer(torch.arange(count, dtype=torch.float32), 1.0 / self.config.rope_theta**exponents)
            table = torch.polar(torch.ones_like(angles), angles)
            self._rope_table = table.to(self.wte.device)[:, None, None]
        return self._rope_table

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings (..., D); ids of -1 (padding) give those of id 0."""
        return F.embedding(input_ids.clamp(min=0), self.wte)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states after the final norm."""
        return F.linear(hidden, self.lm_head)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last block."""
        return F.rms_norm(x, x.shape[-1:], self.ln_f, self.config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        plans: ExecutionPlan | Sequence[ExecutionPlan],
        position_ids_BT: Tensor | None = None,
        attention_mask_BTT: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        experts: str | Reserve = "auto",
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm, differentiable.

        Args:
            x_BTD: token embeddings, image features added.
            plans: one plan, or one per row.
            position_ids_BT: positions; 0..T-1 where not given.
            attention_mask_BTT: True where a token (row) may attend to another (column); causal where not given.
                Every token must be allowed at least one.
            lengths: true lengths of right-padded rows, to spend no experts on padding.
            experts: "dense", "grouped", "auto", or `Reserve` to train (see `experts`).
        """
        rows, tokens, _ = x_BTD.shape
        rope = self.rope(tokens)[:tokens]
        if position_ids_BT is not None:
            rope = self.rope(int(position_ids_BT.max()) + 1)[position_ids_BT]
        mask = None if attention_mask_BTT is None else attention_mask_BTT.unsqueeze(1)
        all_lengths = (tokens,) * rows if lengths is None else tuple(lengths)
        x = x_BTD
        row_top_k = per_row(plans, rows)
        levels = build_schedule(tuple(range(rows)), row_top_k, last_only=False)
        for block, level in zip(self.blocks, levels, strict=True):
            if not level.run.sources:
                continue
            picked, source = level.run.prompts, _take(x, level.run.sources)
            mask_R = mask if mask is None or len(mask) == 1 else _take(mask, picked)
            rope_R = rope if rope.dim() == 4 or len(rope) == 1 else _take(rope, picked)
            top_k = spread_top_k(level.run.top_k, [all_lengths[i] for i in picked], tokens, x.device)
            out = block(source, rope_R, mask_R, top_k, experts)[0]
            x = torch.cat((out, _take(x, level.skip))) if level.skip else out
        return self.final_norm(_in_prompt_order(x, rows, row_top_k))

    def run_prefix(
        self, x_BTD: Tensor, lengths: Sequence[int], depth: int = MAX_INSERTION, experts: str = "auto"
    ) -> Prefix:
        """Blocks 1..depth at full top-k on right-padded prompts, everything kept."""
        tokens = x_BTD.shape[1]
        rope = self.rope(tokens)[:tokens]
        top_k = spread_top_k((FULL_TOP_K,) * len(x_BTD), lengths, tokens, x_BTD.device)
        hidden, keys, values = [x_BTD], [], []
        for block in self.blocks[:depth]:
            out, key, value = block(hidden[-1], rope, None, top_k, experts)
            hidden.append(out)
            keys.append(key)
            values.append(value)
        return Prefix(tuple(hidden), tuple(keys), tuple(values), tuple(lengths))

    def read_latency_tokens(self, tokens_BLD: Tensor, prefix: Prefix, experts: str = "auto") -> Tensor:
        """States (B, depth, L, D) of L alternative last tokens after each block of `prefix`.

        Each attends to its prompt and itself, never to the others; nothing attends to it, and no key or value is left.
        """
        rows, count, _ = tokens_BLD.shape
        device = tokens_BLD.device
        lengths_B = torch.tensor(prefix.lengths, device=device)
        rope = self.rope(prefix.tokens + 1)[lengths_B].unsqueeze(1)
        prompt_BT = torch.arange(prefix.tokens, device=device) < lengths_B.unsqueeze(1)
        itself_LL = torch.eye(count, dtype=torch.bool, device=device)
        mask = torch.cat(
            (prompt_BT[:, None, None].expand(-1, 1, count, -1), itself_LL.expand(rows, 1, count, count)), -1
        )
        x, states = tokens_BLD, []
        for block, key_BTHd, value_BTHd in zip(self.blocks, prefix.keys, prefix.values, strict=False):
            assert isinstance(block, Block)
            query, key, value = block.project(x, rope)
            mixed = attend(query, torch.cat((key_BTHd, key), 1), torch.cat((value_BTHd, value), 1), mask)
            x = block.finish(x, mixed, FULL_TOP_K, experts)
            states.append(x)
        return torch.stack(states, 1)

    def prefill(
        self,
        x_BTD: Tensor | None,
        lengths: Sequence[int],
        prompts: Sequence[int],
        top_k: Sequence[tuple[int, ...]],
        *,
        prefix: Prefix | None = None,
        experts: str = "auto",
    ) -> Prefilled:
        """Run prompts under plans up to the state that gives the first new token.

        Args:
            x_BTD: embeddings of B right-padded prompts; not needed with a `prefix`, which holds them.
            lengths: their true lengths.
            prompts: for each row to run, the index of its prompt. Rows share all they have in common.
            top_k: for each row, experts per token in each block (`ExecutionPlan.top_k_per_block`).
            prefix: first blocks of the same prompts, already run.
        """
        given = 0 if prefix is None else prefix.depth
        if prefix is None and x_BTD is None:
            raise ValueError("prefill needs embeddings or a prefix")
        states: tuple[Tensor | None, ...] = (x_BTD,) if prefix is None else prefix.hidden
        run = _PrefillRun(self, tuple(lengths), len(top_k), experts)
        for depth in range(1, given + 1):
            run.end_within_prefix(states[depth], depth, given, prompts, top_k)
        for block, level in enumerate(build_schedule(tuple(prompts), tuple(top_k), given=given)):
            run.enter(states[block] if level.enter else None, level)
            run.block(block, level)
        return Prefilled(run.last(), tuple(run.caches), prefix, tuple(prompts), tuple(lengths), tuple(top_k))


class _PrefillRun:
    """State of one prefill between levels."""

    def __init__(self, language: Language, lengths: tuple[int, ...], rows: int, experts: str) -> None:
        self.language, self.lengths, self.experts = language, lengths, experts
        self.x: Tensor | None = None
        self.caches: list[BlockCache | None] = []
        self.endings: list[tuple[tuple[int, ...], Tensor]] = []
        self.rows = rows

    def enter(self, state_BTD: Tensor | None, level: Level) -> None:
        if state_BTD is None:
            return
        entering = _take(state_BTD, level.enter)
        self.x = entering if self.x is None or not len(self.x) else torch.cat((self.x, entering))

    def end_within_prefix(
        self, state_BTD: Tensor | None, depth: int, given: int, prompts: Sequence[int], top_k: Sequence[tuple[int, ...]]
    ) -> None:
        """Rows that keep the first `depth` blocks as given and nothing after them are done already."""
        rows = [row for row, ks in enumerate(top_k) if not any(ks[depth:]) and entry_block(ks, given) == depth]
        if rows and state_BTD is not None:
            lasts = _last_tokens(state_BTD, self.lengths)
            self.endings.append((tuple(rows), _take(lasts, [prompts[row] for row in rows])))

    def block(self, index: int, level: Level) -> None:
        if self.x is None or not (level.run.sources or level.final.sources):
            self.caches.append(None)
            return
        outputs, lasts, keys, values = [], [], [], []
        if level.run.sources:
            out, key, value = self._whole(index, level.run)
            outputs.append(out)
            keys.append(key)
            values.append(value)
            if any(place < len(out) for _, place in level.ending):
                lasts.append(_last_tokens(out, self._lengths(level.run)))
        if level.final.sources:
            last, key, value = self._last_only(index, level.final)
            keys.append(key)
            values.append(value)
            lasts.append(last)
        if level.ending:
            self._end(level, lasts)
        self.caches.append(BlockCache(_join(keys), _join(values), level.row_nodes))
        if level.skip:
            outputs.append(_take(self.x, level.skip))
        self.x = _join(outputs) if outputs else None

    def _whole(self, index: int, nodes: Nodes) -> tuple[Tensor, Tensor, Tensor]:
        assert self.x is not None
        source, lengths = _take(self.x, nodes.sources), self._lengths(nodes)
        tokens = source.shape[1]
        top_k = spread_top_k(nodes.top_k, lengths, tokens, source.device)
        rope = self.language.rope(tokens)[:tokens]
        out, key, value = self.language.blocks[index](source, rope, None, top_k, self.experts)
        return out, _own(key), _own(value)

    def _last_only(self, index: int, nodes: Nodes) -> tuple[Tensor, Tensor, Tensor]:
        assert self.x is not None
        block = self.language.blocks[index]
        assert isinstance(block, Block)
        source, lengths = _take(self.x, nodes.sources), self._lengths(nodes)
        tokens = source.shape[1]
        table = self.language.rope(tokens)
        last = _last_tokens(source, lengths).unsqueeze(1)
        if all(length == tokens for length in lengths):
            mask, last_rope = None, table[tokens - 1 : tokens]
        else:
            lengths_R = torch.tensor(lengths, device=source.device)
            mask = (torch.arange(tokens, device=source.device) < lengths_R.unsqueeze(1))[:, None, None]
            last_rope = table[lengths_R - 1].unsqueeze(1)
        query, key, value = block.project_last(source, last, table[:tokens], last_rope)
        top_k = spread_top_k(nodes.top_k, None, 1, source.device)
        out = block.finish(last, attend(query, key, value, mask), top_k, self.experts)
        return out.squeeze(1), _own(key), _own(value)

    def _lengths(self, nodes: Nodes) -> list[int]:
        return [self.lengths[prompt] for prompt in nodes.prompts]

    def _end(self, level: Level, lasts: list[Tensor]) -> None:
        whole = len(level.run.sources)
        # Without ending rows among the whole nodes their last tokens were not gathered.
        skipped = 0 if any(place < whole for _, place in level.ending) else whole
        rows, places = zip(*level.ending, strict=True)
        self.endings.append((rows, _take(_join(lasts), [place - skipped for place in places])))

    def last(self) -> Tensor:
        """Last hidden states (rows, D) in row order."""
        states = _join([state for _, state in self.endings])
        order = [row for rows, _ in self.endings for row in rows]
        return _take(states, [order.index(row) for row in range(self.rows)])


def _in_prompt_order(x: Tensor, rows: int, top_k: Sequence[tuple[int, ...]]) -> Tensor:
    """Undo the reordering that `run` before `skip` leaves when each row is its own node."""
    order = list(range(rows))
    for block in range(len(top_k[0])):
        kept = [row for row in order if top_k[row][block]]
        order = kept + [row for row in order if not top_k[row][block]]
    return _take(x, [order.index(row) for row in range(rows)])


def _take(x: Tensor, places: Sequence[int]) -> Tensor:
    """Rows of x at `places`; x itself where that is all of them in order."""
    if len(places) == len(x) and all(place == i for i, place in enumerate(places)):
        return x
    return x.index_select(0, torch.tensor(places, dtype=torch.long, device=x.device))


def _own(part: Tensor) -> Tensor:
    """A cache that does not keep the projections alive of which it is a view; a single prompt is not worth the copy."""
    return part if len(part) == 1 else part.contiguous()


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _last_tokens(x_RTD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each row's last true token (R, D)."""
    tokens = x_RTD.shape[1]
    if all(length == tokens for length in lengths):
        return x_RTD[:, -1]
    places = torch.tensor([row * tokens + length - 1 for row, length in enumerate(lengths)], device=x_RTD.device)
    return x_RTD.flatten(0, 1).index_select(0, places)
