"""The arithmetic of GRPO: advantages within groups (numpy), the loss (torch), minibatches. No Ray, no state.

Shapes: N groups of G rollouts; B rows of a minibatch, one per decision (stage 1 and stage 2 mixed); P = 40 pairs of
choices, of which those of the other stage have credit 0.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.knobs import KNOBS
from policies.distribution import KnobDistribution
from policies.grpo.config import GRPOSettings

FloatArray = npt.NDArray[np.float64]
EPSILON: Final = 1e-6
"""Added to a group's standard deviation; also the one up to which its returns count as equal."""


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages (N, G), and which of the N groups had equal returns (N,) and so teach nothing."""

    values: FloatArray
    uniform: npt.NDArray[np.bool_]

    @property
    def uniform_share(self) -> float:
        """Share of groups whose returns are all equal."""
        return float(self.uniform.mean()) if self.uniform.size else 0.0


def group_advantages(returns: npt.ArrayLike, *, normalize_by_std: bool) -> GroupAdvantages:
    """Return minus the group's mean, optionally over the group's standard deviation.

    With the division this is GRPO (Shao et al. 2024, DeepSeekMath, section 4.1.2); without it, the unbiased form of
    Liu et al. 2025 (Dr. GRPO), in which groups with a small standard deviation weigh little.

    Args:
        returns: (N, G), one row per group.
    """
    returns_NG = np.asarray(returns, dtype=np.float64)
    centred = returns_NG - returns_NG.mean(axis=1, keepdims=True)
    std_N1 = returns_NG.std(axis=1, keepdims=True)
    uniform_N = std_N1[:, 0] <= EPSILON
    scale = np.where(uniform_N[:, None], np.inf, std_N1 + EPSILON if normalize_by_std else 1.0)
    return GroupAdvantages(centred / scale, uniform_N)


@dataclass(frozen=True)
class LossInputs:
    """One minibatch.

    Attributes:
        old_logits: (B, 40) masked logits of the policy that acted.
        credits: (B, 40) advantage of each pair times how often it counts: the advantage at the pair taken and 0
            elsewhere for a rollout, probability times advantage if all pairs are known.
        weights: (B,) mean 1 over an epoch; 0 for padding.
        entropy_shares: (B,) part of the entropy bonus given, 0 to 1.
        reference_logits: (B, 40) of the frozen reference, or None.
    """

    old_logits: Tensor
    credits: Tensor
    weights: Tensor
    entropy_shares: Tensor
    reference_logits: Tensor | None = None


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A) (Schulman et al. 2017, eq. 7; bounds apart as in DAPO, 2025)."""
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def ratio_limit(settings: GRPOSettings) -> float:
    """Where the ratio is cut off: at `dual_clip` when rollouts may lag (Ye et al. 2020), else nowhere.

    The clip alone leaves the gradient of a bad action unbounded that has become much more likely since it was taken.
    """
    return settings.dual_clip if settings.max_policy_lag else math.inf


def grpo_loss(logits: Tensor, inputs: LossInputs, settings: GRPOSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss (clipped surrogate, KL to the reference, entropy bonus), and its terms as detached scalars.

    Args:
        logits: (B, 40) masked logits of the policy being trained.
    """
    policy, old = KnobDistribution(logits), KnobDistribution(inputs.old_logits)
    log_ratio_BP = torch.cat(policy.stage_log_probs, -1) - torch.cat(old.stage_log_probs, -1)
    # Masked pairs have huge logits, whose differences are noise; their credit is 0.
    ratio_BP = torch.where(inputs.credits != 0, log_ratio_BP, 0.0).exp()
    limited_BP = ratio_BP.clamp(max=ratio_limit(settings))
    surrogate_B = clipped_surrogate(limited_BP, inputs.credits, settings.clip_low, settings.clip_high).sum(-1)
    loss_B = -surrogate_B - settings.entropy_coef * (policy.entropy() * inputs.entropy_shares)
    metrics = {}
    if inputs.reference_logits is not None:
        # Exact, as few actions make it cheap. An estimate from the sampled action has the right mean, but its gradient
        # (of "k3", Shao et al. 2024, eq. 4) is that of KL(reference || policy).
        kl_B = policy.kl(KnobDistribution(inputs.reference_logits))
        loss_B = loss_B + settings.kl_coef * kl_B
        metrics["kl_reference"] = _mean(kl_B, inputs.weights)
    loss = _mean(loss_B, inputs.weights)
    metrics["loss"] = loss
    metrics["loss_policy"] = _mean(-surrogate_B, inputs.weights)
    metrics |= _diagnostics(policy, old, ratio_BP, inputs, settings)
    return loss, {name: value.detach() for name, value in metrics.items()}


def _mean(values_B: Tensor, weights_B: Tensor) -> Tensor:
    return (values_B * weights_B).mean()


@torch.no_grad()
def _diagnostics(
    policy: KnobDistribution, old: KnobDistribution, ratio_BP: Tensor, inputs: LossInputs, settings: GRPOSettings
) -> dict[str, Tensor]:
    """KL from the acting policy, clipped shares of the credit, and each head's entropy over the rows that decide it."""
    size_BP = inputs.credits.abs() / inputs.credits.abs().sum(-1, keepdim=True).clamp(min=1e-30)
    limit = ratio_limit(settings)
    clipped = {
        "clip_low_share": (ratio_BP < 1.0 - settings.clip_low) & (inputs.credits < 0),
        "clip_high_share": (ratio_BP > 1.0 + settings.clip_high) & (inputs.credits > 0),
    }
    if math.isfinite(limit):
        clipped["dual_clip_share"] = (ratio_BP > limit) & (inputs.credits < 0)
    metrics = {name: _mean((hit_BP * size_BP).sum(-1), inputs.weights) for name, hit_BP in clipped.items()}
    metrics["kl_old"] = _mean(old.kl(policy), inputs.weights)
    entropies_BH = policy.head_entropies()
    for column, (name, log_p) in enumerate(zip(KNOBS, policy.log_probs, strict=True)):
        deciding_B = ((log_p > -1.0e6).sum(-1) > 1) & (inputs.weights > 0)
        count = deciding_B.sum().clamp(min=1)
        metrics[f"entropy_{name}"] = (entropies_BH[:, column] * deciding_B).sum() / count
    return metrics


def minibatches(
    rows: int, size: int, learners: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], int]:
    """One epoch's row order, cut so that several learners together see the same minibatches as one.

    Rows are shuffled and padded to equal minibatches of about `size`; padding repeats rows at weight 0, and
    the other weights make the epoch's mean weight 1. Learner l gets the l-th contiguous share, which contains
    its slice of each minibatch.

    Args:
        rows: number of rows R to cover, each exactly once.
        size: wished size of a minibatch over all learners.

    Returns:
        Row indices (P,), weights (P,) and the size of a minibatch over all learners.
    """
    count = max(1, round(rows / size))
    size = -(-rows // (count * learners)) * learners
    padded = count * size
    order = np.resize(generator.permutation(rows), padded)
    weights = np.where(np.arange(padded) < rows, padded / rows, 0.0).astype(np.float32)
    by_learner = np.arange(padded).reshape(count, learners, size // learners).transpose(1, 0, 2).reshape(-1)
    return order[by_learner], weights[by_learner], size
