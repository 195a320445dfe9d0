"""Stage 1: before vision runs, picks the image tier and the insertion position from the question and the budget."""

from typing import Final

from torch import Tensor, nn

from envs.knobs import INSERTIONS, TIERS
from policies.budget_feature import BUDGET_WIDTH

HIDDEN: Final = 256
# Small head weights make the first policy near uniform, so that early groups try every setting.
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


def head(hidden: int, options: int) -> nn.Linear:
    """Output layer of `options` logits that starts near uniform."""
    layer = nn.Linear(hidden, options)
    nn.init.normal_(layer.weight, std=HEAD_STD)
    nn.init.zeros_(layer.bias)
    return layer


class Stage1(nn.Module):
    """Tier and insertion position.

    Args:
        d_model: width of the language feature (mean of the model's word embeddings over the question).
        hidden: width of the MLP.
    """

    def __init__(self, d_model: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.trunk = Projections((d_model, BUDGET_WIDTH), hidden)
        self.tier = head(hidden, len(TIERS))
        self.insertion = head(hidden, len(INSERTIONS))

    def forward(self, language_feature: Tensor, budget_feature: Tensor) -> dict[str, Tensor]:
        """(B, d_model), (B, 256) -> {"tier_logits": (B, 3), "insertion_logits": (B, 5)}."""
        hidden = self.trunk(language_feature, budget_feature)
        return {"tier_logits": self.tier(hidden), "insertion_logits": self.insertion(hidden)}
