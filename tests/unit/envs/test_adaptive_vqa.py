"""The vector and the single environment."""

import math
import pickle
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from doubles import EngineDouble, make_resources
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.adaptive_vqa import AdaptiveVQAEnv, AdaptiveVQAVectorEnv
from envs.budgets import BudgetDistribution
from envs.errors import UserError
from envs.knobs import HEAD_SIZES, STAGE1_PAIRS, TIERS, Knobs
from envs.latency import MeasuredClock
from envs.latency.guardrail import AnswerLengths, Guardrail
from envs.latency.noise import LatencyNoise
from envs.latency_token import budget_level
from envs.reward import reward

KNOBS = ("tier", "insertion", "top_k", "blocks")


def vector(resources=None, num_envs=12, group_size=4, **settings):
    resources = resources or make_resources()
    return AdaptiveVQAVectorEnv({"resources": resources, "num_envs": num_envs, "group_size": group_size, **settings})


def act(observation, rng):
    """A random legal action for every row."""
    rows = []
    for mask in observation["action_mask"]:
        first, second = (int(rng.choice(np.flatnonzero(part))) for part in np.split(mask, [STAGE1_PAIRS]))
        rows.append([*divmod(first, HEAD_SIZES[1]), *divmod(second, HEAD_SIZES[3])])
    return np.array(rows)


def episode(env, seed=0):
    """Observations, actions and final step of one iteration."""
    rng = np.random.default_rng(seed)
    first, _ = env.reset()
    actions = [act(first, rng)]
    second, rewards, ended, _, infos = env.step(actions[0])
    assert not ended.any()
    assert not rewards.any()
    assert infos == {}
    actions.append(act(second, rng))
    last, rewards, ended, cut, infos = env.step(actions[1])
    assert ended.all()
    assert not cut.any()
    return [first, second, last], actions, rewards, infos


def test_observations_are_what_they_say():
    resources = make_resources()
    env = vector(resources)
    (first, second, _), (stage1, stage2), _, infos = episode(env)
    for observation in (first, second):
        assert env.observation_space.contains(observation)
    samples = [resources.samples[i] for i in infos["sample"]]
    ratios = np.log(infos["budget_ms"] / resources.clock.reference_ms)
    assert np.allclose(first["budget"][:, 0], ratios)
    assert np.allclose(second["budget"][:, 0], ratios)
    assert np.allclose(first["language_feature"], resources.engine.language_features(samples))
    assert not first["latency_token"].any()
    assert not first["insertion"].any()
    assert not second["language_feature"].any()
    assert (first["stage"] == 0).all()
    assert (second["stage"] == 1).all()
    tokens = resources.engine.latency_tokens(
        samples, [TIERS[i] for i in stage1[:, 0]], [budget_level(float(ratio)) for ratio in ratios]
    )
    insertions = stage1[:, 1] + 1
    assert np.allclose(second["latency_token"], tokens[np.arange(12), insertions - 1])
    assert (second["insertion"][:, 0] == insertions).all()
    for row, position in enumerate(insertions):
        assert (second["action_mask"][row] == resources.space.stage2_mask(position)).all()
        assert (first["action_mask"][row] == resources.space.stage1_mask()).all()
    assert stage2.shape == (12, 4)


def test_rewards_and_infos_are_those_of_the_chosen_plans():
    resources = make_resources()
    _, (stage1, stage2), rewards, infos = episode(vector(resources))
    for row in range(12):
        knobs = Knobs(TIERS[stage1[row, 0]], int(stage1[row, 1]) + 1, int(stage2[row, 2]) + 4, int(stage2[row, 3]) + 12)
        chosen = (infos["tier"], infos["insertion"], infos["top_k"], infos["blocks"])
        assert [int(values[row]) for values in chosen] == [
            TIERS.index(knobs.tier),
            knobs.insertion,
            knobs.top_k,
            knobs.blocks,
        ]
        plan, sample = resources.space.plan(knobs), resources.samples[infos["sample"][row]]
        answer = resources.engine.outcome(sample, plan)
        shape = resources.engine.shape(sample, knobs.tier)
        latency = resources.clock.latency(shape, plan, answer.n_tokens).total
        assert infos["latency_ms"][row] == pytest.approx(latency)
        assert infos["accuracy"][row] == resources.engine.accuracy(sample, answer)
        expected = reward(infos["accuracy"][row], latency, infos["budget_ms"][row], resources.reward.penalty, 0.0)
        assert rewards[row] == pytest.approx(float(expected))
        cheapest = resources.space.plan(resources.space.cheapest)
        least = resources.clock.latency(resources.engine.shape(sample, "low"), cheapest, answer.n_tokens).total
        assert infos["avoidable"][row] == (least <= infos["budget_ms"][row])
    assert infos["context"].dtype == infos["sample"].dtype == np.int64
    assert all(infos[f"_{key}"].all() for key in infos if not key.startswith("_"))


def test_groups_share_a_context_and_groups_differ():
    _, _, _, infos = episode(vector())
    for name in ("context", "sample", "budget_ms"):
        groups = infos[name].reshape(3, 4)
        assert (groups == groups[:, :1]).all()
    assert len(set(infos["context"].tolist())) == 3


def test_equal_seeds_give_equal_trajectories():
    def run():
        env = vector(seed=11)
        return [episode(env, seed) for seed in range(3)]

    for (obs_a, act_a, rew_a, info_a), (obs_b, act_b, rew_b, info_b) in zip(run(), run(), strict=True):
        assert all((a[key] == b[key]).all() for a, b in zip(obs_a, obs_b, strict=True) for key in a)
        assert all((a == b).all() for a, b in zip(act_a, act_b, strict=True))
        assert (rew_a == rew_b).all()
        assert all((info_a[key] == info_b[key]).all() for key in info_a)


def test_each_step_makes_one_call_and_siblings_share():
    resources = make_resources()
    env = vector(resources, num_envs=64, group_size=16)
    resources.engine.calls.clear()
    resources.engine.rows.clear()
    env.reset()
    actions = np.zeros((64, 4), np.int64)
    env.step(actions)
    env.step(actions)
    assert dict(resources.engine.calls) == {"features": 1, "tokens": 1, "outcomes": 1}
    assert resources.engine.rows["tokens"] == 4


def test_the_step_after_the_end_resets():
    env = vector()
    _, _, _, infos = episode(env)
    observation, rewards, ended, cut, after = env.step(np.full((12, 4), 99))
    assert (observation["stage"] == 0).all()
    assert not rewards.any()
    assert not ended.any()
    assert not cut.any()
    assert after == {}
    env.step(np.zeros((12, 4), np.int64))
    _, _, _, _, later = env.step(np.zeros((12, 4), np.int64))
    assert set(later["context"]).isdisjoint(infos["context"])
    assert env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP


def contexts_of(env):
    _, _, _, infos = episode(env)
    return list(zip(infos["context"].tolist(), infos["sample"].tolist(), infos["budget_ms"].tolist(), strict=True))


def test_iterations_do_not_depend_on_history():
    walked = vector(seed=5)
    iterations = [contexts_of(walked) for _ in range(4)]
    jumped = vector(seed=5)
    jumped.set_iteration(3)
    assert contexts_of(jumped) == iterations[3]
    jumped.set_iteration(1)
    assert contexts_of(jumped) == iterations[1]
    assert contexts_of(jumped) == iterations[2]
    assert iterations[0] != iterations[1]


def test_repeated_seeds_in_reset_do_not_repeat_contexts():
    env = vector()
    first, _ = env.reset(seed=3)
    second, _ = env.reset(seed=3)
    assert (first["budget"] != second["budget"]).any()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_split_an_iteration_without_overlap(workers):
    one = vector(num_envs=48 // workers, seed=2)
    shares = []
    for worker in range(workers):
        env = vector(num_envs=48 // workers, seed=2)
        env.set_worker(worker, workers)
        env.set_iteration(6)
        shares += contexts_of(env)
    reference = vector(num_envs=48, seed=2)
    reference.set_iteration(6)
    assert shares == contexts_of(reference)
    assert one.num_envs * workers == 48


def test_explicit_contexts_are_served_once_then_padding():
    resources = make_resources()
    wanted = [(i, 10.0 + i) for i in range(10)]
    env = vector(resources, num_envs=8, group_size=4, contexts=wanted)
    assert env.iterations == 2
    seen = contexts_of(env) + contexts_of(env)
    assert [entry for entry in seen if entry[0] >= 0] == [(i, *context) for i, context in enumerate(wanted)]
    assert [entry[0] for entry in seen[10:]] == [-1] * 6


def test_contexts_can_be_replaced_and_withdrawn():
    env = vector(num_envs=4, seed=1)
    training = contexts_of(env)
    env.set_contexts([(3, 25.0), (2, 30.0)])
    env.set_worker(0, 1)
    env.set_iteration(0)
    assert contexts_of(env)[:2] == [(0, 3, 25.0), (1, 2, 30.0)]
    env.set_contexts(None)
    assert env.iterations is None
    assert contexts_of(env) == training


def test_text_only_samples_have_one_tier():
    env = vector(make_resources(text_only=True))
    observation, _ = env.reset()
    assert (observation["action_mask"][:, :STAGE1_PAIRS].reshape(12, 3, 5).any(2) == [1, 0, 0]).all()
    actions = np.zeros((12, 4), np.int64)
    actions[5, 0] = 2
    with pytest.raises(
        UserError, match=r"actions 2, 0 of heads tier and insertion .* environment 5: .* 0, 0 \(low, 1\)"
    ):
        env.step(actions)
    env.step(np.zeros((12, 4), np.int64))


@pytest.mark.parametrize(
    ("stage", "action", "named"),
    [
        (0, [3, 0, 0, 0], r"3, 0 of heads tier and insertion .*0, 0 \(low, 1\).*2, 4 \(high, 5\)"),
        (0, [-1, 0, 0, 0], r"-1, 0 of heads tier"),
        (0, [0, 5, 0, 0], r"0, 5 of heads tier and insertion"),
        (1, [0, 0, 5, 4], r"5, 4 of heads top-k and blocks .*0, 3 \(4, 15\)"),
        (1, [0, 0, 0, 1], r"0, 1 of heads top-k and blocks .*choose one of 0, 3 \(4, 15\); 0, 4 \(4, 16\)"),
        (1, [0, 0, 0, 7], r"0, 7 of heads top-k and blocks"),
    ],
)
def test_illegal_actions_name_heads_values_and_options(stage, action, named):
    env = vector(num_envs=4)
    env.reset()
    if stage == 1:
        env.step(np.tile([0, 3, 0, 0], (4, 1)))
    with pytest.raises(UserError, match=named):
        env.step(np.tile(action, (4, 1)))


def test_an_illegal_action_changes_nothing():
    env = vector(num_envs=4)
    env.reset()
    with pytest.raises(UserError):
        env.step(np.full((4, 4), 9))
    observation, *_ = env.step(np.tile([1, 2, 0, 0], (4, 1)))
    assert (observation["insertion"] == 3).all()


def test_heads_of_the_other_stage_are_ignored():
    env = vector(num_envs=4)
    env.reset()
    env.step(np.tile([2, 4, 99, -1], (4, 1)))
    _, _, _, _, infos = env.step(np.tile([-5, 99, 4, 4], (4, 1)))
    assert (infos["tier"] == 2).all()
    assert (infos["insertion"] == 5).all()
    assert (infos["top_k"] == 8).all()
    assert (infos["blocks"] == 16).all()


@pytest.mark.parametrize("actions", [np.zeros((3, 4), int), np.zeros((4, 3), int), np.zeros((4, 4)), [[None] * 4] * 4])
def test_misshapen_actions_are_refused(actions):
    env = vector(num_envs=4)
    env.reset()
    with pytest.raises(UserError, match=r"\(4, 4\)"):
        env.step(actions)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_envs": 10, "group_size": 4}, "groups of 4 do not divide 10 environments.*8 for instance"),
        ({"num_envs": 2, "group_size": 4}, "4 for instance"),
        ({"num_envs": 0, "group_size": 1}, "0 environments"),
        ({"num_envs": 4, "group_size": 0}, "groups of 0"),
        ({"num_envs": 4, "group_sise": 2}, "'group_sise'.*group_size"),
        ({"seed": -1}, "seed -1"),
        ({"contexts": []}, "empty"),
        ({"contexts": [(99, 10.0)]}, "sample 99"),
        ({"contexts": [(0, math.nan)]}, "nan ms"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        AdaptiveVQAVectorEnv({"resources": make_resources(), **settings})


def test_resources_are_needed():
    with pytest.raises(UserError, match="no `resources`"):
        AdaptiveVQAVectorEnv({"num_envs": 4})


def test_resources_can_be_built_by_a_function():
    env = AdaptiveVQAVectorEnv({"resources": make_resources, "num_envs": 2})
    assert len(contexts_of(env)) == 2


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_impossible_workers_and_iterations_are_refused(index, count):
    env = vector()
    with pytest.raises(UserError, match=f"worker {index} of {count}"):
        env.set_worker(index, count)
    with pytest.raises(UserError, match="iteration -1"):
        env.set_iteration(-1)


def test_stepping_before_reset_is_an_error():
    with pytest.raises(gym.error.ResetNeeded):
        vector().step(np.zeros((12, 4), np.int64))


def test_the_measured_clock_times_every_row():
    resources = make_resources()
    engine = EngineDouble(resources.engine.model.config)
    measured = make_resources(engine=engine, clock=MeasuredClock(engine))
    _, _, _, infos = episode(vector(measured, num_envs=4))
    assert engine.calls["measured"] == 4 + 7
    assert len(set(infos["latency_ms"].tolist())) == 4


def test_a_profiled_environment_runs():
    from envs.latency import ProfiledClock, profile

    resources = make_resources()
    clock = ProfiledClock(
        profile(EngineDouble(resources.engine.model.config), resources.samples, repeats=1, per_tiling=8)
    )
    _, _, _, infos = episode(vector(make_resources(clock=clock)))
    assert (infos["latency_ms"] > 0).all()


def test_noise_multiplies_latencies_and_leaves_everything_else_alone():
    resources = make_resources(budgets=BudgetDistribution.over(12.0, 25.0))
    noise = LatencyNoise((0.9, 1.0, 1.3), 0)
    *_, rewards, quiet = episode(vector(resources))
    *_, noisy_rewards, noisy = episode(vector(replace(resources, noise=noise)))
    plans = [resources.space.plan(Knobs(TIERS[t], p, k, n)) for t, p, k, n in zip(*map(quiet.get, KNOBS), strict=True)]
    factors = [noise.factor(resources.samples[s].id, plan) for s, plan in zip(quiet["sample"], plans, strict=True)]
    np.testing.assert_allclose(noisy["latency_ms"], quiet["latency_ms"] * factors)
    assert len(set(factors)) == 3
    assert all((noisy[key] == quiet[key]).all() for key in ("accuracy", "budget_ms", "sample", *KNOBS))
    late = noisy["latency_ms"] > noisy["budget_ms"]
    assert (noisy_rewards[late] < noisy["accuracy"][late]).all()
    assert (noisy_rewards[~late] == noisy["accuracy"][~late]).all()
    assert (rewards != noisy_rewards).any()


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("guarded", [False, True])
def test_the_single_environment_passes_gymnasiums_check(text_only, guarded):
    resources = make_resources(text_only=text_only)
    env = AdaptiveVQAEnv({"resources": guard(resources) if guarded else resources})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env)


def test_the_standard_loop_runs_on_any_sampled_action():
    import envs.adaptive_vqa  # noqa: F401  (registers the id)

    env = gym.make("ray_ctrl/AdaptiveVQA-v0", config={"resources": guard(make_resources())}, disable_env_checker=True)
    env.action_space.seed(0)
    for _ in range(50):
        env.reset()
        ended = False
        while not ended:
            _, _, ended, _, info = env.step(env.action_space.sample())
        assert info["latency_ms"] <= info["budget_ms"] or not info["feasible"]


def test_projection_takes_the_nearest_legal_pair_and_is_off_for_vectors():
    resources = make_resources()
    env = vector(resources, 4, 4, illegal_actions="project")
    env.reset()
    env.step(np.tile([0, 3, 0, 0], (4, 1)))
    *_, infos = env.step(np.tile([0, 0, 2, 0], (4, 1)))
    assert (infos["top_k"] == 6).all()
    assert (infos["blocks"] == 15).all()
    with pytest.raises(UserError, match="error, project"):
        vector(resources, illegal_actions="ignore")


def test_masks_per_head_allow_what_some_legal_pair_has():
    env = AdaptiveVQAEnv({"resources": make_resources()})
    env.reset()
    assert env.action_masks().tolist() == [True] * 8 + [True, *[False] * 4] * 2
    env.step(np.array([0, 3, 0, 0]))
    assert env.action_masks().tolist() == [
        *[True, False, False], *[True, *[False] * 4], *[True] * 5, *[False] * 3, True, True,
    ]  # fmt: skip


def test_rendering_shows_the_episode():
    env = AdaptiveVQAEnv({"resources": make_resources()}, render_mode="rgb_array")
    env.reset()
    before = env.render()
    env.step(np.array([0, 0, 0, 0]))
    env.step(np.array([0, 0, 0, 0]))
    after = env.render()
    assert before.dtype == np.uint8
    assert before.shape == after.shape == (480, 384, 3)
    assert (before != after).any()  # choice, answer and latency are written below the question
    assert AdaptiveVQAEnv({"resources": make_resources()}).render() is None


def test_multipliers_reach_the_reward():
    resources = make_resources(budgets=BudgetDistribution.over(0.5, 2.0, bins=2))  # nothing is that fast
    env = vector(resources)
    env.set_multipliers([0.25, 0.75])
    *_, rewards, infos = episode(env)
    expected = np.where(infos["budget_ms"] < 1.0, 0.25, 0.75)
    assert (infos["multiplier"] == expected).all()
    cost = 1 + np.minimum(infos["latency_ms"] / infos["budget_ms"] - 1, 1)
    np.testing.assert_allclose(rewards, infos["accuracy"] - expected * cost)
    assert not infos["avoidable"].any()
    env.set_multipliers(None)
    assert (env.multipliers == resources.reward.penalty).all()
    with pytest.raises(UserError, match="2 budget bins"):
        env.set_multipliers([1.0])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_under_the_guardrail_no_legal_play_exceeds_a_feasible_budget(seed, text_only):
    resources = guard(make_resources(text_only=text_only, budgets=BudgetDistribution.over(4.0, 40.0)), longest=True)
    *_, infos = episode(vector(resources, seed=seed), seed)
    late = infos["latency_ms"] > infos["budget_ms"]
    assert not (late & infos["feasible"]).any()
    fallback = ~infos["feasible"]
    assert (infos["tier"][fallback] == 0).all()
    assert (infos["insertion"][fallback] == 1).all()
    assert (infos["top_k"][fallback] == 4).all()
    assert (infos["blocks"][fallback] == 12).all()


def guard(resources, longest=False):
    """The resources with a guardrail that knows every answer's length, or takes the longest possible one for all."""
    features = resources.engine.language_features(resources.samples).numpy()
    lengths = AnswerLengths.fit(features, [6] * len(features) if longest else [2] * len(features), 1.0)
    return replace(resources, guardrail=Guardrail(0.99, lengths, 1.0 if longest else 3.0))


def test_the_single_environment_is_a_vector_of_one():
    resources = make_resources()
    single, many = AdaptiveVQAEnv({"resources": resources, "seed": 4}), vector(resources, 1, 1, seed=4)
    one, _ = single.reset()
    first, _ = many.reset()
    for actions in ([1, 1, 0, 0], [0, 0, 2, 3]):
        assert all((one[key] == first[key][0]).all() for key in one)
        one, reward_one, ended, _, info = single.step(np.array(actions))
        first, rewards, _, _, infos = many.step(np.array([actions]))
    assert ended
    assert reward_one == rewards[0]
    assert {key: info[key] for key in info} == {key: infos[key][0] for key in info}
    assert "accuracy" in info
    with pytest.raises(gym.error.ResetNeeded):
        single.step(np.zeros(4, np.int64))


def test_a_context_can_be_chosen_at_reset():
    env = AdaptiveVQAEnv({"resources": make_resources()})
    env.reset(options={"sample": 7, "budget_ms": 33.0})
    env.step(np.zeros(4, np.int64))
    _, _, _, _, info = env.step(np.zeros(4, np.int64))
    assert (info["sample"], info["budget_ms"], info["context"]) == (7, 33.0, 0)
    for options, named in (
        ({"sample": 7}, "both"),
        ({"sample": 7, "budget_ms": 0}, "0.0 ms"),
        ({"sample": 70, "budget_ms": 5.0}, "sample 70"),
        ({"sample": 7, "budget": 5.0}, "both"),
    ):
        with pytest.raises(UserError, match=named):
            env.reset(options=options)


def test_a_seeded_reset_restarts_the_single_environment():
    env = AdaptiveVQAEnv({"resources": make_resources()})
    budgets = [env.reset(seed=seed)[0]["budget"][0] for seed in (1, 2, 1)]
    assert budgets[0] == budgets[2] != budgets[1]
    assert env.reset()[0]["budget"][0] != budgets[2]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_any_legal_play_stays_within_the_spaces(groups, size, seed):
    env = vector(num_envs=groups * size, group_size=size, seed=seed)
    observations, actions, rewards, infos = episode(env, seed)
    assert all(env.observation_space.contains(observation) for observation in observations)
    assert all(env.action_space.contains(action) for action in actions)
    assert np.isfinite(rewards).all()
    assert ((infos["accuracy"] >= 0) & (infos["accuracy"] <= 1)).all()


def test_errors_survive_pickling():
    with pytest.raises(UserError) as caught:
        vector(num_envs=10)
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message


def test_engine_counters_are_passed_on():
    env = vector()
    episode(env)
    assert env.stats()["engine/executed"] == 12.0


def test_held_out_contexts_take_samples_and_budgets_in_turns() -> None:
    env = AdaptiveVQAVectorEnv({"resources": make_resources()})
    contexts = env.held_out_contexts()
    samples, budgets = len(env.resources.samples), env.resources.budgets.held_out()
    assert sorted(contexts) == [(sample, budget) for sample in range(samples) for budget in sorted(budgets)]
    assert [sample for sample, _ in contexts[:samples]] == list(range(samples))
    assert {budget for _, budget in contexts[:samples]} == set(budgets)
    env.set_contexts(contexts)
