"""One request at fixed padded sizes gives what a batch gives."""

from dataclasses import replace

import pytest
import torch

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model.graphs import Graphs
from envs.model.single_row import SingleRow

PLANS = (ExecutionPlan(), ExecutionPlan("low", 2, 5, (0, 1, 2, 4, 5, 7, 8, 9, 10, 12, 13, 15)), ExecutionPlan(top_k=4))


@pytest.fixture(scope="module")
def ways(model):
    return SingleRow(model, static=True, capacity=160), SingleRow(model, static=False)


def prompt(model, length, seed):
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    return model.embed({"input_ids": ids})


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("length", [1, 40, 64, 100])
def test_prefill_and_answer_are_those_of_a_batch(model, ways, plan, length):
    static, usual = ways
    x = prompt(model, length, length)
    for depth in (0, plan.insertion, 5):
        prefixes = [way.run_prefix(x, depth) if depth else None for way in ways]
        found, wanted = (
            way.prefill(x, plan.top_k_per_block, prefix) for way, prefix in zip(ways, prefixes, strict=True)
        )
        close(found.last, wanted.last)
        if depth:
            close(torch.stack(prefixes[0].hidden), torch.stack(prefixes[1].hidden))
        for limit in (1, 6):
            assert static.decode(found, limit) == usual.decode(wanted, limit)
            assert static.decode(found, limit, stop_at_eos=False) == usual.decode(wanted, limit, stop_at_eos=False)


@torch.inference_mode()
def test_what_is_left_of_an_earlier_longer_prompt_does_not_count(model, ways):
    static, usual = ways
    top_k = PLANS[0].top_k_per_block
    static.prefill(prompt(model, 128, 1) * 1e6, top_k)
    x = prompt(model, 70, 2)
    close(static.prefill(x, top_k).last, usual.prefill(x, top_k).last)


@torch.inference_mode()
def test_the_end_of_text_ends_the_answer(model, ways):
    x, top_k = prompt(model, 30, 7), PLANS[0].top_k_per_block
    prefilled = [way.prefill(x, top_k) for way in ways]
    ids, ended = ways[1].decode(prefilled[1], 6, stop_at_eos=False)
    assert not ended
    before = model.config
    try:
        for place in range(6):
            model.config = model.language.config = replace(before, eos_token_id=ids[place])
            wanted = ids[: ids.index(ids[place])], True
            assert [way.decode(start, 6) for way, start in zip(ways, prefilled, strict=True)] == [wanted] * 2
    finally:
        model.config = model.language.config = before


@torch.inference_mode()
@pytest.mark.parametrize("views", [1, 3])
def test_images_are_encoded_alike_blank_crops_too(model, ways, views):
    config = model.config.vision
    generator = torch.Generator().manual_seed(views)
    images = torch.rand(1, views, config.patches, config.pixels, generator=generator)
    masks = torch.rand(1, views, config.patches, generator=generator).round(decimals=1).clamp(max=0.6) / 0.6
    images[0, -1, 0, 0] = -1.0
    close(ways[0].encode_images(images, masks), model.vision(images, masks))


@torch.inference_mode()
def test_longer_requests_go_the_other_way(model, ways):
    x, top_k = prompt(model, 170, 3), PLANS[1].top_k_per_block
    found, wanted = (way.prefill(x, top_k, way.run_prefix(x, 2)) for way in ways)
    assert torch.equal(found.last, wanted.last)
    assert ways[0].decode(found, 3) == ways[1].decode(wanted, 3)
    with pytest.raises(UserError, match="does not fit a cache"):
        ways[0].decoder.start(wanted, 0, 1)


@torch.inference_mode()
def test_batches_of_one_answer_as_rows_of_many(model):
    ids = torch.randint(0, model.config.vocab_size, (2, 25), generator=torch.Generator().manual_seed(4))
    together = model.generate({"input_ids": ids}, PLANS[1], 5)
    assert [model.generate({"input_ids": row[None]}, PLANS[1], 5)[0] for row in ids] == together
    held = model.single_row
    assert model.single_row is held
    assert not held.static


def test_sizes_are_rounded_up_and_the_rest_is_zero():
    seen = []
    graphs = Graphs(lambda key, x: (seen.append((key, x.clone())), (x * 2,))[1], (torch.full((10,), 9.0),),
                    (torch.zeros(10),), step=4, most=0)  # fmt: skip
    assert graphs("a", torch.ones(3))[0].tolist() == [2.0, 2.0, 2.0]
    assert graphs("b", torch.ones(9))[0].tolist() == [2.0] * 9
    assert [(key, x.tolist()) for key, x in seen] == [("a", [1.0, 1.0, 1.0, 0.0]), ("b", [1.0] * 9 + [0.0])]
