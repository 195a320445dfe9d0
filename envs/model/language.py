"""The language part: embeddings, sixteen mixture-of-experts blocks, logits; run under plans, with or without caches.

Letters: B rows, T tokens, D model width, H heads, d head width, R rows or nodes a block runs on, L latency tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.knobs import INSERTIONS, ExecutionPlan
from envs.model import fused
from envs.model.config import AdaptiveMolmoEConfig
from envs.model.device_indices import on_device
from envs.model.execution_tree import FULL_TOP_K, per_row
from envs.model.experts import TopK, expand_top_k, mixture
from envs.model.prefill import Prefilled, PrefillRun, Prefix

MAX_INSERTION = max(INSERTIONS)
# cuDNN's attention, which torch prefers on Hopper, takes tens of milliseconds to plan for every new shape, and prompts,
# batches and caches hardly ever come in the same shape twice.
torch.backends.cuda.enable_cudnn_sdp(False)


class Block(nn.Module):
    """One pre-norm block. Rotary pairs are side by side (see `checkpoint`), so that rotating is one complex product."""

    def __init__(self, config: AdaptiveMolmoEConfig) -> None:
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

    def finish(self, x_RTD: Tensor, mixed_RHTd: Tensor, top_k: int | TopK, kernel: str) -> Tensor:
        """Output projection, then the mixture of experts, each added to its input."""
        shape = x_RTD.shape
        mixed = mixed_RHTd.transpose(1, 2).reshape(-1, shape[-1])
        # A plain sum keeps the residual stream in its own dtype under autocast.
        x_ND = x_RTD.reshape(-1, shape[-1]) + F.linear(mixed, self.attn_out)
        normed = F.rms_norm(x_ND, shape[-1:], self.ff_norm, self.eps)
        logits = fused.router_logits(normed, self.router)
        return mixture(normed, logits, self.gate_up, self.down, top_k, kernel, residual_ND=x_ND).view(shape)

    def forward(
        self, x_RTD: Tensor, rope: Tensor, mask: Tensor | None, top_k: int | TopK, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens: output (R, T, D), keys and values (R, T, H, d). Without a mask, attention is causal."""
        query, key, value = self.project(x_RTD, rope)
        mixed = attend(query, key, value, mask, causal=mask is None)
        return self.finish(x_RTD, mixed, top_k, kernel), key, value

    def forward_last(
        self,
        x_RTD: Tensor,
        last_R1D: Tensor,
        rope: Tensor,
        last_rope: Tensor,
        mask: Tensor | None,
        top_k: int | TopK,
        kernel: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (R, T, H, d) of all tokens, but the output (R, 1, D) of each row's last token alone."""
        query, key, value = self.project_last(x_RTD, last_R1D, rope, last_rope)
        return self.finish(last_R1D, attend(query, key, value, mask), top_k, kernel), key, value


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


class Language(nn.Module):
    """Word embeddings, blocks, final norm and output projection."""

    def __init__(self, config: AdaptiveMolmoEConfig) -> None:
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

    def next_logits(self, last: Tensor) -> Tensor:
        """Logits (..., vocabulary) of the next token from the last block's output; in float32 on a GPU.

        Rounded to bfloat16, the highest logits tie every few tokens, and batches of other sizes would choose others.
        """
        return fused.float32_logits(self.final_norm(last), self.lm_head)

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
        experts: str = "auto",
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm, differentiable.

        Args:
            x_BTD: token embeddings, image features added.
            plans: one plan, or one per row.
            position_ids_BT: positions; 0..T-1 where not given.
            attention_mask_BTT: True where a token (row) may attend to another (column); causal where not given.
                Every token must be allowed at least one.
            lengths: true lengths of right-padded rows, to spend no experts on padding.
            experts: "dense", "grouped" or "auto" (see `experts`).
        """
        rows, tokens, _ = x_BTD.shape
        rope = self.rope(tokens)[:tokens]
        if position_ids_BT is not None:
            rope = self.rope(int(position_ids_BT.max()) + 1)[position_ids_BT]
        mask = None if attention_mask_BTT is None else attention_mask_BTT.unsqueeze(1)
        all_lengths = (tokens,) * rows if lengths is None else tuple(lengths)
        x = x_BTD
        row_top_k = per_row(plans, rows)
        for index, block in enumerate(self.blocks):
            kept = [row for row in range(rows) if row_top_k[row][index]]
            if not kept:
                continue
            places = None if len(kept) == rows else on_device(kept, x.device)
            mask_R = mask if mask is None or len(mask) == 1 else _take(mask, places)
            rope_R = rope if rope.dim() == 4 or len(rope) == 1 else _take(rope, places)
            kept_lengths = [all_lengths[row] for row in kept]
            top_k = expand_top_k([row_top_k[row][index] for row in kept], kept_lengths, tokens, x.device)
            out = block(_take(x, places), rope_R, mask_R, top_k, experts)[0]
            x = out if places is None else x.index_copy(0, places, out)
        return self.final_norm(x)

    def run_prefix(
        self, x_BTD: Tensor, lengths: Sequence[int], depth: int = MAX_INSERTION, experts: str = "auto"
    ) -> Prefix:
        """Blocks 1..depth at full top-k on right-padded prompts, everything kept."""
        tokens = x_BTD.shape[1]
        rope = self.rope(tokens)[:tokens]
        top_k = expand_top_k((FULL_TOP_K,) * len(x_BTD), lengths, tokens, x_BTD.device)
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
        lengths_B = on_device(prefix.lengths, device)
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
            x_BTD: embeddings of B right-padded prompts; not needed with a `prefix`, which contains them.
            lengths: their true lengths.
            prompts: for each row to run, the index of its prompt. Rows share all they have in common.
            top_k: for each row, experts per token in each block (`ExecutionPlan.top_k_per_block`).
            prefix: first blocks of the same prompts, already run.
        """
        if prefix is not None:
            inputs: Sequence[Tensor] = prefix.hidden
        elif x_BTD is not None:
            inputs = (x_BTD,)
        else:
            raise ValueError("prefill needs embeddings or a prefix")
        run = PrefillRun(self, inputs, tuple(lengths), tuple(prompts), tuple(top_k), experts)
        caches = run.run()
        return Prefilled(run.last, caches, prefix, run.prompts, run.lengths, run.top_k)


def _take(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x.index_select(0, places)
