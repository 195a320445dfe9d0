"""All decisions of a request in one call: what the environment would show and give, without running anything."""

import numpy as np
import pytest
from doubles import EngineDouble, make_resources

from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from envs.errors import UserError
from envs.knobs import HEAD_SIZES, STAGE1_PAIRS
from envs.latency import MeasuredClock
from envs.latency.guardrail import AnswerLengths, Guardrail
from envs.latency.noise import LatencyNoise

GUARDRAIL = Guardrail(0.9, AnswerLengths(((0.0,) * 32,), ((2,),), 0.5), 1.1)


@pytest.mark.parametrize("changes", [{}, {"guardrail": GUARDRAIL}, {"noise": LatencyNoise((0.9, 1.0, 1.3), 0)}])
def test_observations_and_returns_are_those_of_episodes(changes):
    resources = make_resources(12, **changes)
    env = AdaptiveVQAVectorEnv({"resources": resources, "num_envs": 12, "group_size": 2, "seed": 3})
    rng = np.random.default_rng(0)
    for iteration in range(4):
        env.set_multipliers(np.linspace(0.5, 2.0, resources.budgets.bins))
        first, _ = env.reset()
        runs = resources.engine.rows["outcomes"]
        tree, returns, executions = env.plan_tree()
        assert resources.engine.rows["outcomes"] == runs
        assert returns.shape == (6, STAGE1_PAIRS, 25)
        legal = first["action_mask"][::2, :STAGE1_PAIRS] > 0
        assert (tree["action_mask"].any(-1) == legal).all()
        pairs = np.array([rng.choice(np.flatnonzero(mask[:STAGE1_PAIRS])) for mask in first["action_mask"]])
        actions = np.zeros((12, 4), np.int64)
        actions[:, 0], actions[:, 1] = np.divmod(pairs, HEAD_SIZES[1])
        second = env.step(actions)[0]
        for name, values in second.items():
            np.testing.assert_array_equal(tree[name][np.arange(12) // 2, pairs], values)
        choices = np.array([rng.choice(np.flatnonzero(mask[STAGE1_PAIRS:])) for mask in second["action_mask"]])
        actions[:, 2], actions[:, 3] = np.divmod(choices, HEAD_SIZES[3])
        _, rewards, _, _, infos = env.step(actions)
        found = returns[np.arange(12) // 2, pairs, choices]
        samples = [resources.samples[index] for index in infos["sample"]]
        plans = [resources.space.plan(resources.space.decode(row)) for row in actions]
        known = np.array([resources.engine.is_known(s, p) for s, p in zip(samples, plans, strict=True)])
        assert (np.isfinite(found) == known).all()
        np.testing.assert_allclose(found[known], rewards[known])
        assert (executions[np.arange(12) // 2, infos["execution"]] == known).all()
        env.set_iteration(iteration + 1)


def test_only_complete_samples_are_kept():
    resources = make_resources(12)
    env = AdaptiveVQAVectorEnv({"resources": resources, "num_envs": 12})
    env.reset()
    _, _, executions = env.plan_tree()
    assert {context.sample for context in env._contexts} == set(range(12))
    assert set(env._known) == {index for index in range(12) if index % 3}
    assert executions.sum(1).min() < executions.shape[1] == len(resources.space.distinct)


def test_a_measuring_latency_source_is_refused():
    engine = EngineDouble(make_resources().engine.model.config)
    env = AdaptiveVQAVectorEnv({"resources": make_resources(clock=MeasuredClock(engine))})
    env.reset()
    with pytest.raises(UserError, match="advantages=sampled"):
        env.plan_tree()


def test_every_legal_action_has_its_execution():
    space = make_resources().space
    for knobs in space.all:
        same = space.distinct[space.executions[space.encode(knobs)]]
        assert space.plan(same).top_k_per_block == space.plan(knobs).top_k_per_block
        assert same.tier == knobs.tier
    assert (space.executions >= 0).sum() == len(space.all)
