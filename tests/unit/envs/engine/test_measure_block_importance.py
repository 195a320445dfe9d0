"""Importance is what leaving one block out costs, by the plain way of computing it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from envs.data.sample import Sample
from envs.engine import RolloutEngine
from envs.engine.measure_block_importance import leave_one_out, measure_importance, reference_answer
from envs.errors import UserError
from envs.model import AdaptiveMolmoE
from envs.model.block_importance import (
    PUBLISHED_IMPORTANCE,
    importance_path,
    is_published_shape,
    rank_correlation,
    read_importance,
    removal_order,
    write_importance,
)

ORIGIN = {"task": "drawn"}


def plain_loss(model, processor, sample, plan):
    """Cross entropy of the reference answer by one complete forward pass."""
    inputs = processor(sample.image, sample.question, plan.tier, sample.style)
    answer = torch.tensor([*processor.encode(f" {reference_answer(sample)}"), processor.eos_id])
    ids = torch.cat((inputs["input_ids"], answer[None, :-1]), 1)
    logits = model({**inputs, "input_ids": ids}, plan)[0, -len(answer) :]
    return float(F.cross_entropy(logits, answer))


def test_scores_by_cross_entropy_are_the_plain_rises(engine, samples):
    some = samples[2:6]
    found = measure_importance(engine, some)
    full, *without = leave_one_out()
    for block in (1, 7, 15):
        rises = [
            plain_loss(engine.model, engine.processor, sample, without[block - 1])
            - plain_loss(engine.model, engine.processor, sample, full)
            for sample in some
        ]
        assert found.scores[block] == pytest.approx(sum(rises) / len(rises), abs=1e-4)
        assert found.errors[block] == pytest.approx(float(torch.tensor(rises).std()) / 2, abs=1e-4)
    assert found.scores[0] == max(found.scores)
    assert found.errors[0] == 0
    assert (found.samples, found.by, found.tier) == (4, "cross_entropy", "high")


def test_a_small_token_budget_gives_the_same(small_model, processor, samples):
    wide = RolloutEngine(small_model, processor, max_new_tokens=8)
    narrow = RolloutEngine(small_model, processor, max_new_tokens=8, batch_tokens=1)
    ours, theirs = (measure_importance(engine, samples[:2]).scores for engine in (wide, narrow))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_scores_by_accuracy_are_the_plain_drops(engine, samples, naive):
    full, *without = leave_one_out("low")
    answer = engine.processor.decode(naive(samples[0], full))
    asked = [Sample("right", samples[0].image, samples[0].question, (answer,), "exact_match"), samples[1]]
    found = measure_importance(engine, asked, by="accuracy", tier="low")
    kept = [naive(samples[0], plan) == naive(samples[0], full) for plan in without]
    assert found.scores[1:] == pytest.approx([0.0 if same else 0.5 for same in kept])
    assert found.full == 0.5


def test_a_block_that_does_nothing_goes_first(small_model, processor, samples):
    model = AdaptiveMolmoE(small_model.config)
    model.load_state_dict(small_model.state_dict())
    with torch.no_grad():
        idle = model.language.blocks[9]
        idle.attn_out.zero_()
        idle.down.zero_()
    engine = RolloutEngine(model.eval().requires_grad_(False), processor, max_new_tokens=8)
    found = measure_importance(engine, samples[:3])
    assert found.scores[9] == pytest.approx(0, abs=1e-6)
    assert abs(found.scores[9]) == min(map(abs, found.scores))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"by": "feeling"}, "'feeling' is not known: choose one of cross_entropy, accuracy"),
        ({"tier": "huge"}, "tier 'huge'"),
        ({"samples": slice(0, 1)}, "1 samples are too few"),
    ],
)
def test_what_cannot_be_measured_is_named(engine, samples, change, named):
    chosen = samples[change.pop("samples", slice(0, 2))]
    with pytest.raises(UserError, match=named):
        measure_importance(engine, chosen, **change)


def test_samples_need_answers(engine, samples):
    with pytest.raises(UserError, match="sample none has no accepted answer"):
        measure_importance(engine, [samples[0], Sample("none", None, "what?", ())])


def test_reference_answer_is_the_most_frequent():
    assert reference_answer(Sample("a", None, "?", ("red", "blue", "blue"))) == "blue"
    assert reference_answer(Sample("a", None, "?", ("red", "blue"))) == "red"


def test_a_file_is_written_once_and_read_back(engine, samples, tmp_path):
    found = measure_importance(engine, samples[:2])
    path = tmp_path / "scores.json"
    write_importance(path, found.to_dict(ORIGIN))
    assert read_importance("embedded", path) == pytest.approx(found.scores, abs=1e-6)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_importance(path, found.to_dict(ORIGIN))
    assert path.read_bytes() == before
    assert json.loads(before)["task"] == "drawn"
    with pytest.raises(UserError, match="cannot write"):
        write_importance(tmp_path / "no" / "folder.json", {})


def test_scores_next_to_the_weights_come_before_the_published_ones(tmp_path):
    assert read_importance(tmp_path) == PUBLISHED_IMPORTANCE
    assert read_importance("allenai/MolmoE-1B-0924") == PUBLISHED_IMPORTANCE
    scores = [float(block) for block in range(16)]
    importance_path(tmp_path).write_text(json.dumps({"importance": scores}))
    assert read_importance(tmp_path) == tuple(scores)
    with pytest.raises(UserError, match=r"no file of block importance .*none\.json.*ray-ctrl importance"):
        read_importance(tmp_path, tmp_path / "none.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"importance": [1, 2]}', '{"importance": null}'])
def test_files_that_contain_no_scores_are_named(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"bad\.json"):
        read_importance(tmp_path, path)


def test_two_sets_of_scores_compare_by_rank():
    rising = [0.0, *range(15)]
    assert rank_correlation(rising, [9.0, *(2 ** float(b) for b in range(15))]) == pytest.approx(1)
    assert rank_correlation(rising, [9.0, *(-float(b) for b in range(15))]) == pytest.approx(-1)
    assert math.isnan(rank_correlation(rising, [1.0] * 16))
    assert removal_order(PUBLISHED_IMPORTANCE)[:4] == (4, 13, 10, 2)


def test_only_the_published_shape_has_published_scores(engine):
    assert not is_published_shape(engine.model.config)
