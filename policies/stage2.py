"""Stage 2: after block p has run, picks top-k and the block total from the latency token, the budget and p."""

import torch
from torch import Tensor, nn

from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, INSERTIONS, TOP_KS
from envs.knobs import block_options as legal_blocks
from policies.budget_feature import BUDGET_WIDTH
from policies.distribution import mask_logits
from policies.stage1 import HIDDEN, Projections, head


class Stage2(nn.Module):
    """Top-k and block total.

    Args:
        d_model: width of the latency token.
        hidden: width of the MLP.
    """

    legal_BN: Tensor

    def __init__(self, d_model: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.trunk = Projections((d_model, BUDGET_WIDTH), hidden)
        # Row 0 stands for "no position yet": stage-1 rows of a mixed batch pass through and are masked later.
        self.position = nn.Embedding(len(INSERTIONS) + 1, hidden)
        nn.init.normal_(self.position.weight, std=hidden**-0.5)
        self.top_k = head(hidden, len(TOP_KS))
        self.blocks = head(hidden, len(BLOCK_COUNTS))
        legal = [[True] * len(BLOCK_COUNTS)]
        legal += [[n in legal_blocks(p) for n in BLOCK_COUNTS] for p in INSERTIONS]
        self.register_buffer("legal_BN", torch.tensor(legal), persistent=False)

    @staticmethod
    def block_options(insertion_position: int) -> tuple[int, ...]:
        """Legal block totals at an insertion position 1 to 5."""
        return legal_blocks(int(insertion_position))

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
