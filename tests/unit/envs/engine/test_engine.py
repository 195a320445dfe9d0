"""The engine gives what one request after another would give, and computes nothing twice."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cachetools import LRUCache
from doubles import with_geometry
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.engine import RolloutEngine
from envs.engine.executor import Executor
from envs.errors import UserError
from envs.knobs import TIERS, ExecutionPlan
from envs.latency_token import LEVELS
from envs.model.execution_tree import build_execution_tree, tree_size


def ids(outcomes):
    return [outcome.token_ids for outcome in outcomes]


def test_outcomes_equal_naive_ones(engine, pairs, naive):
    samples, plans = pairs
    found = engine.outcomes(samples, plans)
    wanted = [naive(sample, plan) for sample, plan in zip(samples, plans, strict=True)]
    assert ids(found) == wanted
    assert len({len(answer) for answer in wanted}) > 2, "answers should differ in length for this test to mean anything"
    assert [outcome.finished for outcome in found] == [len(answer) < 8 for answer in wanted]


@pytest.mark.parametrize("batch_tokens", [1, 150, 400])
def test_any_token_budget_gives_the_same(small_model, processor, pairs, naive, batch_tokens):
    samples, plans = pairs
    engine = RolloutEngine(small_model, processor, max_new_tokens=8, batch_tokens=batch_tokens)
    if batch_tokens == 150:
        # Few cache slots, so that rows wait for others to leave.
        engine.executor.memory = replace(engine.memory, decode_tokens=600)
    assert ids(engine.outcomes(samples, plans)) == [naive(s, p) for s, p in zip(samples, plans, strict=True)]


def test_outcomes_after_latency_tokens_start_from_kept_prefixes(engine, pairs, naive, monkeypatch):
    samples, plans = pairs
    engine.latency_tokens(samples, [plan.tier for plan in plans], [3] * len(samples))
    encoded = engine.prompts.images_encoded
    ran = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, _o, index=index: ran.append(index))
        for index, block in enumerate(engine.model.language.blocks)
    ]
    found = engine.outcomes(samples, plans)
    for hook in hooks:
        hook.remove()
    assert ids(found) == [naive(s, p) for s, p in zip(samples, plans, strict=True)]
    assert engine.prompts.images_encoded == encoded
    assert 0 not in ran, "block 1 belongs to every kept prefix"


def test_some_prefixes_kept_and_some_not(small_model, processor, pairs, naive):
    samples, plans = pairs
    engine = RolloutEngine(small_model, processor, max_new_tokens=8)
    engine.latency_tokens(samples[:6], [plan.tier for plan in plans[:6]], [0] * 6)
    assert 0 < len(engine.prefixes) <= 6
    assert ids(engine.outcomes(samples, plans)) == [naive(s, p) for s, p in zip(samples, plans, strict=True)]


def test_latency_tokens_equal_the_probe(engine, samples, small_model, processor):
    rng = random.Random(1)
    tiers, levels = [rng.choice(TIERS) for _ in samples], [rng.randrange(LEVELS) for _ in samples]
    found = engine.latency_tokens(samples, tiers, levels)
    assert found.shape == (len(samples), 5, small_model.config.d_model)
    assert found.dtype == torch.float32
    for row, (sample, tier, level) in enumerate(zip(samples, tiers, levels, strict=True)):
        inputs = processor(sample.image, sample.question, tier, sample.style)
        wanted = small_model.probe(inputs, engine._tokens_LD[level][None])[0]
        assert torch.allclose(found[row], wanted, atol=1e-4)
    assert not torch.allclose(found[0], engine.latency_tokens(samples[:1], tiers[:1], [(levels[0] + 8) % 16])[0])


def test_one_pass_gives_all_levels(engine, samples):
    tiers = ["low"] * len(samples)
    first = engine.latency_tokens(samples, tiers, [0] * len(samples))
    before = engine.stats()
    for level in range(LEVELS):
        engine.latency_tokens(samples, tiers, [level] * len(samples))
    after = engine.stats()
    assert after["engine/latency_token_misses"] == before["engine/latency_token_misses"] == len(samples)
    assert after["engine/latency_token_hits"] == LEVELS * len(samples)
    assert torch.equal(first, engine.latency_tokens(samples, tiers, [0] * len(samples)))


def test_identity_goes_by_tiling_and_content(engine, samples, space):
    """A small image has one tiling at two tiers; another id, other answers or p with the same blocks do nothing."""
    small = next(s for s in samples if s.image and engine.tiling(s, "medium") == engine.tiling(s, "high"))
    twin = replace(small, id="other", answers=("x",))
    everything = tuple(range(16))
    plans = [ExecutionPlan(tier, p, 8, everything) for tier in ("medium", "high") for p in (1, 3)]
    found = engine.outcomes([small] * 4 + [twin], [*plans, plans[0]])
    assert len(set(ids(found))) == 1
    assert engine.stats()["engine/executed"] == 1


def test_each_image_is_encoded_once(engine, samples, space):
    plans = [space.full, space.cheapest]
    chosen = [sample for sample in samples if sample.image is not None]
    engine.outcomes([s for s in chosen for _ in plans], [space.plan(k) for _ in chosen for k in plans])
    distinct = {(s.image.digest, engine.tiling(s, tier)) for s in chosen for tier in ("low", "high")}
    assert engine.stats()["engine/images_encoded"] == len(distinct)


def test_every_counter_is_documented(engine):
    page = (Path(__file__).parents[4] / "docs" / "runs.md").read_text("utf-8")
    assert set(engine.stats()) == set(re.findall(r"`(engine/\w+)`", page))


def test_hits_cost_nothing(engine, pairs):
    samples, plans = pairs
    first = engine.outcomes(samples, plans)
    spent = engine.stats()
    assert engine.outcomes(samples, plans) == first
    again = engine.stats()
    assert again["engine/seconds"] == spent["engine/seconds"]
    assert again["engine/outcome_hits"] == len(samples)
    assert again["engine/seconds_saved"] > 0
    assert spent["engine/outcome_misses"] == len(samples)
    assert spent["engine/executed"] <= 24


def test_memory_stays_bounded(small_model, processor, pairs, monkeypatch):
    """No wave computes more padded tokens at a time than the budget, unless a single execution does."""
    samples, plans = pairs
    engine = RolloutEngine(small_model, processor, max_new_tokens=2, batch_tokens=300)
    sizes = []
    prefill = Executor.prefill

    def watch(self, wave):
        keys = {job.prompt.key: i for i, job in enumerate(wave)}
        tree = build_execution_tree(tuple(keys[job.prompt.key] for job in wave), tuple(job.top_k for job in wave))
        sizes.append((len(wave), tree_size(tree), max(job.prompt.tokens for job in wave)))
        return prefill(self, wave)

    monkeypatch.setattr(Executor, "prefill", watch)
    engine.outcomes(samples, plans)
    assert all(rows == 1 or nodes * longest <= 300 for rows, nodes, longest in sizes)
    assert any(rows > 1 for rows, _, _ in sizes)


def test_every_cache_is_bounded(small_model, processor, samples, monkeypatch):
    """However many images and questions come, no cache has more entries or bytes than its bound."""
    monkeypatch.setattr("envs.engine.prompts._ENTRIES", 2)
    monkeypatch.setattr("envs.engine.engine._OUTCOMES_KEPT", 2)
    monkeypatch.setattr("envs.engine.engine._FEATURES_BYTES", 300)
    engine = RolloutEngine(small_model, processor, max_new_tokens=1)
    many = [replace(samples[0], question=f"what is {number}?") for number in range(6)]
    engine.language_features(many)
    for sample in many:
        engine.prompts.prompt(sample, "low")
        engine.prompts.size(sample)
    found = {name: value for place in (engine, engine.prompts) for name, value in vars(place).items()}
    caches = {name: cache for name, cache in found.items() if isinstance(cache, LRUCache)}
    assert {"_features", "_known", "_states", "_sizes", "_prompts"} <= set(caches)
    assert all(cache.currsize <= cache.maxsize for cache in caches.values())
    assert len(engine.prompts._prompts) == 2
    assert 1 <= len(engine._features) < 6
    dicts = {name for name, value in found.items() if isinstance(value, dict)}
    # Of tilings there are a few dozen; the others have a fixed set of keys.
    assert dicts <= {"_layouts", "_encoder", "_stats"}


def test_splitting_a_prompt_into_waves_costs_little_sharing(small_model, processor, samples, space, monkeypatch):
    """65 executions of one prompt need 575 block passes together; in waves of at most 48, sorted, hardly more."""
    engine = RolloutEngine(small_model, processor, max_new_tokens=1, batch_tokens=10**6)
    plans = [space.plan(index) for index in space.all if space.plan(index).tier == "low"]
    tokens = engine.prompts.prompt(samples[0], "low").tokens
    engine.executor.memory = replace(engine.memory, batch_tokens=48 * tokens, decode_tokens=10**6)
    waves = []
    prefill = Executor.prefill

    def watch(self, wave):
        waves.append(tuple(job.top_k for job in wave))
        return prefill(self, wave)

    monkeypatch.setattr(Executor, "prefill", watch)
    engine.outcomes([samples[0]] * len(plans), plans)
    together = tuple(ks for wave in waves for ks in wave)
    assert len(together) == len(set(together)) == 65
    assert block_passes([together]) == 575
    assert len(waves) == 2
    assert block_passes(waves) <= 580


def block_passes(waves):
    trees = [build_execution_tree((0,) * len(wave), wave) for wave in waves]
    return sum(len(level.run) + len(level.final) for tree in trees for level in tree)


def test_shape_matches_the_inputs(engine, samples, processor):
    for sample in samples:
        for tier in TIERS:
            inputs = processor(sample.image, sample.question, tier, sample.style)
            shape = engine.shape(sample, tier)
            assert shape.prompt_tokens == inputs["input_ids"].shape[1]
            assert shape.crops == (0 if sample.image is None else inputs["images"].shape[1])


def test_language_features(engine, samples, processor, small_model):
    found = engine.language_features(samples)
    question = processor.question_ids(samples[3].question)
    assert torch.allclose(found[3], small_model.language.wte[question].mean(0))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_batch_equals_its_parts(small_model, processor, samples, space, data):
    chosen = data.draw(
        st.lists(st.tuples(st.sampled_from(samples), st.sampled_from(space.all)), min_size=1, max_size=8)
    )
    engine = RolloutEngine(small_model, processor, max_new_tokens=4)
    parts = RolloutEngine(small_model, processor, max_new_tokens=4)
    together = engine.outcomes([s for s, _ in chosen], [space.plan(k) for _, k in chosen])
    assert together == [parts.outcomes([s], [space.plan(k)])[0] for s, k in chosen]


class Choose:
    """A controller that always wants the same."""

    level = 4

    def __init__(self):
        self.seen = []

    def decide_stage1(self, language_feature_D, has_image):
        self.seen.append((language_feature_D, has_image))
        return "medium", 2

    def decide_stage2(self, latency_token_D, insertion):
        self.seen.append((latency_token_D, insertion))
        return 5, (0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 14)


def test_measured_requests_equal_outcomes(engine, pairs):
    samples, plans = pairs
    for sample, plan in list(zip(samples, plans, strict=True))[:6]:
        outcome, record = engine.run_measured(sample, plan)
        assert outcome == engine.outcomes([sample], [plan])[0]
        assert record.total > 0
        assert (record.vision > 0.01) == (sample.image is not None)
        assert min(record.prefix, record.suffix, record.processor) > 0


def test_decided_request(engine, samples):
    controller = Choose()
    outcome, record, plan = engine.run_decided(samples[2], controller)
    assert plan == ExecutionPlan("medium", 2, 5, (0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 14))
    assert outcome == engine.outcomes([samples[2]], [plan])[0]
    assert record.controller > 0
    feature, latency_token = controller.seen[0][0], controller.seen[1][0]
    assert torch.allclose(feature, engine.language_features([samples[2]])[0])
    assert torch.allclose(latency_token, engine.latency_tokens([samples[2]], ["medium"], [4])[0, 1], atol=1e-4)
    fixed, _ = engine.run_measured(samples[2], ExecutionPlan(), Choose())
    assert fixed == engine.outcomes([samples[2]], [ExecutionPlan()])[0]


def test_accuracy_and_text(engine, samples, processor):
    outcome = engine.outcomes(samples[:1], [ExecutionPlan()])[0]
    right = replace(samples[0], answers=(engine.text(outcome),) * 10)
    assert engine.accuracy(right, outcome) == 1.0
    assert engine.text(outcome) == processor.decode(outcome.token_ids)


@pytest.mark.parametrize(
    ("settings", "match"), [({"max_new_tokens": 0}, "max_new_tokens"), ({"batch_tokens": 0}, "batch_tokens")]
)
def test_bad_settings(small_model, processor, settings, match):
    with pytest.raises(UserError, match=match):
        RolloutEngine(small_model, processor, **{"max_new_tokens": 8, **settings})


def test_bad_level(engine, samples):
    with pytest.raises(UserError, match="level 16"):
        engine.latency_tokens(samples[:1], ["low"], [16])


def test_processor_of_another_model(small_model, processor):
    other = with_geometry(processor, patch=14)
    with pytest.raises(UserError, match="processor of the same model"):
        RolloutEngine(small_model, other, max_new_tokens=8)


def test_images_prepared_by_threads_give_the_same_embeddings(small_model, processor, samples, space):
    """As on a GPU, where threads load and cut images before their wave comes."""
    plan = space.plan(space.full)
    found = []
    for threads in (0, 3):
        prompts = RolloutEngine(small_model, processor, max_new_tokens=4).prompts
        waves = [[prompts.prompt(sample, tier) for sample in samples] for tier in ("low", plan.tier)]
        prompts._ahead._threads = threads
        prompts._ahead.expect((key, prompt, 1) for wave in waves for key, prompt in prompts._missing(wave).items())
        found.append([x for wave in waves for x in prompts.embed(wave)])
        assert not prompts._ahead._running
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
