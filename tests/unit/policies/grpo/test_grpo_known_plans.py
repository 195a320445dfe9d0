"""Credits of known plans: the exact gradient where all are known, the same mean as rollouts where some are."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.errors import UserError
from envs.knobs import PAIRS, STAGE1_PAIRS
from policies.distribution import MASKED, KnobDistribution
from policies.grpo.algorithm_config import GRPOConfig
from policies.grpo.config import GRPOSettings
from policies.grpo.decisions import CREDITS, WEIGHTS, executions_used, known_decisions, sampled_decisions
from policies.grpo.env_runner import Rollouts
from policies.grpo.known_plans import PlanTree, tree_credits
from policies.grpo.objective import LossInputs, group_advantages, grpo_loss


def policy(rng, groups, first=STAGE1_PAIRS, second=PAIRS - STAGE1_PAIRS):
    """Random logits of both stages, (N, 40) and (N, 15, 40), with so many legal pairs each."""
    legal = np.isin(np.arange(PAIRS), [*range(first), *range(STAGE1_PAIRS, STAGE1_PAIRS + second)])
    draw = [rng.normal(size=(groups, *shape, PAIRS)) for shape in ((), (STAGE1_PAIRS,))]
    return [torch.from_numpy(np.where(legal, logits, MASKED)).float() for logits in draw]


def expected_return(first, second, returns):
    """Sum over groups of the mean return, written out."""
    p_first = KnobDistribution(first).stage_log_probs[0].exp()
    p_second = KnobDistribution(second.reshape(-1, PAIRS)).stage_log_probs[1].exp().reshape(returns.shape)
    return (p_first * (p_second * returns).sum(-1)).sum()


def rollouts_of(rng, first, second, returns, size, known=None):
    """`size` rollouts of every group under the policy."""
    groups = len(first)
    p_first = KnobDistribution(first).stage_log_probs[0].exp().numpy()
    p_second = KnobDistribution(second.reshape(-1, PAIRS)).stage_log_probs[1].exp().numpy().reshape(returns.shape)
    actions, rewards = np.zeros((groups * size, 2, 4), np.int64), np.zeros(groups * size)
    for row in range(groups * size):
        group = row // size
        pair = rng.choice(STAGE1_PAIRS, p=p_first[group] / p_first[group].sum())
        choice = rng.choice(PAIRS - STAGE1_PAIRS, p=p_second[group, pair] / p_second[group, pair].sum())
        actions[row, 0, :2], actions[row, 1, 2:] = divmod(pair, 5), divmod(choice, 5)
        rewards[row] = returns[group, pair, choice]
    logits = np.zeros((groups * size, 2, PAIRS), np.float32)
    logits[:, 0] = np.repeat(first.numpy(), size, 0)
    pairs = actions[:, 0, 0] * 5 + actions[:, 0, 1]
    logits[:, 1] = second.numpy()[np.arange(len(pairs)) // size, pairs]
    tree = None
    if known is not None:
        obs = {"x": np.zeros((groups, STAGE1_PAIRS, 1), np.float32)}
        tree = PlanTree(obs, second.numpy(), np.where(known, returns, np.nan), known.any(1))
    obs = {"x": np.zeros((groups * size, 2, 1), np.float32)}
    infos = {"sample": np.repeat(np.arange(groups), size), "execution": pairs}
    return Rollouts(obs, actions, np.zeros(actions.shape[:2]), logits, rewards, infos, tree=tree)


def gradient(columns, first, second):
    """Of the loss at the policy that acted, with respect to its logits."""
    rows = columns[WEIGHTS].size
    old = torch.from_numpy(columns["action_dist_inputs"])
    logits = old.clone().requires_grad_()
    inputs = LossInputs(old, torch.from_numpy(columns[CREDITS]), torch.from_numpy(columns[WEIGHTS]), torch.zeros(rows))
    loss, _ = grpo_loss(logits, inputs, GRPOSettings(entropy_coef=0.0))
    (slope,) = torch.autograd.grad(loss, logits)
    return slope


@pytest.mark.parametrize("seed", range(3))
def test_where_all_plans_are_known_the_gradient_is_that_of_the_expected_return(seed):
    rng = np.random.default_rng(seed)
    groups = 4
    first, second = policy(rng, groups, 12, 20)
    returns = rng.normal(size=(groups, STAGE1_PAIRS, PAIRS - STAGE1_PAIRS))
    rollouts = rollouts_of(rng, first, second, returns, 2, np.ones(returns.shape, bool))
    columns = known_decisions(rollouts, rollouts.rewards.reshape(groups, 2))
    slope = gradient(columns, first, second)
    leaves = [first.clone().requires_grad_(), second.clone().requires_grad_()]
    wanted = torch.autograd.grad(-expected_return(*leaves, torch.from_numpy(returns)) / (2 * groups), leaves)
    torch.testing.assert_close(slope[:groups], wanted[0].float(), rtol=1e-4, atol=1e-6)
    reached = np.broadcast_to(np.arange(STAGE1_PAIRS) < 12, (groups, STAGE1_PAIRS))
    torch.testing.assert_close(slope[groups:], wanted[1][reached].float(), rtol=1e-4, atol=1e-6)
    assert columns[WEIGHTS].mean() == pytest.approx(1.0)


def centred(credits, first, second):
    """Gradients with respect to both stages' logits, in which baselines cancel."""
    at_second = credits.weights[..., None] * credits.second
    return (
        credits.first - first * credits.first.sum(-1, keepdims=True),
        at_second - second * at_second.sum(-1, keepdims=True),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from([1, 2]))
def test_with_some_plans_known_the_mean_over_rollouts_is_the_exact_gradient(seed, count, size):
    """Enumerated: 2 x 3 plans, of which `count` are known; without any, a group's mean takes 1 / size off, as GRPO."""
    rng = np.random.default_rng(seed)
    first, second = np.zeros((1, STAGE1_PAIRS)), np.zeros((1, STAGE1_PAIRS, 25))
    first[0, :2] = rng.dirichlet(np.ones(2))
    second[0, :2, :3] = rng.dirichlet(np.ones(3), 2)
    returns = rng.normal(size=(1, STAGE1_PAIRS, 25))
    plans = [(a, b) for a in range(2) for b in range(3)]
    known = np.full_like(returns, np.nan)
    for place in rng.permutation(len(plans))[:count]:
        known[0][plans[place]] = returns[0][plans[place]]
    chance = {plan: first[0, plan[0]] * second[0][plan] for plan in plans}
    sums = [np.zeros((1, STAGE1_PAIRS)), np.zeros((1, STAGE1_PAIRS, 25))]
    for group in product(plans, repeat=size):
        sampled = np.array([[returns[0][plan] for plan in group]])
        found = centred(tree_credits(first, second, known, np.array([group]), sampled), first, second)
        for total, part in zip(sums, found, strict=True):
            total += np.prod([chance[plan] for plan in group]) * part
    exact = centred(tree_credits(first, second, returns, np.array([[(0, 0)]]), returns[:, 0, :1]), first, second)
    scale = 1.0 if count else (size - 1) / size
    for total, wanted in zip(sums, exact, strict=True):
        np.testing.assert_allclose(total, scale * wanted, atol=1e-12)


def test_many_rollouts_agree_with_the_known_plans():
    """The mean gradient of `sampled` groups approaches (G - 1) / G of the exact one."""
    rng = np.random.default_rng(0)
    first, second = policy(rng, 1, 3, 4)
    returns = rng.normal(size=(1, STAGE1_PAIRS, PAIRS - STAGE1_PAIRS))
    groups, size = 4000, 4
    many = rollouts_of(
        rng, first.expand(groups, -1), second.expand(groups, -1, -1), np.repeat(returns, groups, 0), size
    )
    advantages = group_advantages(many.rewards.reshape(groups, size), normalize_by_std=False).values.reshape(-1)
    slope = gradient(sampled_decisions(many, advantages), first, second)[::2].sum(0)
    one = rollouts_of(rng, first, second, returns, 2, np.ones(returns.shape, bool))
    exact = gradient(known_decisions(one, one.rewards.reshape(1, 2)), first, second)[0]
    torch.testing.assert_close(slope[:3], exact[:3] * (size - 1) / size, rtol=0.1, atol=0.01)


def test_distinct_executions_count_once():
    rng = np.random.default_rng(0)
    first, second = policy(rng, 2)
    returns = rng.normal(size=(2, STAGE1_PAIRS, PAIRS - STAGE1_PAIRS))
    plain = rollouts_of(rng, first, second, returns, 8)
    pairs = set(zip(plain.infos["sample"].tolist(), plain.infos["execution"].tolist(), strict=True))
    assert len(executions_used(plain, 8)) == len(pairs)
    known = np.zeros(returns.shape, bool)
    known[1, 0, :7] = True
    found = executions_used(rollouts_of(rng, first, second, returns, 8, known), 8)
    assert set(found.tolist()) >= {1 << 16 | place for place in range(7)}


def test_known_plans_do_not_go_with_what_needs_a_group():
    for name in ("normalize_by_std", "skip_uniform_groups"):
        with pytest.raises(UserError, match="advantages = 'known'"):
            GRPOConfig().environment("x").training(advantages="known", **{name: True}).validate()
