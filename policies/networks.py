"""The controller's two networks and how they see the budget.

Stage 1 decides before vision runs, from the question and the budget: image tier and insertion position p. Stage 2
decides after block p has run, from the latency token, the budget and p: top-k and the number of blocks.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, INSERTIONS, TIERS, TOP_KS, block_options
from policies.distribution import mask_logits

BUDGET_WIDTH: Final = 256
# Wavelengths in units of the log ratio. From the cheapest to the most expensive plan budgets span about one e-fold:
# the shortest wave tells budgets a few percent apart, the longest covers whatever a user may ask for.
SHORTEST_WAVE: Final = 0.75
LONGEST_WAVE: Final = 8.0


def budget_feature(log_ratio: Tensor) -> Tensor:
    """Sinusoidal encoding of a budget.

    Args:
        log_ratio: (B,) or (B, 1), log(budget / latency of the full plan on this device's reference request).

    Returns:
        (B, 256) float: 128 sines, then 128 cosines, wavelengths in geometric steps (Vaswani et al. 2017, 3.5).
    """
    ratio_B = log_ratio.reshape(log_ratio.shape[0], -1)[:, 0].to(torch.float32)
    angles = ratio_B[:, None] * (2.0 * math.pi / budget_waves(ratio_B.device))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def budget_waves(device: torch.device | None = None) -> Tensor:
    """Wavelengths (128,) in units of the log ratio."""
    exponents = torch.linspace(0.0, 1.0, BUDGET_WIDTH // 2, device=device)
    return SHORTEST_WAVE * (LONGEST_WAVE / SHORTEST_WAVE) ** exponents


# Small head weights make the first policy near uniform, so that early groups try every choice.
HEAD_STD: Final = 0.01


class Projections(nn.Module):
    """Sum of one normalised linear projection per input, then a small MLP.

    Each input has its own fan-in, so a 2048-wide token and a 256-wide budget start with equal say.

    Args:
        widths: width of each input, (B, width) at call time.
        hidden: width of the result, (B, hidden).
    """

    def __init__(self, widths: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.inputs = nn.ModuleList(nn.Linear(width, hidden) for width in widths)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())

    def forward(self, *inputs: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        """Inputs (B, width) each, and an optional (B, hidden) term added before the MLP, to (B, hidden)."""
        parts = [layer(norm(x)) for layer, norm, x in zip(self.inputs, self.norms, inputs, strict=True)]
        total = sum(parts[1:], parts[0]) + extra
        hidden: Tensor = self.mlp(total)
        return hidden


def _head(hidden: int, options: int) -> nn.Linear:
    """Output layer of `options` logits that starts near uniform."""
    layer = nn.Linear(hidden, options)
    nn.init.normal_(layer.weight, std=HEAD_STD)
    nn.init.zeros_(layer.bias)
    return layer


class Stage1(nn.Module):
    """Tier and insertion position.

    Args:
        d_model: width of the language feature (mean of the model's word embeddings over the question).
    """

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.trunk = Projections((d_model, BUDGET_WIDTH), hidden)
        self.tier = _head(hidden, len(TIERS))
        self.insertion = _head(hidden, len(INSERTIONS))

    def forward(self, language_feature: Tensor, budget_feature: Tensor) -> dict[str, Tensor]:
        """(B, d_model), (B, 256) -> {"tier_logits": (B, 3), "insertion_logits": (B, 5)}."""
        hidden = self.trunk(language_feature, budget_feature)
        return {"tier_logits": self.tier(hidden), "insertion_logits": self.insertion(hidden)}


class Stage2(nn.Module):
    """Top-k and block total.

    Args:
        d_model: width of the latency token.
    """

    legal_BN: Tensor

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.trunk = Projections((d_model, BUDGET_WIDTH), hidden)
        # Row 0 stands for "no position yet": stage-1 rows of a mixed batch pass through and are masked later.
        self.position = nn.Embedding(len(INSERTIONS) + 1, hidden)
        nn.init.normal_(self.position.weight, std=hidden**-0.5)
        self.top_k = _head(hidden, len(TOP_KS))
        self.blocks = _head(hidden, len(BLOCK_COUNTS))
        legal = [[True] * len(BLOCK_COUNTS)]
        legal += [[n in block_options(p) for n in BLOCK_COUNTS] for p in INSERTIONS]
        self.register_buffer("legal_BN", torch.tensor(legal), persistent=False)

    def forward(self, latency_token: Tensor, budget_feature: Tensor, insertion_position: Tensor) -> dict[str, Tensor]:
        """(B, d_model), (B, 256), (B,) in 1..5 -> {"top_k_logits": (B, 5), "block_logits": (B, 5)}.

        Block totals that the position does not allow get a large negative logit. Position 0 means not yet chosen.

        Raises:
            UserError: a position outside 0 to 5.
        """
        position_B = insertion_position.long()
        if bool(((position_B < 0) | (position_B > INSERTIONS[-1])).any()):
            raise UserError(
                f"insertion positions from {int(position_B.min())} to {int(position_B.max())} are not allowed: "
                "give 1 to 5"
            )
        hidden = self.trunk(latency_token, budget_feature, extra=self.position(position_B))
        blocks = mask_logits(self.blocks(hidden), self.legal_BN[position_B])
        return {"top_k_logits": self.top_k(hidden), "block_logits": blocks}
