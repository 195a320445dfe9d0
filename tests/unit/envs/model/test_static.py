"""Decoding at a fixed size gives what the growing batch gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from envs.errors import UserError
from envs.knobs import ExecutionPlan, KnobSpace
from envs.model import AdaptiveMolmoE
from envs.model.block_importance import read_importance
from envs.model.decode import DecodeBatch
from envs.model.static import Cell, StaticDecoder, plain_step

GOLDEN = Path(__file__).parents[3] / "golden"
CAPACITY = 96


@pytest.fixture(scope="module", params=("golden", "embedded"))
def subject(request, model):
    found = model if request.param == "golden" else AdaptiveMolmoE.from_pretrained("embedded")
    # No importance is stored next to the golden weights: theirs is the published one.
    return found, tuples("embedded" if request.param == "embedded" else GOLDEN)


def tuples(source):
    space = KnobSpace(read_importance(source))
    return sorted({space.plan(knobs).top_k_per_block for knobs in space.all})


def prefill(model, length, top_k, seed=0):
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    prefilled = model.language.prefill(model.embed({"input_ids": ids}), [length], [0], [top_k])
    return prefilled, int(model.language.logits(model.language.final_norm(prefilled.last)).argmax(-1))


@torch.inference_mode()
def test_equal_to_the_growing_batch_over_all_executions(subject):
    subject, executions = subject
    assert len(executions) == 65
    decoder = StaticDecoder(subject.language, CAPACITY)
    for number, top_k in enumerate(executions):
        prefilled, token = prefill(subject, 1 + 17 * number % 61, top_k, number)
        batch = DecodeBatch(subject.language, [(prefilled, [0])])
        decoder.start(prefilled, 0, token)
        for place in range(3):
            wanted = batch.step([token])[0]
            decoder.step()
            torch.testing.assert_close(decoder.cell.logits, wanted, rtol=1e-4, atol=1e-4)
            token = int(wanted.argmax())
            assert int(decoder.cell.token) == token == int(decoder.cell.ids[place])


@torch.inference_mode()
def test_greedy_ids_stop_at_the_end_of_text_and_the_limit(model):
    decoder = StaticDecoder(model.language, CAPACITY)
    for seed in range(4):
        prefilled, token = prefill(model, 20 + seed, ExecutionPlan(top_k=5).top_k_per_block, seed)
        batch, wanted, last = DecodeBatch(model.language, [(prefilled, [0])]), [], token
        for _ in range(8):
            last = int(batch.step([last]).argmax())
            wanted.append(last)
        assert decoder.decode(prefilled, 0, token, 8, stop_at_eos=False) == wanted
        for limit in (0, 1, 8):
            eos = model.config.eos_token_id
            ended = wanted[:limit].index(eos) if eos in wanted[:limit] else limit
            assert decoder.decode(prefilled, 0, token, limit) == wanted[:ended]
        # Where the end of text comes fifth, the four before it are the answer.
        before = model.config
        decoder.language.config = replace(before, eos_token_id=wanted[4])
        assert decoder.decode(prefilled, 0, token, 8) == wanted[: wanted.index(wanted[4])]
        decoder.language.config = before


@torch.inference_mode()
def test_what_does_not_fit_is_refused(model):
    decoder = StaticDecoder(model.language, 24, max_tokens=8)
    prefilled, token = prefill(model, 20, ExecutionPlan().top_k_per_block)
    for limit in (4, 9, -1):
        with pytest.raises(UserError, match="do not fit"):
            decoder.decode(prefilled, 0, token, limit)
    long, token = prefill(model, 24, ExecutionPlan().top_k_per_block)
    with pytest.raises(UserError, match="24 tokens does not fit"):
        decoder.start(long, 0, token)


@torch.inference_mode()
def test_traced_once_for_every_token_and_top_k(model):
    """One graph without breaks serves 12 tokens, and other experts per token, with no compilation after the first."""
    traced = []

    def count(graph, _):
        traced.append(graph)
        return graph.forward

    kept = ExecutionPlan(blocks=(0, 1, 2, 4, 5, 7, 8, 9, 10, 12, 13, 15)).blocks
    cell, same = Cell(model.language, CAPACITY, 16), Cell(model.language, CAPACITY, 16)
    for each in (cell, same):
        each.token.fill_(17)
    torch._dynamo.reset()
    step = torch.compile(plain_step, backend=count, fullgraph=True)
    for number in range(12):
        for each in (cell, same):
            each.top_k.fill_(4 + number % 5)
        step(model.language, cell, kept)
        plain_step(model.language, same, kept)
        assert torch.equal(cell.logits, same.logits)
    assert cell.ids.tolist() == same.ids.tolist()
    assert len(traced) == 1
