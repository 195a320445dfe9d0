"""Advantages, loss, penalty multipliers, minibatches, averages: pure arithmetic, checked by hand or enumeration."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from envs.config import RewardSettings
from envs.errors import UserError
from envs.knobs import STAGE1_PAIRS, KnobSpace
from policies.distribution import LOGITS_WIDTH, KnobDistribution, mask_logits
from policies.grpo.algorithm_config import GRPOConfig
from policies.grpo.config import GRPOSettings
from policies.grpo.ema import WeightAverage
from policies.grpo.lagrangian import FLOOR, PenaltyMultipliers, greedy_violation_sums
from policies.grpo.objective import (
    LossInputs,
    clipped_surrogate,
    group_advantages,
    grpo_loss,
    minibatches,
)

RETURNS = arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(2, 8)), elements=st.floats(-5, 5))


@given(RETURNS)
def test_advantages_are_relative_to_the_group(returns: np.ndarray) -> None:
    plain = group_advantages(returns, normalize_by_std=False)
    divided = group_advantages(returns, normalize_by_std=True)
    shifted = group_advantages(returns + 3.0, normalize_by_std=True)
    deviation = returns.std(axis=1)
    assert np.abs(plain.values.sum(axis=1)).max() < 1e-9
    assert (plain.values[plain.uniform] == 0).all()
    assert (divided.values[divided.uniform] == 0).all()
    wide = deviation > 1e-3
    np.testing.assert_allclose(plain.values[wide], (returns - returns.mean(1, keepdims=True))[wide])
    np.testing.assert_allclose(divided.values[wide].std(axis=1), 1.0, rtol=2e-3)
    np.testing.assert_allclose(shifted.values[wide], divided.values[wide], rtol=1e-5, atol=1e-6)


def test_advantages_by_hand() -> None:
    result = group_advantages([[1.0, 3.0], [2.0, 2.0]], normalize_by_std=True)
    np.testing.assert_allclose(result.values, [[-1.0, 1.0], [0.0, 0.0]], rtol=2e-6)
    assert result.uniform.tolist() == [False, True]
    assert result.uniform_share == 0.5


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.25, 2.0, 2.5, 2.0),  # below the upper bound 1.3
        (1.5, 2.0, 2.6, 0.0),  # above it: no gradient
        (0.5, 2.0, 1.0, 2.0),  # a good action grown rare is pulled back in full
        (0.85, -2.0, -1.7, -2.0),  # above the lower bound 0.8
        (0.5, -2.0, -1.6, 0.0),  # below it: no gradient
        (1.5, -2.0, -3.0, -2.0),  # a bad action grown common is pushed down in full
    ],
)
def test_clipping_has_separate_bounds(ratio: float, advantage: float, value: float, slope: float) -> None:
    r = torch.tensor([ratio], requires_grad=True)
    surrogate = clipped_surrogate(r, torch.tensor([advantage]), clip_low=0.2, clip_high=0.3)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(value)
    assert r.grad is not None
    assert r.grad.item() == pytest.approx(slope)


def distributions() -> tuple[KnobDistribution, KnobDistribution, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.as_tensor(KnobSpace.stage1_mask()).float()[None]
    p, q = (mask_logits(torch.randn(1, LOGITS_WIDTH, generator=generator), mask) for _ in range(2))
    actions = torch.tensor([[tier, position, 0, 0] for tier in range(3) for position in range(5)])
    return KnobDistribution(p.expand(15, -1)), KnobDistribution(q.expand(15, -1)), actions


@pytest.mark.parametrize(("advantage", "value", "slope"), [(-1.0, 3.0, 0.0), (1.0, -1.28, 0.0)])
def test_a_ratio_beyond_its_maximum_is_cut_off(advantage: float, value: float, slope: float) -> None:
    """An action five times as likely as when it was taken; uncut, a bad one would weigh five times as much."""
    logits = torch.zeros(1, LOGITS_WIDTH)
    logits.requires_grad_()
    old = torch.zeros(1, LOGITS_WIDTH)
    old[0, 0] = math.log(14 / 74)  # 1 / 75 of 15 pairs
    inputs = LossInputs(
        old_logits=old,
        credits=advantage * torch.eye(1, LOGITS_WIDTH),
        weights=torch.ones(1),
        entropy_shares=torch.zeros(1),
    )
    lagging = GRPOSettings(clip_low=0.2, clip_high=0.28, dual_clip=3.0, max_policy_lag=1)
    loss, metrics = grpo_loss(logits, inputs, lagging)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max().item() == slope
    assert metrics["dual_clip_share"].item() == (advantage < 0)
    assert "dual_clip_share" not in grpo_loss(logits, inputs, GRPOSettings())[1]


def test_the_kl_term_and_its_gradient_are_those_of_policy_against_reference() -> None:
    p, q, actions = distributions()
    logits = p.logits.clone().requires_grad_()
    batch = LossInputs(
        old_logits=p.logits,
        credits=torch.zeros(15, LOGITS_WIDTH),
        weights=torch.ones(15),
        entropy_shares=torch.zeros(15),
        reference_logits=q.logits,
    )
    loss, metrics = grpo_loss(logits, batch, GRPOSettings(kl_coef=1.0))
    (gradient,) = torch.autograd.grad(loss, logits)
    # By hand: sum over the 15 joint actions of p log(p / q).
    again = p.logits[:1].clone().requires_grad_()
    joint = KnobDistribution(again.expand(15, -1)).log_prob(actions)
    expected = (joint.exp() * (joint - q.log_prob(actions))).sum()
    (wanted,) = torch.autograd.grad(expected, again)
    assert metrics["kl_reference"].item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient.sum(0, keepdim=True), wanted, rtol=1e-4, atol=1e-5)


def inputs(rows: int = 8, **changes: torch.Tensor) -> LossInputs:
    generator = torch.Generator().manual_seed(1)
    mask = torch.as_tensor(KnobSpace.stage2_mask(1)).float().expand(rows, -1)
    logits = mask_logits(torch.randn(rows, LOGITS_WIDTH, generator=generator), mask)
    pairs = STAGE1_PAIRS + KnobDistribution(logits).sample(generator)[:, 2:] @ torch.tensor([[5], [1]])
    advantages = torch.randn(rows, 1, generator=generator)
    values = {
        "old_logits": logits,
        "credits": torch.zeros(rows, LOGITS_WIDTH).scatter(1, pairs, advantages),
        "weights": torch.ones(rows),
        "entropy_shares": torch.ones(rows),
    }
    return LossInputs(**(values | changes))


def test_first_step_is_the_policy_gradient() -> None:
    batch = inputs()
    logits = batch.old_logits.clone().requires_grad_()
    loss, metrics = grpo_loss(logits, batch, GRPOSettings(entropy_coef=0.0))
    (gradient,) = torch.autograd.grad(loss, logits)
    again = batch.old_logits.clone().requires_grad_()
    log_probs = torch.cat(KnobDistribution(again).stage_log_probs, -1)
    objective = (log_probs * batch.credits).sum(-1).mean()
    (expected,) = torch.autograd.grad(-objective, again)
    torch.testing.assert_close(gradient, expected)
    assert metrics["loss"].item() == pytest.approx(-batch.credits.sum(-1).mean().item(), abs=1e-6)
    assert metrics["kl_old"].item() == 0
    assert metrics["clip_low_share"].item() == metrics["clip_high_share"].item() == 0


def test_loss_is_the_sum_of_its_terms() -> None:
    reference = inputs().old_logits + torch.linspace(0, 1, LOGITS_WIDTH)
    batch = inputs(reference_logits=reference)
    shares = GRPOSettings(clip_low=0.2, clip_high=0.3, kl_coef=0.7, entropy_coef=0.1)
    loss, metrics = grpo_loss(batch.old_logits, batch, shares)
    entropy = KnobDistribution(batch.old_logits).entropy().mean()
    expected = metrics["loss_policy"] + 0.7 * metrics["kl_reference"] - 0.1 * entropy
    torch.testing.assert_close(loss, expected)
    assert metrics["kl_reference"] > 0


def test_each_decision_gets_its_share_of_the_entropy_bonus() -> None:
    settings = GRPOSettings(entropy_coef=0.1)
    full, none, half = (
        grpo_loss(inputs().old_logits, inputs(entropy_shares=shares), settings)[0]
        for shares in (
            torch.ones(len(inputs().weights)),
            torch.zeros(len(inputs().weights)),
            torch.full_like(inputs().weights, 0.5),
        )
    )
    assert full < half < none
    torch.testing.assert_close(half, (full + none) / 2)


def test_the_entropy_bonus_is_annealed_over_the_run_if_its_length_is_known() -> None:
    config = GRPOConfig()
    assert config.entropy_share(10**6) == 1.0
    config.training(total_iterations=40)
    assert [config.entropy_share(number) for number in (0, 10, 40, 50)] == [1.0, 0.75, 0.0, 0.0]


def test_padding_changes_nothing() -> None:
    batch = inputs(8)
    keep = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    padded = LossInputs(
        *(getattr(batch, name)[keep] for name in ("old_logits", "credits")),
        weights=torch.tensor([8 / 6] * 6 + [0.0] * 2),
        entropy_shares=torch.ones(8),
    )
    plain = LossInputs(
        *(getattr(batch, name)[:6] for name in ("old_logits", "credits")),
        weights=torch.ones(6),
        entropy_shares=torch.ones(6),
    )
    shift = torch.linspace(0, 0.5, LOGITS_WIDTH)
    loss_a, metrics_a = grpo_loss(padded.old_logits + shift, padded, GRPOSettings())
    loss_b, metrics_b = grpo_loss(plain.old_logits + shift, plain, GRPOSettings())
    torch.testing.assert_close(loss_a, loss_b)
    for name, value in metrics_b.items():
        torch.testing.assert_close(metrics_a[name], value)


def test_entropies_count_only_rows_that_decide() -> None:
    first = mask_logits(torch.zeros(1, LOGITS_WIDTH), torch.as_tensor(KnobSpace.stage1_mask()).float()[None])
    second = mask_logits(torch.zeros(1, LOGITS_WIDTH), torch.as_tensor(KnobSpace.stage2_mask(2)).float()[None])
    logits = torch.cat((first, second))
    batch = LossInputs(logits, torch.zeros(2, LOGITS_WIDTH), torch.ones(2), torch.ones(2))
    _, metrics = grpo_loss(logits, batch, GRPOSettings())
    for name, options in {"tier": 3, "insertion": 5, "top_k": 5, "blocks": 4}.items():
        assert metrics[f"entropy_{name}"].item() == pytest.approx(np.log(options), abs=1e-5)


def multipliers(bins: int = 2, **changes: float) -> PenaltyMultipliers:
    return PenaltyMultipliers.start(RewardSettings(mode="lagrangian", **changes), bins)


def sums(rates: list[float], count: float = 100.0) -> np.ndarray:
    """Sums of `count` greedy rollouts of probability 1 in each bin."""
    return count * np.array([np.ones(len(rates)), np.ones(len(rates)), rates])


def test_rates_are_those_of_the_argmax_policy_whatever_the_entropy() -> None:
    """Contexts whose argmax violates are sampled greedily less often; weighting makes up for that."""
    rng = np.random.default_rng(0)
    count = 200_000
    bins, late_if_greedy = rng.integers(0, 2, count), rng.random(count) < 0.3
    chance = np.where(late_if_greedy, 0.05, 0.6)  # of taking the argmax
    greedy = rng.random(count) < chance
    late = np.where(greedy, late_if_greedy, rng.random(count) < 0.9)  # exploring exceeds nearly always
    found = greedy_violation_sums(bins, late, greedy, np.log(chance), np.ones(count, bool), 3)
    seen = multipliers(3).updated(found)
    np.testing.assert_allclose(seen.rates[:2], 0.3, atol=0.01)
    assert np.isnan(seen.rates[2])
    assert seen.effective[2] == 0
    assert seen.effective[0] > 1000


def test_what_no_plan_can_meet_is_left_out_of_the_rates() -> None:
    avoidable = [True, True, False, False]
    found = greedy_violation_sums([0] * 4, [1, 0, 1, 1], [True] * 4, np.zeros(4), avoidable, 1)
    assert found[:, 0].tolist() == [2.0, 2.0, 1.0]


def test_multipliers_move_until_each_bin_meets_its_target() -> None:
    rng = np.random.default_rng(0)
    moving = multipliers(3, max_violation_rate=0.1, penalty_lr=0.03)
    needed = np.array([2.0, 1.0, 0.2])  # multiplier at which half of a bin's violations stop
    for _ in range(400):
        chance = 1 / (1 + np.exp(4 * (moving.values - needed)))
        moving = moving.updated(sums(rng.binomial(100, chance) / 100))
    np.testing.assert_allclose(moving.rates, 0.1, atol=0.05)
    np.testing.assert_allclose(moving.values, needed + np.log(9) / 4, atol=0.15)


def test_multipliers_stay_within_bounds_and_move_smoothly() -> None:
    moving = multipliers(penalty_lr=0.2, penalty_max=1.0)
    for _ in range(50):
        before = moving
        moving = moving.updated(sums([1.0, 0.0]))
        assert np.abs(np.log(moving.values / before.values)).max() <= 0.2 + 1e-9
    assert moving.values.tolist() == [1.0, FLOOR]
    assert multipliers(penalty_init=9.0, penalty_max=4.0).values.tolist() == [4.0, 4.0]


def test_evidence_is_pooled_until_it_suffices() -> None:
    """One greedy rollout an iteration moves nothing at first, but in the long run; without any, nothing moves."""
    moving, starts = multipliers(penalty_smoothing=0.9), []
    for _ in range(8):
        starts.append(moving.values[1])
        moving = moving.updated(np.array([[0.0, 300.0], [0.0, 300.0**2], [0.0, 300.0]]))
    assert starts[:4] == [0.5] * 4
    assert moving.values[1] > 0.5
    assert moving.values[0] == 0.5
    assert np.isnan(moving.rates[0])
    still = moving.updated(np.zeros((3, 2)))
    assert still.values.tolist() == moving.values.tolist()
    np.testing.assert_allclose(still.rates, moving.rates)


def test_multipliers_survive_a_checkpoint_and_refuse_other_bins() -> None:
    moved = multipliers().updated(sums([1.0, 0.0]))
    again = multipliers().restored(moved.state())
    np.testing.assert_array_equal(again.values, moved.values)
    np.testing.assert_array_equal(again.sums, moved.sums)
    with pytest.raises(UserError, match="penalty bins"):
        multipliers(3).restored(moved.state())


@settings(deadline=None)
@given(rows=st.integers(1, 300), size=st.integers(1, 120), learners=st.integers(1, 3), seed=st.integers(0, 9))
def test_minibatches_cover_every_row_once_whatever_the_learners(rows: int, size: int, learners: int, seed: int) -> None:
    order, weights, actual = minibatches(rows, size, learners, np.random.default_rng(seed))
    assert sorted(order[weights > 0].tolist()) == list(range(rows))
    assert weights.mean() == pytest.approx(1.0, rel=1e-5)
    assert len(order) % actual == 0
    assert actual % learners == 0
    assert actual <= 2 * size + learners


def test_learners_together_see_the_minibatches_of_one() -> None:
    one, _, size = minibatches(96, 24, 1, np.random.default_rng(4))
    two, _, size_two = minibatches(96, 24, 2, np.random.default_rng(4))
    assert size == size_two == 24
    shares = two.reshape(2, 4, 12)
    for index, minibatch in enumerate(one.reshape(4, 24)):
        assert set(shares[:, index].reshape(-1).tolist()) == set(minibatch.tolist())


@given(
    arrays(np.float32, st.tuples(st.integers(1, 30), st.just(3)), elements=st.floats(-5, 5, width=32)),
    st.floats(0, 0.99),
)
def test_the_average_of_weights_counts_few_updates_alike_and_fades_many(updates: np.ndarray, decay: float) -> None:
    average = WeightAverage(decay)
    for index, row in enumerate(updates):
        before = average
        average = before.updated({"w": row})
        if decay == 0:
            assert average.weights is None
            continue
        found, seen = average.weights["w"], updates[: index + 1]
        assert found.dtype == np.float32
        if decay >= index / (index + 1):
            np.testing.assert_allclose(found, seen.mean(axis=0), atol=1e-4)
        else:
            np.testing.assert_allclose(found, decay * before.weights["w"] + (1 - decay) * row, atol=1e-4)
        assert (found >= seen.min(axis=0) - 1e-4).all()
        assert (found <= seen.max(axis=0) + 1e-4).all()
        assert average.updates == index + 1
        assert average.restored(average.state()) == average


def test_an_average_is_not_restored_where_none_is_kept() -> None:
    kept = WeightAverage(0.5).updated({"w": np.ones(2, np.float32)}).state()
    assert WeightAverage(0.0).restored(kept).weights is None
    assert WeightAverage(0.5).restored(kept).updates == 1
