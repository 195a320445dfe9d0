"""Parity with an independent implementation of the published model, float32 on CPU."""

import pytest
import torch

from envs.knobs import ExecutionPlan

TOLERANCE = 1e-3
KERNELS = ("dense", "grouped", "auto")


@pytest.fixture(params=KERNELS)
def kernel(request, model):
    before = model.experts
    model.experts = request.param
    yield request.param
    model.experts = before


def close(got, wanted):
    return (got - wanted).abs().max().item() < TOLERANCE


def valid(golden, row):
    return slice(0, int(golden["inputs.lengths"][row]))


def block_states(model, inputs, plan):
    """Hidden states after embedding and each kept block, as the golden data lists them (last one after the norm)."""
    states, hooks = [], []
    for block in model.language.blocks:
        hooks.append(block.register_forward_hook(lambda _m, _i, out: states.append(out[0])))
    try:
        x = model.embed(inputs)
        hidden = model.language(x, plans=plan)
    finally:
        for hook in hooks:
            hook.remove()
    return [x, *states[:-1], hidden]


def test_vision_features(model, inputs, golden):
    crops = inputs["images"]
    features = model.vision.vit_features(crops.flatten(0, 1)).view_as(golden["full.vit_features"])
    assert close(features, golden["full.vit_features"])
    assert close(model.vision(crops, inputs["image_masks"]), golden["full.image_features"])


def test_hidden_states_and_router(model, inputs, golden):
    states = block_states(model, inputs, ExecutionPlan())
    assert len(states) == 17
    for depth, state in enumerate(states):
        for row in range(2):
            span = valid(golden, row)
            assert close(state[row, span], golden["full.hidden_states"][depth, row, span]), depth


def test_logits(model, inputs, golden, kernel):
    logits = model(inputs, ExecutionPlan())
    for row in range(2):
        assert close(logits[row, valid(golden, row)], golden["full.logits"][row, valid(golden, row)])


def test_greedy(model, inputs, golden, kernel):
    ids = model.generate(inputs, ExecutionPlan(), max_new_tokens=8, stop_at_eos=False)
    assert ids == golden["full.gen_ids"].tolist()


@pytest.mark.parametrize("index", range(8))
def test_variants(model, inputs, golden, variants, kernel, index):
    plan = variants[index]
    states = block_states(model, inputs, plan)
    wanted = golden[f"knob.{index}.hidden_last"]
    assert len(states) == len(wanted) == len(plan.blocks) + 1
    logits = model(inputs, plan)
    for row in range(2):
        last = int(golden["inputs.lengths"][row]) - 1
        assert close(logits[row, last], golden[f"knob.{index}.last_logits"][row])
        assert close(states[-1][row, : last + 1], golden[f"knob.{index}.final_hidden"][row, : last + 1])
        for state, expected in zip(states, wanted, strict=True):
            assert close(state[row, last], expected[row])
    ids = model.generate(inputs, plan, max_new_tokens=8, stop_at_eos=False)
    assert ids == golden[f"knob.{index}.gen_ids"].tolist()


def test_all_variants_in_one_batch(model, inputs, golden, variants, kernel):
    plans = [plan for plan in variants for _ in range(2)]
    batch = {name: torch.cat([tensor] * len(variants)) for name, tensor in inputs.items()}
    logits = model(batch, plans)
    ids = model.generate(batch, plans, max_new_tokens=8, stop_at_eos=False)
    for index in range(len(variants)):
        for row in range(2):
            last = int(golden["inputs.lengths"][row]) - 1
            assert close(logits[2 * index + row, last], golden[f"knob.{index}.last_logits"][row])
            assert ids[2 * index + row] == golden[f"knob.{index}.gen_ids"][row].tolist()


def test_probe(model, inputs, golden, kernel):
    assert close(model.probe(inputs, golden["probe.e"]), golden["probe.hidden"])


def test_probe_changes_nothing(model, inputs, golden):
    before = model(inputs, ExecutionPlan())
    model.probe(inputs, golden["probe.e"])
    assert torch.equal(before, model(inputs, ExecutionPlan()))


def test_text_only(model, golden, kernel):
    inputs = {"input_ids": golden["inputs.text_only_input_ids"]}
    assert close(model(inputs, ExecutionPlan())[:, -1], golden["text.last_logits"])
    ids = model.generate(inputs, ExecutionPlan(), max_new_tokens=8, stop_at_eos=False)
    assert ids == golden["text.gen_ids"].tolist()
