"""The GRPO loss: clipped surrogate, KL to a reference, entropy bonus. Pure functions on torch tensors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.distribution import HEADS, KnobDistribution


@dataclass(frozen=True)
class LossSettings:
    """Weights of the loss terms.

    Attributes:
        clip_low: the ratio may fall to 1 - clip_low before its gradient stops.
        clip_high: the ratio may rise to 1 + clip_high before its gradient stops.
        kl_coeff: weight of the KL to the reference policy; 0 leaves the reference out.
        entropy_coeff: weight of the entropy bonus, per nat.
        ratio_max: the ratio is cut off there, and with it the gradient of a bad action that has become much more
            likely since it was taken, which the clip alone leaves unbounded.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coeff: float = 0.0
    entropy_coeff: float = 0.01
    ratio_max: float = math.inf


@dataclass(frozen=True)
class LossInputs:
    """One minibatch: rows are single decisions (stage-1 and stage-2 steps mixed).

    Attributes:
        old_logits: (B, 40) masked logits of the policy that acted.
        actions: (B, 4) indices.
        old_log_prob: (B,) log-probability of the action when it was taken.
        advantages: (B,).
        weights: (B,) mean 1 over an epoch; 0 for padding.
        reference_logits: (B, 40) of the frozen reference, or None.
        entropy_shares: (B,) part of the entropy bonus given, 0 to 1; None gives all of it.
    """

    old_logits: Tensor
    actions: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    weights: Tensor
    reference_logits: Tensor | None = None
    entropy_shares: Tensor | None = None


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A) per row (Schulman et al. 2017, eq. 7; bounds apart as in DAPO, 2025)."""
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def kl_estimate(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per row from a sampled action: exp(d) - d - 1 with d = reference - policy.

    Never negative and unbiased for actions of the policy itself (Schulman 2020, "k3"; Shao et al. 2024, eq. 4).
    """
    delta = reference_log_prob - log_prob
    return delta.exp() - delta - 1.0


def grpo_loss(logits: Tensor, inputs: LossInputs, settings: LossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss, and its terms and diagnostics as detached scalars.

    Args:
        logits: (B, 40) masked logits of the policy being trained.
    """
    policy = KnobDistribution(logits)
    log_prob_B = policy.log_prob(inputs.actions)
    ratio_B = (log_prob_B - inputs.old_log_prob).exp()
    cut_B = ratio_B.clamp(max=settings.ratio_max)
    surrogate_B = clipped_surrogate(cut_B, inputs.advantages, settings.clip_low, settings.clip_high)
    entropy_B = policy.entropy()
    bonus_B = entropy_B if inputs.entropy_shares is None else entropy_B * inputs.entropy_shares
    loss_B = -surrogate_B - settings.entropy_coeff * bonus_B
    metrics = {}
    if inputs.reference_logits is not None:
        reference_B = KnobDistribution(inputs.reference_logits).log_prob(inputs.actions)
        kl_B = kl_estimate(log_prob_B, reference_B)
        loss_B = loss_B + settings.kl_coeff * kl_B
        metrics["kl_reference"] = _mean(kl_B, inputs.weights)
    loss = _mean(loss_B, inputs.weights)
    metrics["loss"] = loss
    metrics["loss_policy"] = _mean(-surrogate_B, inputs.weights)
    metrics |= _diagnostics(policy, ratio_B, inputs, settings)
    return loss, {name: value.detach() for name, value in metrics.items()}


def _mean(values_B: Tensor, weights_B: Tensor) -> Tensor:
    return (values_B * weights_B).mean()


def _diagnostics(
    policy: KnobDistribution, ratio_B: Tensor, inputs: LossInputs, settings: LossSettings
) -> dict[str, Tensor]:
    """KL from the acting policy, clipped shares, and the entropy of each head over the rows that decide it."""
    with torch.no_grad():
        old = KnobDistribution(inputs.old_logits)
        real_B = inputs.weights > 0
        low_B = (ratio_B < 1.0 - settings.clip_low) & (inputs.advantages < 0)
        high_B = (ratio_B > 1.0 + settings.clip_high) & (inputs.advantages > 0)
        metrics = {
            "kl_old": _mean(old.kl(policy), inputs.weights),
            "clip_low_share": _mean(low_B.float(), inputs.weights),
            "clip_high_share": _mean(high_B.float(), inputs.weights),
        }
        if math.isfinite(settings.ratio_max):
            cut_B = (ratio_B > settings.ratio_max) & (inputs.advantages < 0)
            metrics["ratio_cut_share"] = _mean(cut_B.float(), inputs.weights)
        entropies_BH = policy.head_entropies()
        for column, (name, log_p) in enumerate(zip(HEADS, policy.log_probs, strict=True)):
            deciding_B = ((log_p > -1.0e6).sum(-1) > 1) & real_B
            count = deciding_B.sum().clamp(min=1)
            metrics[f"entropy_{name}"] = (entropies_BH[:, column] * deciding_B).sum() / count
    return metrics
