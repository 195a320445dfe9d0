"""The joint distribution under any mask, against enumeration over all actions and torch's own categoricals."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from envs.knobs import HEAD_SIZES, PAIRS, STAGE1_PAIRS, KnobSpace
from policies.controller import Controller
from policies.distribution import LOGITS_WIDTH, KnobDistribution, mask_logits, pair_logits

STRUCTURAL = [KnobSpace.stage1_mask(), KnobSpace.stage1_mask(has_image=False), *map(KnobSpace.stage2_mask, range(1, 6))]
ACTIONS = torch.tensor(list(itertools.product(*map(range, HEAD_SIZES))))
FIRST = (ACTIONS[:, 0] * HEAD_SIZES[1] + ACTIONS[:, 1]).numpy()
SECOND = (ACTIONS[:, 2] * HEAD_SIZES[3] + ACTIONS[:, 3]).numpy() + STAGE1_PAIRS


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Any mask with one legal pair a stage at least, jointly restricted as a guardrail does it."""
    mask = draw(arrays(np.bool_, PAIRS))
    mask[draw(st.integers(0, STAGE1_PAIRS - 1))] = True
    mask[draw(st.integers(STAGE1_PAIRS, PAIRS - 1))] = True
    return mask


logits_of = st.integers(0, 2**16).map(
    lambda seed: torch.randn(1, LOGITS_WIDTH, generator=torch.Generator().manual_seed(seed)) * 3
)


def policy_of(logits: torch.Tensor, mask: np.ndarray, rows: int = 1) -> KnobDistribution:
    masked = mask_logits(logits, torch.as_tensor(mask).float().expand(len(logits), -1))
    return KnobDistribution(masked.expand(rows, -1))


def brute_force(logits: torch.Tensor, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Legality and probability (375,) of every action, by a softmax over all pairs of pairs."""
    legal = mask[FIRST] & mask[SECOND]
    row = logits[0].double().numpy()
    scores = np.where(legal, row[FIRST] + row[SECOND], -np.inf)
    weights = np.exp(scores - scores.max())
    return legal, weights / weights.sum()


@settings(max_examples=60, deadline=None)
@given(logits_of, masks())
def test_every_action_has_its_share_of_a_softmax_over_legal_ones(logits: torch.Tensor, mask: np.ndarray) -> None:
    legal, expected = brute_force(logits, mask)
    found = policy_of(logits, mask, len(ACTIONS)).log_prob(ACTIONS).exp().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.sum() == pytest.approx(1.0, abs=1e-5)
    assert found[~legal].sum() == 0.0


@settings(max_examples=60, deadline=None)
@given(logits_of, logits_of, masks())
def test_entropy_and_divergence_are_exact(first: torch.Tensor, second: torch.Tensor, mask: np.ndarray) -> None:
    legal, p = brute_force(first, mask)
    _, q = brute_force(second, mask)
    entropy = -(p[legal] * np.log(p[legal])).sum()
    divergence = (p[legal] * np.log(p[legal] / q[legal])).sum()
    one, other = policy_of(first, mask), policy_of(second, mask)
    assert one.entropy().item() == pytest.approx(entropy, abs=1e-4)
    assert one.kl(other).item() == pytest.approx(divergence, abs=1e-3)
    assert one.kl(one).item() == 0.0


@settings(max_examples=60, deadline=None)
@given(logits_of, masks())
def test_marginals_are_sums_over_the_other_choice(logits: torch.Tensor, mask: np.ndarray) -> None:
    _, p = brute_force(logits, mask)
    policy = policy_of(logits, mask)
    for head, log_p in enumerate(policy.log_probs):
        marginal = np.bincount(ACTIONS[:, head].numpy(), p, minlength=HEAD_SIZES[head])
        np.testing.assert_allclose(log_p.exp()[0].numpy(), marginal, atol=1e-6)
        entropy = -sum(value * np.log(value) for value in marginal if value > 0)
        assert policy.head_entropies()[0, head].item() == pytest.approx(entropy, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(logits_of, masks(), st.integers(0, 99))
def test_samples_and_argmax_are_legal(logits: torch.Tensor, mask: np.ndarray, seed: int) -> None:
    legal, p = brute_force(logits, mask)
    policy = policy_of(logits, mask, 100)
    index = {tuple(action): place for place, action in enumerate(ACTIONS.tolist())}
    for action in policy.sample(torch.Generator().manual_seed(seed)).tolist():
        assert legal[index[tuple(action)]]
    best = index[tuple(policy.argmax()[0].tolist())]
    assert p[best] == pytest.approx(p.max(), rel=1e-5)


def test_samples_follow_the_probabilities() -> None:
    logits = torch.randn(1, LOGITS_WIDTH, generator=torch.Generator().manual_seed(5))
    mask = np.random.default_rng(0).random(PAIRS) < 0.6
    drawn = policy_of(logits, mask, 20_000).sample(torch.Generator().manual_seed(0))
    pairs = drawn[:, 2] * HEAD_SIZES[3] + drawn[:, 3]
    frequencies = torch.bincount(pairs, minlength=25) / len(drawn)
    expected = policy_of(logits, mask).stage_log_probs[1][0].exp()
    torch.testing.assert_close(frequencies, expected, atol=0.02, rtol=0)


def test_without_a_joint_mask_the_heads_are_independent() -> None:
    """Pair logits are sums, so a mask that is a product of heads leaves a product of categoricals."""
    first, second = torch.randn(6, 3), torch.randn(6, 5)
    pairs = pair_logits(first, second).log_softmax(-1).unflatten(-1, (3, 5))
    torch.testing.assert_close(pairs, first.log_softmax(-1)[:, :, None] + second.log_softmax(-1)[:, None, :])


@pytest.mark.parametrize("mask", STRUCTURAL)
def test_a_stage_with_one_legal_pair_adds_nothing(mask: np.ndarray) -> None:
    policy = policy_of(torch.randn(1, LOGITS_WIDTH), mask)
    first, second = mask[:STAGE1_PAIRS].sum() == 1, mask[STAGE1_PAIRS:].sum() == 1
    entropies = policy.head_entropies()[0]
    assert first or second
    if first:
        assert entropies[:2].tolist() == [0.0, 0.0]
    if second:
        assert entropies[2:].tolist() == [0.0, 0.0]


def test_gradients_stay_finite_behind_masks() -> None:
    logits = torch.randn(4, LOGITS_WIDTH, requires_grad=True)
    mask = torch.as_tensor(KnobSpace.stage2_mask(5)).float().expand(4, -1)
    policy = KnobDistribution(mask_logits(logits, mask))
    other = KnobDistribution(mask_logits(torch.randn(4, LOGITS_WIDTH), mask))
    total = policy.entropy() + policy.kl(other) + policy.log_prob(policy.argmax()) + policy.head_entropies().sum(-1)
    (gradient,) = torch.autograd.grad(total.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert gradient[:, mask[0] == 0].abs().max() == 0
    assert gradient.abs().max() > 0


def test_an_observation_with_nothing_legal_stays_finite() -> None:
    policy = KnobDistribution(mask_logits(torch.randn(2, LOGITS_WIDTH), torch.zeros(2, LOGITS_WIDTH)))
    assert torch.isfinite(policy.entropy()).all()
    assert torch.isfinite(policy.log_prob(policy.argmax())).all()


@settings(max_examples=30, deadline=None)
@given(masks(), st.integers(1, 5))
def test_the_controllers_logits_are_sums_of_its_heads(mask: np.ndarray, position: int) -> None:
    torch.manual_seed(0)
    controller = Controller(6, hidden=8)
    mask = mask.copy()
    mask[STAGE1_PAIRS:] &= KnobSpace.stage2_mask(position)[STAGE1_PAIRS:]
    if not mask[STAGE1_PAIRS:].any():
        mask[STAGE1_PAIRS:] = KnobSpace.stage2_mask(position)[STAGE1_PAIRS:]
    obs = {
        "budget": torch.zeros(1, 1),
        "language_feature": torch.randn(1, 6),
        "latency_token": torch.randn(1, 6),
        "insertion": torch.full((1, 1), float(position)),
        "action_mask": torch.as_tensor(mask).float()[None],
    }
    logits = controller(obs)[0]
    assert (logits[torch.as_tensor(~mask)] < -1e8).all()
    assert (logits[torch.as_tensor(mask)].abs() < 1e3).all()
    action = controller.act(obs)[0]
    assert mask[action[0] * 5 + action[1]]
    assert mask[STAGE1_PAIRS + action[2] * 5 + action[3]]
