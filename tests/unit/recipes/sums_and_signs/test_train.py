"""The recipe end to end at toy size: all phases, interruption, the folder it leaves."""

import dataclasses
import math
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE
from envs.processing import MolmoEProcessor
from recipes.embedded_model.fresh_weights import initialise
from recipes.embedded_model.loop import LoopSettings
from recipes.embedded_model.shape import build_config
from recipes.sums_and_signs.language import PLANS, freeze, language_loss
from recipes.sums_and_signs.language_files import HIGHEST_WORTH, build_processor, build_tokenizer, train_tokenizer
from recipes.sums_and_signs.packing import FAMILY_NAMES, IGNORE, PackedPictures, PackingSettings, pack
from recipes.sums_and_signs.pictures import NOTATIONS, draw_picture, make_picture
from recipes.sums_and_signs.questions import all_questions, caption
from recipes.sums_and_signs.train import Recipe, train
from recipes.sums_and_signs.vision import READOUTS, Crops

PACKING = PackingSettings(images=(2, 1, 1), tiers=(1.0, 0.0, 0.0), text_tokens=60)
TINY = Recipe(
    vision_steps=2, vision_batch=2, language_steps=2, wide_steps=2, packing=PACKING, narrow_hidden=16, hidden=32
)


def settings(folder: Path, seconds: float = math.inf) -> LoopSettings:
    return LoopSettings(folder, torch.device("cpu"), deadline=time.monotonic() + seconds, workers=0)


def test_the_recipe_leaves_a_model_that_answers(tmp_path: Path) -> None:
    assert train(TINY, settings(tmp_path))
    model = AdaptiveMolmoE.from_pretrained(tmp_path / "model")
    processor = MolmoEProcessor.from_pretrained(tmp_path / "model")
    assert model.config.expert_hidden == TINY.hidden
    image = Image.fromarray(draw_picture(make_picture("test", 0)))
    answer = model.generate(processor(image, "How much is red?", "low"), ExecutionPlan(), max_new_tokens=2)
    assert len(answer) == 1
    phases = {line.split('"')[3] for line in (tmp_path / "log.jsonl").read_text().splitlines()}
    assert phases == {"vision", "language", "wide"}


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    complete, parts = tmp_path / "complete", tmp_path / "parts"
    for folder in (complete, parts):
        folder.mkdir()
    train(TINY, settings(complete))
    runs = 0
    while not train(TINY, settings(parts, seconds=0)):  # out of time after every step
        runs += 1
    assert runs == 3
    a, b = (torch.load(f / "wide.pt", weights_only=True)["modules"] for f in (complete, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_goes_on_from_the_checkpoint_of_its_last_phase_alone(tmp_path: Path) -> None:
    complete, moved = tmp_path / "complete", tmp_path / "moved"
    for folder in (complete, moved):
        folder.mkdir()
    train(TINY, settings(complete))
    (moved / "vision.pt").write_bytes((complete / "vision.pt").read_bytes())
    train(TINY, settings(moved))
    a, b = (torch.load(f / "wide.pt", weights_only=True)["modules"] for f in (complete, moved))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "vision.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"vision\.pt"):
        train(TINY, settings(tmp_path))


def test_tower_and_routers_do_not_learn() -> None:
    model = freeze(initialise(build_config(build_tokenizer().get_vocab_size(), 16), 0))
    for batch in (PackedPictures(1, 0, dataclasses.replace(PACKING, signs_share=share))[0] for share in (0.0, 1.0)):
        language_loss(model, batch)[0].backward()
    fixed = {name for name, p in model.named_parameters() if p.grad is None}
    assert fixed == {name for name, _ in model.named_parameters() if "vision." in name or name.endswith("router")}


def test_what_signs_are_worth_is_learned_behind_the_smallest_top_k() -> None:
    """With signs the four best experts of a token are constants: under four experts their weights get no gradient."""
    model = freeze(initialise(build_config(build_tokenizer().get_vocab_size(), 16), 0))
    few = PLANS["few_experts"]
    for share, learns in ((1.0, False), (0.0, True)):
        model.zero_grad(set_to_none=True)
        batch = PackedPictures(1, 0, dataclasses.replace(PACKING, signs_share=share))[0]
        language_loss(model, batch, few)[0].backward()
        # Block 0 runs with all eight experts in every plan.
        grads = [p.grad for name, p in model.named_parameters() if name.endswith("down") and "blocks.0." not in name]
        assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in grads) == learns


def test_a_packed_question_is_answered_as_if_it_stood_alone() -> None:
    """Packing must not change what is computed: logits equal those of the plain prompt."""
    processor = build_processor()
    model = initialise(build_config(len(processor.tokenizer), 16), 0).eval()
    picture = make_picture("corpus", 11, "landscape", "sums")
    questions = all_questions(picture)[-3:]
    batch = pack(processor, [picture], [questions], "low", 60, signs=False)
    with torch.no_grad():
        hidden = model.language(
            model.embed(batch.inputs),
            plans=ExecutionPlan(),
            position_ids_BT=batch.position_ids,
            attention_mask_BTT=batch.attention_mask,
            experts="dense",
        )
        packed = model.language.logits(hidden)[0]
        starts = [i for i in range(packed.shape[0]) if batch.families[0, i] >= 0]
        for place, question in zip(starts, questions, strict=True):
            alone = model(processor(Image.fromarray(draw_picture(picture)), question.text, "low"), ExecutionPlan())
            assert torch.allclose(packed[place], alone[0, -1], atol=1e-3)
            assert processor.decode([int(batch.labels[0, place])]) == question.answer
            assert FAMILY_NAMES[int(batch.families[0, place])] == question.family
            assert int(batch.things[0, place]) == question.things
    assert int((batch.labels != IGNORE).sum()) == 2 * len(questions)


def test_batches_are_functions_of_seed_and_step() -> None:
    a, b = (Crops(5, 3, 0)[2] for _ in range(2))
    assert torch.equal(a.crops, b.crops)
    assert not torch.equal(a.crops, Crops(5, 3, 1)[2].crops)
    packed = [PackedPictures(5, seed, PACKING)[3].inputs["images"] for seed in (0, 0, 1)]
    assert torch.equal(packed[0], packed[1])
    assert not torch.equal(packed[0], packed[2])


def test_labels_of_crops_stand_where_the_things_are() -> None:
    batch = Crops(1, 64, 0)[0]
    kinds, colors, digits, cores = batch.labels
    on_thing = kinds > 0
    assert len(batch.labels) == len(READOUTS)
    assert torch.equal(colors >= 0, on_thing)
    assert torch.equal(digits >= 0, kinds == 1)
    assert torch.equal(cores >= 0, kinds > 1)
    # Things are brighter than the background: so are the tokens that carry labels.
    brightness = batch.crops.mean(-1).view(64, 4, 2, 4, 2).mean((2, 4)).view(64, 16)
    assert brightness[on_thing].mean() > brightness[~on_thing].mean() + 0.5


def test_words_of_the_pictures_are_single_tokens() -> None:
    assert train_tokenizer().to_str() == build_tokenizer().to_str()
    processor = build_processor()
    assert all(len(processor.encode(f" {number}")) == 1 for number in range(HIGHEST_WORTH + 1))
    for notation in NOTATIONS:
        picture = make_picture("corpus", 5, notation=notation)
        for question in [*all_questions(picture), caption(picture)]:
            answer = question.answer.split()
            assert len(processor.encode(f" {question.answer}")) <= len(answer) + (question.family == "total")
