"""The controller's distribution: four masked categoricals (tier, insertion, top-k, blocks) side by side.

Masked logits are a large finite negative, not -inf: their probability is exactly 0 in float32, while
entropy, divergence and gradients stay finite. A head with one legal option has log-probability 0 and entropy 0.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from envs.knobs import HEAD_SIZES

HEADS: Final = ("tier", "insertion", "top_k", "blocks")
LOGITS_WIDTH: Final = sum(HEAD_SIZES)
MASKED: Final = -1.0e9


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, 18) with every option whose mask (B, 18; non-zero = legal) is zero replaced by a large negative."""
    return torch.where(mask > 0, logits, torch.full_like(logits, MASKED))


@dataclass(frozen=True)
class KnobDistribution:
    """Product of four categoricals over masked `logits` (B, 18); actions are (B, 4) indices, one per head."""

    logits: Tensor

    @cached_property
    def log_probs(self) -> tuple[Tensor, ...]:
        """Normalised log-probabilities per head: (B, 3), (B, 5), (B, 5), (B, 5)."""
        return tuple(head.log_softmax(-1) for head in self.logits.split(HEAD_SIZES, dim=-1))

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability (B,) of actions (B, 4)."""
        picked = [
            log_p.gather(-1, action[:, None])[:, 0]
            for log_p, action in zip(self.log_probs, actions.long().unbind(-1), strict=True)
        ]
        return torch.stack(picked).sum(0)

    def head_entropies(self) -> Tensor:
        """Entropy in nats per head, (B, 4)."""
        return torch.stack([-(log_p.exp() * log_p).sum(-1) for log_p in self.log_probs], dim=-1)

    def entropy(self) -> Tensor:
        """Entropy in nats of the whole action, (B,)."""
        return self.head_entropies().sum(-1)

    def kl(self, other: "KnobDistribution") -> Tensor:
        """KL(self || other) in nats, (B,). Both must share their masks."""
        terms = [(p.exp() * (p - q)).sum(-1) for p, q in zip(self.log_probs, other.log_probs, strict=True)]
        return torch.stack(terms).sum(0)

    def argmax(self) -> Tensor:
        """Most likely action, (B, 4) int64; ties go to the lower, cheaper index."""
        return torch.stack([head.argmax(-1) for head in self.log_probs], dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One action per row, (B, 4) int64."""
        draws = [torch.multinomial(p.exp(), 1, generator=generator)[:, 0] for p in self.log_probs]
        return torch.stack(draws, dim=-1)
