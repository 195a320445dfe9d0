"""One decoding step of one row as 6 kernels a block and 2 more (see `kernels`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from envs.model.execution_tree import FULL_TOP_K
from envs.model.kernels import decode as kernels
from envs.model.language import Block, Language

_PDL_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Tuning:
    """Tile sizes and warps a program, the fastest found on an H200. Rows of a weight a program takes, unless said."""

    qkv: tuple[int, int] = (4, 4)
    # Splits of the cached tokens, tokens at a time, warps.
    attention: tuple[int, int, int] = (32, 64, 4)
    out: tuple[int, int] = (8, 8)
    router: tuple[int, int] = (1, 8)
    gate_up: tuple[int, int] = (2, 8)
    # Hidden units and output columns of a program, warps.
    down: tuple[int, int, int] = (256, 32, 4)
    # Rows, tiles of rows a program, warps.
    head: tuple[int, int, int] = (8, 2, 4)
    pdl: bool = True


def _above(size: int) -> int:
    return int(triton.next_power_of_2(size))


class KernelStep:
    """Launches the kernels of a step on preallocated buffers; nothing is allocated and nothing waits for the device.

    `cell` is the `static.Cell` with caches, token and position.
    """

    def __init__(self, language: Language, cell: "Cell", tuning: Tuning | None = None) -> None:  # type: ignore[name-defined]  # noqa: F821
        config, device = language.config, language.wte.device
        self.language, self.cell, self.tuning = language, cell, tuning or Tuning()
        self.width, self.head = config.d_model, config.head_dim
        self.pdl = (
            self.tuning.pdl and device.type == "cuda" and torch.cuda.get_device_capability(device) >= _PDL_CAPABILITY
        )
        width, heads, experts, hidden = config.d_model, config.n_heads, config.n_experts, config.expert_hidden
        tuned = self.tuning

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        def counters(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.x, self.qkv, self.mixed = floats(width), floats(3 * width), floats(width)
        self.squares = floats(-(-3 * width // tuned.qkv[0]))
        self.partial = floats(heads, tuned.attention[0], self.head)
        self.extremes = floats(heads, tuned.attention[0], 2)
        self.normed = torch.zeros(width, dtype=language.wte.dtype, device=device)
        self.router_logits, self.shares = floats(experts), floats(experts)
        self.chosen = counters(experts)
        self.inner = floats(FULL_TOP_K, hidden)
        self.parts = -(-hidden // tuned.down[0])
        self.down_partial = floats(FULL_TOP_K * self.parts, width)
        self.head_programs = -(-config.embedding_size // (tuned.head[0] * tuned.head[1]))
        self.best = floats(2, self.head_programs)
        self.head_arrived, self.route_arrived = counters(1), counters(1)
        self.attention_arrived = counters(heads)
        self.down_arrived = counters(-(-width // tuned.down[1]))

    def __call__(self, kept: Sequence[int]) -> None:
        """One step through the blocks `kept`: reads and updates `cell`; logits are left in `cell.logits`."""
        self.embed()
        for index in kept:
            block = self.language.blocks[index]
            assert isinstance(block, Block)
            self.project(block)
            self.attend(block, index)
            self.output(block)
            self.route(block)
            self.expand(block, index)
            self.reduce(block, index)
        self.choose()

    def _options(self, warps: int) -> dict[str, int | bool]:
        return {"PDL": self.pdl, "num_warps": warps, **({"launch_pdl": True} if self.pdl else {})}

    def embed(self) -> None:
        """Embedding of the token."""
        wte = self.language.wte
        kernels.embed[(1,)](self.cell.token, wte, self.x, self.width, _above(self.width), **self._options(4))

    def project(self, block: Block) -> None:
        """Query, key and value before their norms."""
        (rows, warps), n = self.tuning.qkv, 3 * self.width
        kernels.norm_project[(triton.cdiv(n, rows),)](
            self.x, block.attn_norm, block.qkv, self.qkv, self.squares, block.eps,
            self.width, n, _above(self.width), rows, **self._options(warps),
        )  # fmt: skip

    def attend(self, block: Block, index: int) -> None:
        """Attention over the cache, which gets this token's key and value."""
        splits, slots, warps = self.tuning.attention
        sums = self.width // self.tuning.qkv[0]
        cell = self.cell
        kernels.attention[(block.heads, splits)](
            self.qkv, self.squares, block.qk_norm, cell.rope, cell.keys[index], cell.values[index], cell.position,
            self.partial, self.extremes, self.attention_arrived, self.mixed, block.eps, self.head**-0.5,
            self.width, self.head, _above(self.head), sums, _above(sums), splits, slots, **self._options(warps),
        )  # fmt: skip

    def output(self, block: Block) -> None:
        """Output projection, added to the residual stream."""
        rows, warps = self.tuning.out
        kernels.project_add[(triton.cdiv(self.width, rows),)](
            self.mixed, block.attn_out, self.x, self.width, _above(self.width), rows, **self._options(warps)
        )

    def route(self, block: Block) -> None:
        """Experts and their shares."""
        (rows, warps), experts = self.tuning.router, len(block.router)
        kernels.route[(triton.cdiv(experts, rows),)](
            self.x, block.ff_norm, block.router, self.normed, self.router_logits, self.chosen, self.shares,
            self.route_arrived, block.eps, self.width, experts, _above(self.width), _above(experts), rows,
            **self._options(warps),
        )  # fmt: skip

    def expand(self, block: Block, index: int) -> None:
        """The chosen experts' hidden units."""
        (rows, warps), hidden = self.tuning.gate_up, self.inner.shape[1]
        kernels.gate_up[(triton.cdiv(hidden, rows), FULL_TOP_K)](
            self.normed, block.gate_up, self.cell.top_k[index:], self.chosen, self.shares, self.inner,
            self.width, hidden, _above(self.width), rows, **self._options(warps),
        )  # fmt: skip

    def reduce(self, block: Block, index: int) -> None:
        """The chosen experts' outputs, added to the residual stream."""
        (depth, cols, warps), hidden = self.tuning.down, self.inner.shape[1]
        kernels.down[(triton.cdiv(self.width, cols), FULL_TOP_K * self.parts)](
            self.inner, block.down, self.cell.top_k[index:], self.chosen, self.down_partial, self.down_arrived, self.x,
            self.width, hidden, depth, cols, self.parts, _above(FULL_TOP_K * self.parts), **self._options(warps),
        )  # fmt: skip

    def choose(self) -> None:
        """Logits, the next token, and what follows from it."""
        rows, tiles, warps = self.tuning.head
        language, cell = self.language, self.cell
        kernels.choose[(self.head_programs,)](
            self.x, language.ln_f, language.lm_head, cell.logits, self.best, self.head_arrived, cell.token,
            cell.position, cell.finished, cell.ids, cell.count, language.config.eos_token_id, language.config.norm_eps,
            self.width, len(language.lm_head), _above(self.width), rows, tiles, self.head_programs,
            _above(self.head_programs), **self._options(warps),
        )  # fmt: skip
