"""The resources on a real (small, untrained) model: what the double cannot show."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from doubles import PUBLISHED_IMPORTANCE

from benchmarks.profiled_clock import hold_out
from envs.adaptive_vqa import AdaptiveVQAVectorEnv
from envs.budgets import BudgetDistribution, budget_range
from envs.config import LatencySettings, ModelSettings, RewardSettings, StoreSettings, TaskSettings
from envs.data.scenes import load_scenes
from envs.engine import RolloutEngine
from envs.env_resources import EnvConfig, EnvResources
from envs.errors import UserError
from envs.knobs import INSERTIONS, TIERS, Knobs, KnobSpace
from envs.latency import MeasuredClock, ProfiledClock, RooflineClock, is_measuring, profile, reference_shape
from envs.latency.measured import reference_sample
from envs.latency_token import budget_level
from envs.model.config import AdaptiveMolmoEConfig
from envs.processing import MolmoEProcessor
from recipes.embedded_model.fresh_weights import initialise
from recipes.embedded_model.shape import write_files


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def samples():
    return load_scenes("validation")[:24]


@pytest.fixture
def engine(model_folder):
    torch.set_num_threads(1)
    model = initialise(AdaptiveMolmoEConfig.from_pretrained(model_folder), 0).eval()
    return RolloutEngine(model, MolmoEProcessor.from_pretrained(model_folder), max_new_tokens=2)


@pytest.fixture
def resources(engine, samples):
    text_only = replace(samples[0], id="text-only", image=None)
    clock = RooflineClock(engine.model.config, "laptop-2-core")
    budgets = BudgetDistribution.over(5.0, 50.0)
    return EnvResources(
        engine, (*samples, text_only), clock, budgets, RewardSettings(), KnobSpace(PUBLISHED_IMPORTANCE)
    )


def play(env, rng):
    observations = [env.reset()[0]]
    for _ in range(2):
        first, second = np.split(observations[-1]["action_mask"], [15], axis=1)
        pairs = [(rng.random(part.shape) * part).argmax(1) for part in (first, second)]
        actions = np.stack([index for pair in pairs for index in divmod(pair, 5)], axis=1)
        observation, rewards, _, _, infos = env.step(actions)
        observations.append(observation)
    return observations, rewards, infos


def test_an_episode_is_what_the_engine_says(resources):
    env = AdaptiveVQAVectorEnv({"resources": resources, "num_envs": 8, "group_size": 4})
    (first, second, _), _, infos = play(env, np.random.default_rng(0))
    for row in range(8):
        sample = resources.samples[infos["sample"][row]]
        knobs = Knobs(TIERS[infos["tier"][row]], *(int(infos[key][row]) for key in ("insertion", "top_k", "blocks")))
        plan = resources.space.plan(knobs)
        [outcome] = resources.engine.outcomes([sample], [plan])
        assert infos["accuracy"][row] == resources.engine.accuracy(sample, outcome)
        shape = resources.engine.shape(sample, knobs.tier)
        assert infos["latency_ms"][row] == resources.clock.latency(shape, plan, outcome.n_tokens).total
        ids = torch.tensor(resources.engine.processor.question_ids(sample.question))
        assert np.allclose(
            first["language_feature"][row], resources.engine.model.language_feature(ids).detach(), atol=1e-6
        )
        level = budget_level(float(first["budget"][row, 0]))
        token = resources.engine.latency_tokens([sample], [knobs.tier], [level])[0, knobs.insertion - 1]
        assert np.allclose(second["latency_token"][row], token, atol=1e-5)


def test_a_context_may_observe_another_budget_than_it_is_scored_by(resources):
    def observed(contexts):
        env = AdaptiveVQAVectorEnv({"resources": resources, "num_envs": len(contexts), "contexts": contexts})
        (first, second, *_), rewards, infos = play(env, np.random.default_rng(1))
        return first["budget"][0], second["latency_token"][0], rewards[0], infos["budget_ms"][0]

    scored, observed_only, both = (observed([context]) for context in ((0, 30.0), (0, 12.0), (0, 30.0, 12.0)))
    for seen in range(2):
        assert np.array_equal(both[seen], observed_only[seen])
        assert not np.array_equal(both[seen], scored[seen])
    assert both[2:] == scored[2:]


def test_text_only_and_image_requests_run_side_by_side(resources):
    contexts = [(24, 30.0), (0, 30.0), (24, 20.0), (1, 20.0)]
    env = AdaptiveVQAVectorEnv({"resources": resources, "num_envs": 4, "contexts": contexts})
    (first, *_), _, infos = play(env, np.random.default_rng(1))
    assert first["action_mask"][:, len(INSERTIONS)].tolist() == [0, 1, 0, 1]
    assert infos["tier"][[0, 2]].tolist() == [0, 0]
    assert (infos["latency_ms"] > 0).all()


def test_equal_seeds_give_equal_trajectories_in_fresh_engines(resources, model_folder):
    def run(engine):
        env = AdaptiveVQAVectorEnv(
            {"resources": replace(resources, engine=engine), "num_envs": 8, "group_size": 4, "seed": 3}
        )
        rng = np.random.default_rng(5)
        return [play(env, rng) for _ in range(2)]

    fresh = RolloutEngine(resources.engine.model, resources.engine.processor, max_new_tokens=2)
    for (obs_a, rewards_a, infos_a), (obs_b, rewards_b, infos_b) in zip(run(resources.engine), run(fresh), strict=True):
        assert all(np.array_equal(a[key], b[key]) for a, b in zip(obs_a, obs_b, strict=True) for key in a)
        assert np.array_equal(rewards_a, rewards_b)
        assert all(np.array_equal(infos_a[key], infos_b[key]) for key in infos_a)


def test_the_profiled_clock_fits_real_requests(engine, samples, monkeypatch):
    # Processor time instead of wall time: a test must pass on a machine that is busy with something else.
    monkeypatch.setattr("envs.engine.single_request.time", SimpleNamespace(perf_counter=time.thread_time))
    table = profile(engine, samples[:12], repeats=2, per_tiling=6)
    clock = ProfiledClock.for_engine(table, engine)
    assert np.median(hold_out(clock, engine, samples[12:], requests=10, repeats=2)) < 0.12
    assert clock.reference_ms > clock.latency(engine.shape(samples[0], "low"), table.cells[0].plan, 1).total


def test_the_reference_request_is_the_same_for_every_clock(engine):
    sample = reference_sample(engine.model.config.vision.crop_size)
    shape, expected = engine.shape(sample, "high"), reference_shape(engine.model.config)
    assert engine.tiling(sample, "high") == (3, 4)
    assert (shape.crops, shape.image_tokens, shape.pixels) == (expected.crops, expected.image_tokens, expected.pixels)
    assert MeasuredClock(engine, repeats=1).reference_ms > 0


def test_a_measured_environment_runs(resources, engine):
    measured = replace(resources, clock=MeasuredClock(engine, repeats=1))
    assert is_measuring(measured.clock)
    env = AdaptiveVQAVectorEnv({"resources": measured, "num_envs": 4, "group_size": 2})
    _, _, infos = play(env, np.random.default_rng(0))
    assert (infos["latency_ms"] > 0).all()


def test_the_device_range_spans_what_the_knobs_span(resources):
    low, high = budget_range(resources.engine, resources.clock, resources.space, resources.samples)
    assert high > 1.5 * low


def test_an_environment_is_built_from_its_settings(engine, model_folder, tmp_path):
    engine.model.save_pretrained(model_folder)
    settings = EnvConfig(
        model=ModelSettings(name=str(model_folder), device="cpu", max_new_tokens=2),
        task=TaskSettings(validation_samples=6),
        latency=LatencySettings(source="roofline"),
        store=StoreSettings(path=None),
        split="validation",
    )
    resources = settings.build()
    assert len(resources.samples) == 6
    assert resources.d_model == 64
    assert isinstance(resources.clock, RooflineClock)
    assert len(resources.budgets.held_out()) == 5
    assert settings.build().engine is resources.engine
    table = profile(resources.engine, resources.samples, repeats=1, per_tiling=2)
    if len(table.cells) < 8:
        table = replace(table, cells=table.cells * 4)
    table.save(tmp_path / "table.json")

    def profiled(file: str) -> EnvConfig:
        latency = LatencySettings(source="profiled", profile=str(tmp_path / file))
        return settings.model_copy(update={"latency": latency, "distribution": resources.budgets})

    assert isinstance(profiled("table.json").build().clock, ProfiledClock)
    replace(table, identity=replace(table.identity, threads=99)).save(tmp_path / "other.json")
    with pytest.raises(UserError, match="threads: 99 against 1"):
        profiled("other.json").build()
