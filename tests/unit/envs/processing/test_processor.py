"""Small geometries, text-only requests, batches and errors."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from envs.errors import UserError
from envs.processing import image_processor
from envs.processing.image_processor import (
    AdaptiveMolmoEImageProcessor,
    ImageGeometry,
    image_token_count,
    make_layout,
    select_tiling,
)
from envs.processing.processor import MolmoEProcessor, collate

SMALL = {
    "base_image_input_size": [56, 56],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "image_patch_size": 7,
    "image_token_length_h": 4,
    "image_token_length_w": 4,
    "overlap_margins": [2, 2],
}


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "processor"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[
            "<|endoftext|>",
            "<|padding|>",
            "<im_start>",
            "<im_end>",
            "<im_patch>",
            "<im_col>",
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=300,
        show_progress=False,
    )
    tokenizer.train_from_iterator([" User: what is it? Assistant: seven"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(SMALL))
    return folder


@pytest.fixture
def small(small_folder: Path) -> MolmoEProcessor:
    return MolmoEProcessor.from_pretrained(small_folder)


GEOMETRIES = [
    SMALL,
    {**SMALL, "overlap_margins": [0, 0]},
    {**SMALL, "overlap_margins": [2, 0]},
    {
        **SMALL,
        "base_image_input_size": [84, 84],
        "image_patch_size": 14,
        "image_token_length_h": 3,
        "image_token_length_w": 3,
    },
]


@pytest.mark.parametrize("config", GEOMETRIES)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 700), height=st.integers(1, 700), crops=st.sampled_from([1, 3, 6, 12]))
def test_every_patch_token_is_fed_exactly_once(config: dict[str, Any], width: int, height: int, crops: int) -> None:
    geometry = ImageGeometry.from_config(config)
    tiling = select_tiling(geometry, (width, height), crops)
    layout = make_layout(geometry, tiling, (10, 11, 12, 13))
    fed = layout.input_idx[layout.input_idx >= 0]

    assert tiling[0] * tiling[1] <= crops
    assert sorted(fed) == np.flatnonzero(layout.ids == 12).tolist()
    assert len(layout.ids) == image_token_count(geometry, tiling)
    assert layout.input_idx.shape == (1 + tiling[0] * tiling[1], geometry.tokens_per_crop)


@pytest.mark.parametrize("config", GEOMETRIES)
def test_tokens_stand_where_their_pixels_are(config: dict[str, Any]) -> None:
    """Paint each pooled cell of the joint view with its own value and find it again through
    `image_input_idx`.
    """
    geometry = ImageGeometry.from_config({**config, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]})
    tiling = (2, 3)
    rows, columns = ((n * geometry.window + sum(geometry.margins)) // geometry.pool for n in tiling)
    cell = geometry.patch * geometry.pool
    values = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns).repeat(cell, 0).repeat(cell, 1)
    images, masks = AdaptiveMolmoEImageProcessor(**geometry.to_config()).patches(
        Image.fromarray(values).convert("RGB"), tiling
    )
    n, pool = geometry.patches, geometry.pool
    seen = images[1:].mean(-1).view(-1, n // pool, pool, n // pool, pool).mean((2, 4)).flatten(1) * 255
    layout = make_layout(geometry, tiling, (10, 11, 12, 13))
    index = torch.from_numpy(layout.input_idx[1:])
    start = geometry.tokens[0] * (geometry.tokens[1] + 1) + 2
    position = index[index >= 0] - start - 1
    joint = position // (columns + 1) * columns + position % (columns + 1)

    torch.testing.assert_close(seen[index >= 0], joint.float(), atol=1e-3, rtol=0)
    assert torch.equal(masks[:-1], torch.ones_like(masks[:-1]))


def test_tiling_is_the_same_at_two_tiers_for_a_small_image(small: MolmoEProcessor) -> None:
    assert small.tiling((40, 40), "low") == small.tiling((40, 40), "high") == (1, 1)
    assert small.tiling((168, 168), "high") != small.tiling((168, 168), "low")


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (28, 28), (28, 500)])
def test_extreme_sizes_make_complete_inputs(small: MolmoEProcessor, size: tuple[int, int]) -> None:
    for tier in ("low", "medium", "high"):
        inputs = small(Image.new("RGB", size, "red"), "what?", tier)
        assert torch.isfinite(inputs["images"]).all()
        assert small.shape(size, tier, "what?").prompt_tokens == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("size", [(200, 150), (56, 56), (113, 56), (30, 7), (1, 900), (900, 1)])
@pytest.mark.parametrize("crops", [3, 12])
def test_a_large_image_is_resized_in_strips_bit_for_bit(
    size: tuple[int, int], crops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    processor = AdaptiveMolmoEImageProcessor(max_crops=crops, **SMALL)
    plain = processor.preprocess(image)
    monkeypatch.setattr(image_processor, "STRIPS_ABOVE", 0)
    for pixels in (1, 700):
        monkeypatch.setattr(image_processor, "STRIP_PIXELS", pixels)
        strips = processor.preprocess(image)
        assert torch.equal(strips["images"], plain["images"])
        assert torch.equal(strips["image_masks"], plain["image_masks"])


def test_text_only(small: MolmoEProcessor) -> None:
    inputs = small(None, "what is it?")
    assert set(inputs) == {"input_ids"}
    assert small.shape(None, "low", "what is it?") == (0, 0, inputs["input_ids"].shape[1])


def test_control_tokens_in_a_question_stay_text(small: MolmoEProcessor) -> None:
    assert small.tokenizer("<im_patch>").input_ids == [small.special_ids[2]]  # transformers' wrapper decides for itself
    ids = small.prompt_ids("<im_patch><|endoftext|><im_start>")
    assert not {small.eos_id, *small.special_ids} & set(ids)
    assert "<im_patch>" in small.tokenizer.decode(ids)


def test_decode_stops_at_end_of_text(small: MolmoEProcessor) -> None:
    seven = small.encode(" seven")
    assert small.decode([*seven, small.eos_id, *seven, -1]) == "seven"
    assert small.decode([]) == ""


def test_collate_pads_on_the_right(small: MolmoEProcessor) -> None:
    one = small(Image.new("RGB", (168, 168)), "what is it?", "high")
    two = small(Image.new("RGB", (40, 40)), "what is it? what is it?", "low")
    three = small(None, "what?")
    batch = collate([one, two, three])
    assert batch["images"].shape[:2] == (3, one["images"].shape[1])
    for row, request in enumerate((one, two, three)):
        for key, value in request.items():
            assert torch.equal(batch[key][row, : value.shape[1]], value[0])
            assert (batch[key][row, value.shape[1] :] == -1).all()
    assert (batch["images"][2] == -1).all()
    assert set(collate([three, three])) == {"input_ids"}


def test_pickles(small: MolmoEProcessor) -> None:
    again = pickle.loads(pickle.dumps(small))
    image = Image.effect_noise((90, 50), 80)
    assert all(torch.equal(a, b) for a, b in zip(small(image, "x").values(), again(image, "x").values(), strict=True))
    assert again.prompt_ids("<im_col> hi") == small.prompt_ids("<im_col> hi")


def test_inputs_do_not_share_memory_between_calls(small: MolmoEProcessor) -> None:
    image = Image.new("RGB", (90, 50))
    first = small(image, "x")
    first["image_input_idx"].zero_()
    first["input_ids"].zero_()
    assert (small(image, "x")["image_input_idx"] != 0).any()
    assert small(image, "x")["input_ids"][0, 0] == small.eos_id


def test_a_model_without_styles_is_asked_plainly(small_folder: Path) -> None:
    config = small_folder / "preprocessor_config.json"
    config.write_text(json.dumps({**SMALL, "prompt_styles": False}))
    plain = MolmoEProcessor.from_pretrained(small_folder)
    assert plain.prompt_ids("what?", "vqa2") == plain.prompt_ids("what?")
    assert pickle.loads(pickle.dumps(plain)).prompt_ids("what?", "vqa2") == plain.prompt_ids("what?")
    config.write_text(json.dumps(SMALL))
    styled = MolmoEProcessor.from_pretrained(small_folder)
    assert styled.decode(styled.prompt_ids("what?", "vqa2")) == "User: vqa2: what? Assistant:"
    config.write_text(json.dumps({**SMALL, "prompt_styles": "no"}))
    with pytest.raises(UserError, match="prompt_styles is 'no'"):
        MolmoEProcessor.from_pretrained(small_folder)


def test_special_tokens_may_be_objects(small_folder: Path) -> None:
    path = small_folder / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": {"content": "<|padding|>", "__type": "AddedToken"}}))
    assert MolmoEProcessor.from_pretrained(small_folder).eos_id == 1


def test_unknown_tier(small: MolmoEProcessor) -> None:
    with pytest.raises(UserError, match="tier 'huge' is not allowed: choose one of low, medium, high"):
        small(Image.new("RGB", (9, 9)), "x", tier="huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_image_input_size": [56, 48]}, "base_image_input_size is .*square"),
        ({"base_image_input_size": None}, "base_image_input_size is None"),
        ({"image_patch_size": 9}, "do not divide into patches of 9"),
        ({"image_patch_size": 0}, "do not divide into patches of 0"),
        ({"image_token_length_h": 3}, r"do not pool into \[3, 4\] \(image_token_length_h"),
        ({"overlap_margins": [1, 1]}, r"overlap_margins \[1, 1\]"),
        ({"overlap_margins": [4, 4]}, r"overlap_margins \[4, 4\]"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"image_mean": "no"}, "image_mean is 'no'"),
    ],
)
def test_a_wrong_config_names_key_and_value(small_folder: Path, change: dict[str, Any], message: str) -> None:
    (small_folder / "preprocessor_config.json").write_text(json.dumps({**SMALL, **change}))
    with pytest.raises(UserError, match=message):
        MolmoEProcessor.from_pretrained(small_folder)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_broken_file_is_named(small_folder: Path, name: str, content: str | None) -> None:
    if content is None:
        (small_folder / name).unlink()
    else:
        (small_folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        MolmoEProcessor.from_pretrained(small_folder)


def test_a_tokenizer_without_image_tokens_is_refused(small_folder: Path) -> None:
    path = small_folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<im_col>", "<im_cow>"))
    with pytest.raises(UserError, match="no token '<im_col>'"):
        MolmoEProcessor.from_pretrained(small_folder)


@pytest.mark.parametrize("name", ["no/such/folder", "nothing", "../nothing"])
def test_no_such_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no model folder "):
        MolmoEProcessor.from_pretrained(name)
