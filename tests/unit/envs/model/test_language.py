"""Plans, masks, caches: every way of running the language part gives the same numbers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE, AdaptiveMolmoEConfig
from envs.model.decode import DecodeBatch
from envs.model.execution_tree import build_execution_tree
from recipes.embedded_model.fresh_weights import initialise

GOLDEN = Path(__file__).parents[3] / "golden"

MODEL = AdaptiveMolmoE.from_pretrained(GOLDEN)


@st.composite
def plans(draw):
    insertion = draw(st.integers(1, 5))
    rest = draw(st.sets(st.integers(insertion, 15)))
    kept = tuple(range(insertion)) + tuple(sorted(rest))
    return ExecutionPlan("high", insertion, draw(st.integers(4, 8)), kept)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    ids = torch.full((len(lengths), max(lengths)), -1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(0, 499, (length,), generator=generator)
    return {"input_ids": ids}, lengths, [draw(plans()) for _ in lengths]


def single(inputs, row, length):
    return {"input_ids": inputs["input_ids"][row : row + 1, :length]}


@settings(max_examples=12, deadline=None)
@given(batches())
def test_mixed_plans_equal_single_requests(batch):
    inputs, lengths, chosen = batch
    logits = MODEL(inputs, chosen)
    ids = MODEL.generate(inputs, chosen, max_new_tokens=4, stop_at_eos=False)
    for row, (length, plan) in enumerate(zip(lengths, chosen, strict=True)):
        alone = MODEL(single(inputs, row, length), plan)[0]
        assert torch.allclose(logits[row, :length], alone, atol=2e-4)
        assert ids[row] == MODEL.generate(single(inputs, row, length), plan, max_new_tokens=4, stop_at_eos=False)[0]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(plans(), min_size=1, max_size=8), st.integers(0, 5), st.lists(st.integers(0, 2), min_size=8, max_size=8)
)
def test_shared_prefill_equals_forward(chosen, given_blocks, prompts):
    """Rows of common prompts share beginnings, start from kept prefixes, and still end in the same state."""
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, -1], [12, -1, -1, -1]])}
    lengths, prompts = [4, 3, 1], prompts[: len(chosen)]
    language = MODEL.language
    x = MODEL.embed(inputs)
    prefix = language.run_prefix(x, lengths, given_blocks) if given_blocks else None
    top_k = [plan.top_k_per_block for plan in chosen]
    done = language.prefill(None if prefix else x, lengths, prompts, top_k, prefix=prefix)
    logits = language.logits(language.final_norm(done.last))
    for row, (prompt, plan) in enumerate(zip(prompts, chosen, strict=True)):
        alone = MODEL(single(inputs, prompt, lengths[prompt]), plan)[0, -1]
        assert torch.allclose(logits[row], alone, atol=2e-4)
    batch = DecodeBatch(language, [(done, list(range(len(chosen))))])
    cached = [sum(block is not None and row in block.members for block in batch.blocks) for row in range(len(batch))]
    assert cached == [len(plan.blocks) for plan in chosen]
    token = 17
    step = batch.step([token] * len(chosen))
    for row, (prompt, plan) in enumerate(zip(prompts, chosen, strict=True)):
        ids = torch.cat((inputs["input_ids"][prompt, : lengths[prompt]], torch.tensor([token])))
        assert torch.allclose(step[row], MODEL({"input_ids": ids[None]}, plan)[0, -1], atol=2e-4)


def test_equal_beginnings_run_once():
    """Two rows of one prompt that differ from block 3 on: one node before, two after, one where they drop a block."""
    first = (8, 8, 8, 4, 4) + (4,) * 11
    second = (8, 8, 8, 6, 0) + (6,) * 11
    levels = build_execution_tree((0, 0), (first, second))
    assert [len(level.run) + len(level.final) for level in levels[:5]] == [1, 1, 1, 2, 1]
    assert not levels[15].run
    assert len(levels[15].final) == 2


def test_the_example_in_the_docstring():
    rest = (0,) * 13
    levels = build_execution_tree((0, 0), ((8, 4, 4, *rest), (8, 0, 8, *rest)))
    assert levels[0].run == ((0, (8,)),)
    assert (levels[1].run, levels[1].skip) == (((0, (8, 4)),), ((0, (8, 0)),))
    assert levels[2].final == ((0, (8, 4, 4)), (0, (8, 0, 8)))
    given = build_execution_tree((0, 0), ((8, 4, 4, *rest), (8, 0, 8, *rest)), 1)
    assert not given[0].run
    assert given[1].enter == (0,)
    assert given[1:] != levels[1:]
    assert [level.run for level in given[1:]] == [level.run for level in levels[1:]]


def test_dropped_blocks_run_nowhere():
    plan = ExecutionPlan("high", 1, 4, (0, 2, 5, 9))
    ran = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, _o, index=index: ran.append(index))
        for index, block in enumerate(MODEL.language.blocks)
    ]
    MODEL({"input_ids": torch.tensor([[1, 2, 3]])}, plan)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 2, 5, 9]
    done = MODEL.language.prefill(
        MODEL.embed({"input_ids": torch.tensor([[1, 2, 3]])}), [3], [0], [plan.top_k_per_block]
    )
    batch = DecodeBatch(MODEL.language, [(done, [0])])
    assert [index for index, block in enumerate(batch.blocks) if block is not None] == [0, 2, 5, 9]


def prefilled(rows):
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, -1, -1], [9, 10, 11, -1]])[:rows]
    lengths = [4, 2, 3][:rows]
    kept = [tuple(range(16)), (0, 1, 2, 5, 6), (0, 3, 4)]
    top_k = [ExecutionPlan("low", 1, 4 + i, blocks).top_k_per_block for i, blocks in enumerate(kept)][:rows]
    return MODEL.language.prefill(MODEL.embed({"input_ids": ids}), lengths, range(rows), top_k)


def test_rows_leave_and_join_the_decode_batch():
    complete = DecodeBatch(MODEL.language, [(prefilled(3), [0, 1, 2])])
    moving = DecodeBatch(MODEL.language, [(prefilled(3), [2, 0])])
    late = DecodeBatch(MODEL.language, [(prefilled(3), [1])])
    for turn in range(40):  # beyond the first capacity, so that caches grow
        tokens = [20 + turn, 60 + turn, 90 + turn]
        wanted = complete.step(tokens)
        if turn < 3:
            got = moving.step([tokens[2], tokens[0]])
            assert torch.allclose(got, wanted[[2, 0]], atol=2e-4)
            assert torch.allclose(late.step([tokens[1]]), wanted[[1]], atol=2e-4)
            continue
        if turn == 3:
            moving.extend(late)
        if turn == 6:
            moving.keep([2, 1])
        order = [2, 0, 1] if turn < 6 else [1, 0]
        got = moving.step([tokens[row] for row in order])
        assert torch.allclose(got, wanted[order], atol=2e-4)


def test_causal_mask_given_equals_none():
    x = MODEL.embed({"input_ids": torch.randint(0, 499, (2, 7))})
    plan = ExecutionPlan("high", 2, 5, (0, 1, 4, 8))
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, -1, -1)
    positions = torch.arange(7).expand(2, -1)
    one = MODEL.language(x, plans=plan)
    for mask in (causal, causal[:1]):
        other = MODEL.language(x, plans=plan, attention_mask_BTT=mask, position_ids_BT=positions)
        assert torch.allclose(one, other, atol=1e-4)


def test_packed_questions_equal_separate_ones():
    """Questions after one shared beginning, each blind to the others, at the positions they would have alone."""
    start, questions = torch.tensor([5, 6, 7]), [torch.tensor([8, 9]), torch.tensor([10, 11, 12])]
    ids = torch.cat((start, *questions))[None]
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[5:, 3:5] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]])
    plan = ExecutionPlan()
    packed = MODEL.language(
        MODEL.embed({"input_ids": ids}), plans=plan, attention_mask_BTT=mask[None], position_ids_BT=positions
    )
    for question, span in zip(questions, (slice(3, 5), slice(5, 8)), strict=True):
        alone = MODEL.language(MODEL.embed({"input_ids": torch.cat((start, question))[None]}), plans=plan)
        assert torch.allclose(packed[0, span], alone[0, 3:], atol=1e-4)


def test_training_gradients_reach_every_weight(inputs):
    model = initialise(MODEL.config, seed=1)
    plan = [ExecutionPlan(), ExecutionPlan("high", 1, 4, (0, 3, 9))]
    hidden = model.language(model.embed(inputs), plans=plan, experts="dense")
    model.language.logits(hidden).square().mean().backward()
    # The encoder's last layer is never read (features come from the second last), and some words never occur.
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert all(name.startswith("vision.encoder.blocks.9.") for name in without)
    grouped = initialise(MODEL.config, seed=1).eval()
    with torch.no_grad():
        other = grouped.language(grouped.embed(inputs), plans=plan, experts="grouped")
    assert torch.allclose(hidden.detach()[:, :35], other[:, :35], atol=1e-3)


def test_autocast_keeps_the_residual_in_float32(inputs):
    model = initialise(MODEL.config)
    seen = []
    hook = model.language.blocks[3].register_forward_hook(lambda _m, _i, out: seen.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model.language(model.embed(inputs), plans=ExecutionPlan(), experts="dense").sum().backward()
    hook.remove()
    assert seen == [torch.float32]


def test_stops_at_end_of_text_and_at_the_limit(golden, model, inputs):
    complete = model.generate(inputs, ExecutionPlan(), max_new_tokens=8, stop_at_eos=False)
    changed = AdaptiveMolmoE.from_pretrained(GOLDEN)
    object.__setattr__(changed.config, "eos_token_id", complete[0][2])
    ids = changed.generate(inputs, ExecutionPlan(), max_new_tokens=8)
    assert ids[0] == complete[0][: complete[0].index(complete[0][2])]
    assert ids[1] == (
        complete[1] if complete[0][2] not in complete[1] else complete[1][: complete[1].index(complete[0][2])]
    )
    assert model.generate(inputs, ExecutionPlan(), max_new_tokens=0) == [[], []]


@pytest.mark.parametrize(
    ("ids", "match"),
    [([[1, -1, 2]], "padding"), ([[-1, -1]], "empty"), ([1, 2], "shape")],
)
def test_bad_prompts(model, ids, match):
    with pytest.raises(UserError, match=match):
        model.generate({"input_ids": torch.tensor(ids)}, ExecutionPlan())


def test_plans_must_fit_the_batch(model, inputs):
    with pytest.raises(UserError, match="3 plans for a batch of 2"):
        model(inputs, [ExecutionPlan()] * 3)


def test_image_tokens_beyond_the_prompt(model, inputs):
    with pytest.raises(UserError, match="only 20 tokens"):
        model({**inputs, "input_ids": inputs["input_ids"][:, :20]}, ExecutionPlan())


def test_padding_does_not_matter(model, inputs):
    wider = {**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 5), value=-1)}
    plan = ExecutionPlan("high", 3, 6, (0, 1, 2, 7, 15))
    assert torch.allclose(model(inputs, plan)[0, :48], model(wider, plan)[0, :48], atol=1e-4)
    assert torch.allclose(model(inputs, plan)[1, :35], model(wider, plan)[1, :35], atol=1e-4)


def test_language_feature(model):
    wanted = model.language.wte[[4, 9, 9]].mean(0)
    assert torch.allclose(model.language_feature([4, 9, 9]), wanted)


def test_padded_crops_cost_nothing_and_give_zeros(model, inputs):
    sizes = []
    hook = model.vision.encoder.register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    crops = inputs["images"].flatten(0, 1).clone()
    features = model.vision.vit_features(crops)
    hook.remove()
    padded = (crops == -1).flatten(1).any(1)
    assert sizes == [int((~padded).sum())]
    assert features[padded].abs().max() == 0
    assert model.vision.vit_features(torch.full_like(crops[:2], -1.0)).abs().max() == 0


def test_the_trainers_rule_drops_padding_alone(model, inputs):
    crops = inputs["images"].flatten(0, 1)[:2].clone()
    crops[crops == -1] = 0.5
    crops[0, 3, 7] = -1.0
    published = model.vision.vit_features(crops)
    assert published[0].abs().max() == 0
    other = AdaptiveMolmoE.from_pretrained(GOLDEN, blank_crops="trainer")
    assert other.fingerprint != model.fingerprint
    assert AdaptiveMolmoEConfig.from_dict(other.config.to_published()).blank_crops == "trainer"
    found = other.vision.vit_features(crops)
    assert found[0].abs().max() > 0
    assert torch.equal(found[1], model.vision.vit_features(crops[1:])[0])
    crops[0] = -1.0
    assert other.vision.vit_features(crops)[0].abs().max() == 0
    with pytest.raises(UserError, match=r"'both'.*published, trainer"):
        AdaptiveMolmoE.from_pretrained(GOLDEN, blank_crops="both")
