"""Records, the three clocks, the profiler and its measured_profile."""

import dataclasses
import json
import math

import numpy as np
import pytest
from doubles import GOLDEN, EngineDouble, make_resources, make_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from benchmarks.profiled_clock import hold_out
from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.latency import (
    DEVICES,
    LatencyProfile,
    LatencyRecord,
    MeasuredClock,
    ProfiledClock,
    RequestShape,
    RooflineClock,
    is_measuring,
    profile,
    reference_shape,
)
from envs.latency.noise import LatencyNoise
from envs.latency.roofline import experts_touched
from envs.model.config import MOLMOE_1B_VISION, AdaptiveMolmoEConfig

CONFIG = AdaptiveMolmoEConfig.from_pretrained(GOLDEN)
FULL_SIZE = dataclasses.replace(
    CONFIG,
    d_model=2048,
    n_heads=16,
    moe_num_experts=64,
    mlp_hidden_size=2048,
    vocab_size=50280,
    overlap_margins=(4, 4),
    vision_backbone=MOLMOE_1B_VISION.to_published(),
)
CHEAPEST = ExecutionPlan("low", 1, 4, (0, 1, 3, 5, 6, 7, 8, 9, 11, 12, 14, 15))
sizes = st.builds(
    lambda crops, text: RequestShape(crops, 9 * crops, 9 * crops + text, crops * 7056),
    st.integers(0, 13),
    st.integers(1, 200),
)
plans = st.builds(
    lambda p, k, n: ExecutionPlan("high", p, k, tuple(range(max(n, p)))),
    st.integers(1, 5),
    st.integers(4, 8),
    st.integers(1, 16),
)


@pytest.fixture(scope="module")
def resources():
    return make_resources(40)


@pytest.fixture(scope="module")
def measured_profile(resources):
    engine = EngineDouble(CONFIG)
    return profile(engine, resources.samples[:20], repeats=3, per_tiling=20)


def test_a_record_adds_up_and_round_trips():
    record = LatencyRecord(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert record.total == 21.0
    assert TypeAdapter(LatencyRecord).validate_python(record.to_dict()) == record


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_record_refuses_impossible_times(value):
    with pytest.raises(UserError, match="vision"):
        LatencyRecord(vision=value)


@pytest.mark.parametrize("sizes", [(-1, 0, 1, 0), (0, 0, 0, 0), (1, 5, 4, 0), (0, 0, 1, -1)])
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(UserError):
        RequestShape(*sizes)


def test_image_tokens_of_the_published_layout():
    # 12 rows of 12 patches and a mark for the global view, 28 rows of 36 for 3 x 4 crops, and four view marks.
    assert FULL_SIZE.image_tokens((3, 4)) == 12 * 13 + 2 + 28 * 37 + 2
    assert FULL_SIZE.image_tokens(None) == 0
    assert reference_shape(FULL_SIZE).crops == 13


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25, deadline=None)
@given(shape=sizes, plan=plans, new_tokens=st.integers(0, 64))
def test_roofline_rises_with_everything(device, shape, plan, new_tokens):
    clock = RooflineClock(CONFIG, device)
    base = clock.latency(shape, plan, new_tokens).total
    assert base == clock.latency(shape, plan, new_tokens).total
    assert clock.latency(shape, plan, new_tokens + 1).total > base
    more = dataclasses.replace(shape, prompt_tokens=shape.prompt_tokens + 50)
    assert clock.latency(more, plan, new_tokens).total >= base
    if shape.crops:
        assert clock.latency(dataclasses.replace(shape, crops=shape.crops + 1), plan, new_tokens).total > base
    if plan.top_k < 8:
        assert clock.latency(shape, dataclasses.replace(plan, top_k=8), new_tokens).total >= base
    if len(plan.blocks) < 16:
        longer = dataclasses.replace(plan, blocks=tuple(range(len(plan.blocks) + 1)))
        assert clock.latency(shape, longer, new_tokens).total > base


def test_roofline_at_full_size_on_an_h100_is_near_what_such_hardware_does():
    clock = RooflineClock(FULL_SIZE, "h100")
    shape = reference_shape(FULL_SIZE)
    low = RequestShape(4, FULL_SIZE.image_tokens((1, 3)), FULL_SIZE.image_tokens((1, 3)) + 24, shape.pixels)
    assert 20 < clock.reference_ms < 400
    assert 0.3 < clock.latency(low, CHEAPEST, 4).total / clock.reference_ms < 0.8
    assert RooflineClock(FULL_SIZE, "l4").reference_ms > RooflineClock(FULL_SIZE, "a100").reference_ms


@pytest.mark.parametrize("device", DEVICES)
def test_small_models_leave_something_to_choose(device):
    clock = RooflineClock(CONFIG, device)
    low = RequestShape(4, CONFIG.image_tokens((1, 3)), CONFIG.image_tokens((1, 3)) + 24, 100_000)
    assert (
        clock.latency(low, CHEAPEST, 2).total < 0.85 * clock.latency(reference_shape(CONFIG), ExecutionPlan(), 2).total
    )


def test_roofline_counts_experts_that_are_touched():
    assert experts_touched(64, 8, 1) == pytest.approx(8)
    assert experts_touched(64, 8, 1000) == pytest.approx(64)


def test_an_unknown_device_is_named():
    with pytest.raises(UserError, match=r"'tpu'.*h100"):
        RooflineClock(CONFIG, "tpu")


@pytest.mark.parametrize("clock", ["roofline", "profiled"])
def test_negative_answers_are_refused(clock, measured_profile):
    made = RooflineClock(CONFIG, "laptop-2-core") if clock == "roofline" else ProfiledClock(measured_profile)
    with pytest.raises(UserError, match="-1"):
        made.latency(reference_shape(CONFIG), ExecutionPlan(), -1)


def test_profiling_covers_tilings_and_knobs(measured_profile):
    assert {cell.shape.crops for cell in measured_profile.cells} == {2, 4, 7, 13}
    assert {cell.plan.insertion for cell in measured_profile.cells} == {1, 2, 3, 4, 5}
    assert {cell.plan.top_k for cell in measured_profile.cells} == {4, 5, 6, 7, 8}
    assert {len(cell.plan.blocks) for cell in measured_profile.cells} >= {12, 16}
    assert all(len(cell.totals_ms) == 3 and len(set(cell.totals_ms)) == 3 for cell in measured_profile.cells)


def test_profiled_clock_predicts_requests_not_used_to_fit(measured_profile, resources):
    engine = EngineDouble(CONFIG)
    clock = ProfiledClock.for_engine(measured_profile, engine)
    assert np.median(hold_out(clock, engine, resources.samples[20:])) < 0.08
    assert clock.median_error < 0.05
    assert clock.reference_ms == pytest.approx(engine.truth.reference_ms - 0.4, rel=0.08)


def test_most_requests_are_below_the_95th_percentile_of_the_profile(measured_profile, resources):
    engine, clock = EngineDouble(CONFIG), ProfiledClock(measured_profile)
    plan = ExecutionPlan()
    inside = []
    for sample in resources.samples:
        answer, record = engine.run_measured(sample, plan)
        predicted = clock.latency(engine.shape(sample, "high"), plan, answer.n_tokens).total
        inside.append(record.total <= predicted * clock.quantile(0.95))
    assert np.mean(inside) >= 0.85


@settings(max_examples=50, deadline=None)
@given(shape=sizes, plan=plans, new_tokens=st.integers(0, 64))
def test_profiled_clock_never_falls_when_more_is_run(measured_profile, shape, plan, new_tokens):
    clock = ProfiledClock(measured_profile)
    base = clock.latency(shape, plan, new_tokens).total
    assert base > 0
    assert clock.latency(shape, plan, new_tokens + 1).total >= base
    assert clock.latency(shape, dataclasses.replace(plan, top_k=8), new_tokens).total >= base
    full = dataclasses.replace(plan, blocks=tuple(range(16)))
    assert clock.latency(shape, full, new_tokens).total >= base


def test_a_profile_round_trips_and_is_written_atomically(measured_profile, tmp_path):
    path = tmp_path / "deep" / "table.json"
    measured_profile.save(path)
    assert LatencyProfile.load(path) == measured_profile
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]
    shape, plan = reference_shape(CONFIG), ExecutionPlan()
    assert ProfiledClock(LatencyProfile.load(path)).latency(shape, plan, 3) == ProfiledClock(measured_profile).latency(
        shape, plan, 3
    )


def test_a_failed_write_leaves_the_old_profile(measured_profile, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    measured_profile.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("envs.latency.latency_profile.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        measured_profile.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"device": "Other CPU"}, "device: Other CPU against"),
        ({"model": "0" * 64}, "model: 000000000000... against ffffffffffff"),
        ({"threads": 77}, "threads: 77 against"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16 against float32"),
        ({"versions": {}}, "version: None against"),
    ],
)
def test_a_profile_of_elsewhere_is_refused(measured_profile, change, both):
    foreign = dataclasses.replace(measured_profile, identity=dataclasses.replace(measured_profile.identity, **change))
    with pytest.raises(UserError) as caught:
        ProfiledClock.for_engine(foreign, EngineDouble(CONFIG))
    assert both in caught.value.message
    assert "ray-ctrl profile" in caught.value.message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not valid JSON"),
        ("[]", "format 'list'"),
        ('{"format_version": 99}', "format 99"),
        ('{"format_version": 1}', "damaged"),
        ('{"format_version": 1, "identity": {}, "reference": {}, "cells": []}', "damaged"),
    ],
)
def test_broken_profiles_are_named(tmp_path, content, named):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(UserError, match=named):
        LatencyProfile.load(path)


def test_a_missing_profile_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing.json"):
        LatencyProfile.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("part", "key", "value", "reason"),
    [
        ("median", "vision", -5, "stage vision took -5"),
        ("median", "visoin", 1.0, "visoin"),
        ("shape", "pixels", "many", "pixels"),
        ("plan", "top_k", 99, "99"),
    ],
)
def test_a_damaged_cell_is_refused(measured_profile, tmp_path, part, key, value, reason):
    path = tmp_path / "table.json"
    measured_profile.save(path)
    body = json.loads(path.read_text())
    body["cells"][0][part][key] = value
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=f"damaged.*{reason}"):
        LatencyProfile.load(path)


def test_too_small_a_table_is_refused(measured_profile):
    with pytest.raises(UserError, match="3 cells"):
        ProfiledClock(dataclasses.replace(measured_profile, cells=measured_profile.cells[:3]))


def test_profiling_needs_something_to_measure(resources):
    with pytest.raises(UserError, match="0 samples"):
        profile(EngineDouble(CONFIG), [])
    with pytest.raises(UserError, match="0 repeats"):
        profile(EngineDouble(CONFIG), resources.samples, repeats=0)


def test_progress_counts_all_requests(resources):
    seen = []
    profile(EngineDouble(CONFIG), resources.samples[:3], repeats=2, per_tiling=2, progress=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_a_disturbed_device_is_measured_longer(resources):
    calm, busy = EngineDouble(CONFIG), EngineDouble(CONFIG)
    quiet_run = busy.run_measured

    def disturbed(sample, plan, controller=None):
        answer, record = quiet_run(sample, plan, controller)
        factor = 3.0 if busy.noise.random() < 0.4 else 1.0
        return answer, LatencyRecord(**{stage: ms * factor for stage, ms in record.to_dict().items()})

    busy.run_measured = disturbed
    profiles = [profile(engine, resources.samples[:20], repeats=3, per_tiling=10) for engine in (calm, busy)]
    assert [len(measured_profile.cells[0].totals_ms) for measured_profile in profiles] == [3, 9]
    assert ProfiledClock(profiles[1]).reference_ms == pytest.approx(ProfiledClock(profiles[0]).reference_ms, rel=0.5)


def test_noise_is_the_profiles_own_and_the_same_for_equal_executions(measured_profile, resources):
    clock = ProfiledClock(measured_profile)
    noise = LatencyNoise(clock.repeat_ratios, 0)
    drawn = [noise.factor(f"s{i}", ExecutionPlan()) for i in range(4000)]
    assert drawn == [LatencyNoise(clock.repeat_ratios, 0).factor(f"s{i}", ExecutionPlan()) for i in range(4000)]
    assert set(drawn) <= set(clock.repeat_ratios)
    quantiles = (0.1, 0.5, 0.9)
    np.testing.assert_allclose(np.quantile(drawn, quantiles), np.quantile(clock.repeat_ratios, quantiles), rtol=0.02)
    assert 0.005 < np.std(drawn) < 0.1  # the device under test has 3 % noise in every stage
    assert drawn != [LatencyNoise(clock.repeat_ratios, 1).factor(f"s{i}", ExecutionPlan()) for i in range(4000)]
    # Blocks before the insertion position use 8 experts whatever top-k is.
    prefix = [ExecutionPlan("low", 5, k, tuple(range(5))) for k in (4, 8)]
    assert len({noise.factor("s0", plan) for plan in prefix}) == 1


def test_profiling_text_only_samples():
    engine = EngineDouble(CONFIG)
    measured_profile = profile(engine, make_samples(10, text_only=True), repeats=2, per_tiling=12)
    clock = ProfiledClock.for_engine(measured_profile, engine)
    record = clock.latency(RequestShape(0, 0, 12, 0), ExecutionPlan("low"), 2)
    assert record.vision == 0
    assert record.total > 0


def test_measured_clock_runs_the_request_and_the_reference():
    engine = EngineDouble(CONFIG)
    clock = MeasuredClock(engine)
    answer, record = clock.measure(make_samples(1)[0], ExecutionPlan())
    assert answer.n_tokens >= 1
    assert record.total > 0
    for _ in range(2):
        assert clock.reference_ms == pytest.approx(engine.truth.reference_ms - 0.4, rel=0.1)
    assert engine.calls["measured"] == 1 + 7


def test_clocks_say_what_they_are(measured_profile):
    roofline, profiled, measured = (
        RooflineClock(CONFIG, "laptop-2-core"),
        ProfiledClock(measured_profile),
        MeasuredClock(EngineDouble(CONFIG)),
    )
    assert [clock.name for clock in (roofline, profiled, measured)] == ["roofline", "profiled", "measured"]
    assert [is_measuring(clock) for clock in (roofline, profiled, measured)] == [False, False, True]


def test_the_reference_image_is_cut_into_twelve_crops():
    from envs.latency.measured import reference_sample

    sample = reference_sample(336)
    assert sample.image is not None
    assert sample.image.size == sample.image.load().size == (4 * 336, 3 * 336)
    assert len(bytes.fromhex(sample.image.digest)) == 32
