"""The weights that are shipped: they fit, load, and answer far above chance."""

import json

import pytest
import torch

from envs.data.scenes import load_scenes
from envs.embedded import folder
from envs.knobs import ExecutionPlan, KnobSpace
from envs.model import AdaptiveMolmoE
from envs.model.block_importance import read_importance
from envs.processing import MolmoEProcessor
from envs.processing.processor import collate
from recipes.embedded_model.shape import build_config, build_processor


@pytest.fixture(scope="module")
def model() -> AdaptiveMolmoE:
    return AdaptiveMolmoE.from_pretrained("embedded")


@pytest.fixture(scope="module")
def processor() -> MolmoEProcessor:
    return MolmoEProcessor.from_pretrained("embedded")


def test_weights_are_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in folder().iterdir()}
    assert files["model.safetensors"] <= 16 * 2**20
    assert {"config.json", "tokenizer.json", "preprocessor_config.json", "importance.json"} <= set(files)


def test_the_folder_is_what_the_recipe_describes(processor: MolmoEProcessor, model: AdaptiveMolmoE) -> None:
    built = build_processor()
    assert processor.geometry == built.geometry
    for text in (" What shape is red?", " Which digit is larger, blue or pink?", " an unseen sentence, 東京"):
        assert processor.encode(text) == built.encode(text)
    assert model.config == build_config(len(built.tokenizer))


def test_importance_ranks_sixteen_blocks() -> None:
    scores = read_importance("embedded")
    assert len(scores) == 16
    assert scores[0] == max(scores)
    assert json.loads((folder() / "importance.json").read_text())["metric"]
    space = KnobSpace(scores)
    assert len(space.plan(space.cheapest).blocks) == 12


@pytest.mark.parametrize(("family", "at_least"), [("shape", 0.75), ("digit", 0.5), ("count", 0.5)])
def test_it_answers_above_chance(
    model: AdaptiveMolmoE, processor: MolmoEProcessor, family: str, at_least: float
) -> None:
    samples = [sample for sample in load_scenes("test") if sample.family == family][:24]
    batch = collate([processor(sample.image, sample.question, "high") for sample in samples])
    answers = model.generate(batch, ExecutionPlan(), max_new_tokens=3)
    right = [processor.decode(ids) == sample.answers[0] for ids, sample in zip(answers, samples, strict=True)]
    assert sum(right) / len(right) >= at_least


def test_corners_want_more_experts_than_the_smallest_top_k(model: AdaptiveMolmoE, processor: MolmoEProcessor) -> None:
    samples = [sample for sample in load_scenes("validation") if sample.family == "corners"][:40]
    batch = collate([processor(sample.image, sample.question, "low") for sample in samples])
    right = {}
    for top_k in (4, 8):
        answers = model.generate(batch, ExecutionPlan("low", 1, top_k), max_new_tokens=4)
        pairs = zip(answers, samples, strict=True)
        right[top_k] = sum(processor.decode(ids) == sample.answers[0] for ids, sample in pairs) / len(samples)
    assert right[8] >= right[4] + 0.15


def test_answers_of_the_scenes_are_one_token_but_for_larger_numbers(processor: MolmoEProcessor) -> None:
    answers = {sample.answers[0] for sample in load_scenes("validation")}
    long = {answer for answer in answers if len(processor.encode(f" {answer}")) > 1}
    assert long == {answer for answer in answers if answer.isdecimal() and int(answer) > 9}
    assert max(len(processor.encode(f" {answer}")) for answer in long) == 2


def test_weights_are_finite(model: AdaptiveMolmoE) -> None:
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
