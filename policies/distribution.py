"""The controller's distribution: one categorical per stage over pairs of choices.

Which choices meet a budget is a property of the pair, so each stage has one masked categorical: 15 (tier, insertion)
pairs with logit tier + insertion, 25 (top-k, blocks) pairs with logit top-k + blocks. Masked logits are a large finite
negative, not -inf: their probability is exactly 0 in float32, while entropy, divergence and gradients stay finite. A
stage with one legal pair has log-probability 0 and entropy 0.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from envs.knobs import HEAD_SIZES, PAIRS, STAGE1_PAIRS

LOGITS_WIDTH: Final = PAIRS
MASKED: Final = -1.0e9
_STAGES: Final = (STAGE1_PAIRS, PAIRS - STAGE1_PAIRS)
STAGES: Final = len(_STAGES)


def pair_logits(first: Tensor, second: Tensor) -> Tensor:
    """Logits (B, M * N), first + second of every pair, from those of two heads (B, M) and (B, N)."""
    return (first[:, :, None] + second[:, None, :]).flatten(1)


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits with every option whose mask (non-zero = legal) is zero replaced by a large negative."""
    return logits.masked_fill(mask <= 0, MASKED)


@dataclass(frozen=True)
class KnobDistribution:
    """Product of two categoricals over masked pair `logits` (B, 40); actions are (B, 4) indices, one per head."""

    logits: Tensor

    @cached_property
    def stage_log_probs(self) -> tuple[Tensor, Tensor]:
        """Normalized log-probabilities of pairs per stage: (B, 15) and (B, 25)."""
        first, second = self.logits.split(_STAGES, dim=-1)
        return first.log_softmax(-1), second.log_softmax(-1)

    @cached_property
    def log_probs(self) -> tuple[Tensor, ...]:
        """Marginal log-probabilities per head: (B, 3), (B, 5), (B, 5), (B, 5)."""
        first, second = self.stage_log_probs
        pairs = (first.unflatten(-1, HEAD_SIZES[:2]), second.unflatten(-1, HEAD_SIZES[2:]))
        return tuple(log_p.logsumexp(dim) for log_p in pairs for dim in (-1, -2))

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability (B,) of actions (B, 4)."""
        chosen = actions.long()
        pairs = (chosen[:, 0] * HEAD_SIZES[1] + chosen[:, 1], chosen[:, 2] * HEAD_SIZES[3] + chosen[:, 3])
        first, second = (p.gather(-1, pair[:, None])[:, 0] for p, pair in zip(self.stage_log_probs, pairs, strict=True))
        return first + second

    def head_entropies(self) -> Tensor:
        """Entropy in nats of each head's marginal, (B, 4)."""
        return torch.stack([-(log_p.exp() * log_p).sum(-1) for log_p in self.log_probs], dim=-1)

    def entropy(self) -> Tensor:
        """Joint entropy in nats of both stages, (B,)."""
        first, second = (-(log_p.exp() * log_p).sum(-1) for log_p in self.stage_log_probs)
        return first + second

    def kl(self, other: "KnobDistribution") -> Tensor:
        """KL(self || other) in nats, (B,). Both must share their masks."""
        terms = zip(self.stage_log_probs, other.stage_log_probs, strict=True)
        first, second = ((p.exp() * (p - q)).sum(-1) for p, q in terms)
        return first + second

    def argmax(self) -> Tensor:
        """Most likely action, (B, 4) int64; ties go to the lower, cheaper indices."""
        return _actions([log_p.argmax(-1) for log_p in self.stage_log_probs])

    def at(self, uniforms: Tensor) -> Tensor:
        """The action (B, 4) at uniform numbers (B, STAGES) in [0, 1) of each stage's cumulative distribution."""
        pairs = []
        for log_p, uniform in zip(self.stage_log_probs, uniforms.unbind(-1), strict=True):
            cumulative = log_p.double().exp().cumsum(-1)
            cumulative = cumulative / cumulative[:, -1:]  # ends at 1 exactly: masked pairs behind it are never reached
            pairs.append(torch.searchsorted(cumulative, uniform[:, None].contiguous(), right=True)[:, 0])
        return _actions(pairs)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One action per row, (B, 4) int64."""
        draws = [torch.multinomial(p.exp(), 1, generator=generator)[:, 0] for p in self.stage_log_probs]
        return _actions(draws)


def _actions(pairs: list[Tensor]) -> Tensor:
    """Head indices (B, 4) of one pair index (B,) per stage."""
    first, second = pairs
    widths = HEAD_SIZES[1], HEAD_SIZES[3]
    return torch.stack((first // widths[0], first % widths[0], second // widths[1], second % widths[1]), dim=-1)
