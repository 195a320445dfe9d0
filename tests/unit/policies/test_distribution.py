"""The masked distribution against enumeration over all actions and against torch's own categoricals."""

import itertools

import numpy as np
import pytest
import torch

from envs.knobs import HEAD_SIZES, KnobSpace
from policies.distribution import LOGITS_WIDTH, KnobDistribution, mask_logits

MASKS = [KnobSpace.stage1_mask(), KnobSpace.stage1_mask(has_image=False), *map(KnobSpace.stage2_mask, range(1, 6))]


def masked(rows: int = 1, seed: int = 0, mask: np.ndarray = MASKS[0]) -> KnobDistribution:
    logits = torch.randn(rows, LOGITS_WIDTH, generator=torch.Generator().manual_seed(seed))
    return KnobDistribution(mask_logits(logits, torch.as_tensor(mask).float().expand(rows, -1)))


def everything() -> torch.Tensor:
    return torch.tensor(list(itertools.product(*map(range, HEAD_SIZES))))


@pytest.mark.parametrize("mask", MASKS)
def test_probabilities_of_all_actions_sum_to_one_and_illegal_ones_are_zero(mask: np.ndarray) -> None:
    actions = everything()
    probabilities = masked(mask=mask, rows=len(actions)).log_prob(actions)[:, None].exp()
    # Every row has other logits, so take one row's distribution over all actions.
    one = KnobDistribution(masked(mask=mask).logits.expand(len(actions), -1)).log_prob(actions).exp()
    assert probabilities.min() >= 0
    assert one.sum() == pytest.approx(1.0, abs=1e-5)
    starts = np.cumsum((0, *HEAD_SIZES[:-1]))
    legal = torch.as_tensor(mask[actions.numpy() + starts].all(1))
    assert one[~legal].max() == 0.0
    assert one[legal].min() > 0.0


@pytest.mark.parametrize("mask", MASKS)
def test_entropy_and_divergence_equal_their_sums_over_all_actions(mask: np.ndarray) -> None:
    actions = everything()
    p = KnobDistribution(masked(seed=1, mask=mask).logits.expand(len(actions), -1))
    q = KnobDistribution(masked(seed=2, mask=mask).logits.expand(len(actions), -1))
    log_p, log_q = p.log_prob(actions), q.log_prob(actions)
    legal = log_p > -1e6
    expected_entropy = -(log_p.exp() * log_p)[legal].sum()
    expected_kl = (log_p.exp() * (log_p - log_q))[legal].sum()
    assert p.entropy()[0] == pytest.approx(expected_entropy.item(), abs=1e-5)
    assert p.kl(q)[0] == pytest.approx(expected_kl.item(), abs=1e-5)
    assert p.kl(p)[0] == 0.0


def test_heads_with_one_legal_option_add_nothing() -> None:
    entropies = masked(mask=KnobSpace.stage1_mask()).head_entropies()[0]
    assert entropies[:2].min() > 0.1
    assert entropies[2:].tolist() == [0.0, 0.0]


def test_agrees_with_torch_categoricals() -> None:
    policy = masked(rows=6, mask=KnobSpace.stage2_mask(3))
    actions = policy.sample(torch.Generator().manual_seed(3))
    parts = [torch.distributions.Categorical(logits=logits) for logits in policy.logits.split(HEAD_SIZES, -1)]
    expected = sum(part.log_prob(action) for part, action in zip(parts, actions.unbind(-1), strict=True))
    torch.testing.assert_close(policy.log_prob(actions), expected)
    torch.testing.assert_close(policy.entropy(), sum(part.entropy() for part in parts))


@pytest.mark.parametrize("mask", MASKS)
def test_samples_and_argmax_are_legal(mask: np.ndarray) -> None:
    policy = masked(rows=400, mask=mask)
    starts = np.cumsum((0, *HEAD_SIZES[:-1]))
    for actions in (policy.sample(torch.Generator().manual_seed(0)), policy.argmax()):
        assert mask[actions.numpy() + starts].all()


def test_samples_follow_the_probabilities() -> None:
    policy = KnobDistribution(masked(seed=5).logits.expand(20_000, -1))
    drawn = policy.sample(torch.Generator().manual_seed(0))[:, 0]
    frequencies = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(frequencies, policy.log_probs[0][0].exp(), atol=0.02, rtol=0)


def test_gradients_stay_finite_behind_masks() -> None:
    logits = torch.randn(4, LOGITS_WIDTH, requires_grad=True)
    mask = torch.as_tensor(KnobSpace.stage2_mask(5)).float().expand(4, -1)
    policy = KnobDistribution(mask_logits(logits, mask))
    other = KnobDistribution(mask_logits(torch.randn(4, LOGITS_WIDTH), mask))
    total = policy.entropy() + policy.kl(other) + policy.log_prob(policy.argmax())
    (gradient,) = torch.autograd.grad(total.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert gradient[:, mask[0] == 0].abs().max() == 0
    assert gradient.abs().max() > 0


def test_an_observation_with_nothing_legal_stays_finite() -> None:
    policy = KnobDistribution(mask_logits(torch.randn(2, LOGITS_WIDTH), torch.zeros(2, LOGITS_WIDTH)))
    assert torch.isfinite(policy.entropy()).all()
    assert torch.isfinite(policy.log_prob(policy.argmax())).all()
