"""Scenes, their questions and their splits."""

import pickle
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from envs.data import load_task
from envs.data.scenes import FAMILIES, all_questions, caption, fresh_scenes, load_scenes, make_scene
from envs.data.scenes.draw import draw_scene
from envs.data.scenes.layout import COLORS, DIGIT_BLOCKS, STREAMS, handwriting
from envs.data.scenes.questions import CORNERS
from envs.data.scenes.splits import SPLITS, SceneImage
from envs.errors import UserError
from envs.processing.image_processor import select_tiling
from recipes.embedded_model.shape import GEOMETRY


def test_a_scene_is_a_function_of_stream_and_seed() -> None:
    assert make_scene("test", 3) == make_scene("test", 3)
    assert make_scene("test", 3) != make_scene("test", 4)
    assert make_scene("test", 3) != make_scene("validation", 3)
    assert np.array_equal(draw_scene(make_scene("train", 5)), draw_scene(make_scene("train", 5)))


@pytest.mark.parametrize("stream", STREAMS)
def test_handwriting_stays_in_its_block(stream: str) -> None:
    start, stop = DIGIT_BLOCKS[stream]
    values = handwriting()[1]
    for seed in range(200):
        for digit in make_scene(stream, seed).digits:
            assert digit.digit is not None
            assert start <= digit.digit < stop
            assert values[digit.digit] == digit.value


@pytest.mark.parametrize(("one", "other"), list(combinations(STREAMS, 2)))
def test_no_two_streams_share_handwriting(one: str, other: str) -> None:
    a, b = DIGIT_BLOCKS[one], DIGIT_BLOCKS[other]
    assert a[1] <= b[0] or b[1] <= a[0]


def test_objects_are_inside_and_apart() -> None:
    for seed in range(300):
        scene = make_scene("corpus", seed)
        for index, item in enumerate(scene.objects):
            assert 0 < item.x < scene.width
            assert 0 < item.y < scene.height
            for other in scene.objects[index + 1 :]:
                assert max(abs(item.x - other.x), abs(item.y - other.y)) > 0.4 * (item.size + other.size)


def test_colors_tell_digits_apart() -> None:
    for seed in range(300):
        scene = make_scene("corpus", seed)
        for group in (scene.digits, scene.shapes):
            colors = [item.color for item in group]
            assert len(colors) == len(set(colors))


def test_objects_show_in_their_color() -> None:
    scene = next(s for s in (make_scene("test", i) for i in range(100)) if any(o.kind == "square" for o in s.objects))
    square = next(o for o in scene.objects if o.kind == "square")
    pixel = draw_scene(scene)[int(square.y), int(square.x)].astype(int)
    assert np.abs(pixel - np.array(square.rgb)).max() <= 3
    nearest = min(COLORS, key=lambda name: int(np.abs(pixel - np.array(COLORS[name])).sum()))
    assert nearest == square.color


def test_answers_are_true_of_the_scene() -> None:
    for seed in range(200):
        scene = make_scene("train", seed)
        digits = {o.color: o for o in scene.digits}
        shapes = {o.color: o for o in scene.shapes}
        for question in all_questions(scene):
            words = question.text.rstrip("?").replace(",", "").split()
            match question.family:
                case "color":
                    assert shapes[question.answer].kind == words[-1]
                    assert sum(o.kind == words[-1] for o in scene.shapes) == 1
                case "shape":
                    assert shapes[words[-1]].kind == question.answer
                case "count":
                    kind = {"crosses": "cross"}.get(words[2], words[2].removesuffix("s"))
                    counted = {"shape": len(scene.shapes), "digit": len(scene.digits)}
                    expected = counted.get(kind, sum(o.kind == kind for o in scene.shapes))
                    assert int(question.answer) == expected
                case "sum":
                    kinds = [{"crosses": "cross"}.get(word, word.removesuffix("s")) for word in (words[2], words[4])]
                    wanted = len(scene.objects) if "digit" in kinds else sum(o.kind in kinds for o in scene.shapes)
                    assert int(question.answer) == wanted > 0
                case "corners":
                    kinds = [{"crosses": "cross"}.get(word, word.removesuffix("s")) for word in words[4:7:2]]
                    kinds = list(CORNERS) if words[3] == "are" else kinds
                    counted = {"triangle": 3, "square": 4, "cross": 12}
                    assert int(question.answer) == sum(counted.get(o.kind, 0) for o in scene.shapes if o.kind in kinds)
                case "digit":
                    assert digits[words[-1]].value == int(question.answer)
                case "compare":
                    values = {words[-3]: digits[words[-3]].value, words[-1]: digits[words[-1]].value}
                    assert question.answer == max(values, key=lambda name: values[name] or 0)
                case "match":
                    lone = [o for o in scene.shapes if o.kind == words[-1]]
                    assert len(lone) == 1
                    assert digits[lone[0].color].value == int(question.answer)
                case other:
                    pytest.fail(f"unknown family {other}")


def test_no_question_has_two_answers() -> None:
    for seed in range(300):
        answers: dict[str, str] = {}
        for question in all_questions(make_scene("test", seed)):
            assert answers.setdefault(question.text, question.answer) == question.answer


def test_caption_names_every_object() -> None:
    scene = make_scene("corpus", 1)
    words = caption(scene).answer.split()
    assert len(words) == 3 * len(COLORS)
    for item in scene.digits:
        assert words[words.index(item.color) + 1] == str(item.value)
    for item in scene.shapes:
        assert words[words.index(item.color) + 2] == item.kind


@pytest.mark.parametrize("split", ["validation", "test"])
def test_splits_are_fixed_and_their_ids_unique(split: str) -> None:
    samples = load_scenes(split)
    assert len(samples) == SPLITS[split].scenes * SPLITS[split].questions == 2000
    assert len({s.id for s in samples}) == 2000
    assert all(len(s.answers) == 10 and s.metric == "vqa" for s in samples)
    load_scenes.cache_clear()
    assert load_scenes(split) == samples
    shares = Counter(s.family for s in samples)
    assert set(shares) == set(FAMILIES)
    assert min(shares.values()) >= 0.02 * len(samples)


def test_training_split_is_large_enough() -> None:
    assert SPLITS["train"].scenes * SPLITS["train"].questions >= 20_000


def test_most_scenes_have_three_tilings_and_some_do_not() -> None:
    counts = Counter(
        len({select_tiling(GEOMETRY, s.image.size, crops) for crops in (3, 6, 12)})
        for s in load_scenes("test")
        if s.image is not None
    )
    assert counts[3] > 0.7 * sum(counts.values())
    assert counts[1] > 0
    assert counts[2] > 0


def test_an_image_is_a_name_until_it_is_loaded() -> None:
    image = SceneImage("test", 7)
    digest = image.digest
    copy = pickle.loads(pickle.dumps(image))
    assert copy == image
    assert copy.digest == digest
    assert image.load().size == image.size
    assert image.load().mode == "RGB"
    assert len(pickle.dumps(image)) < 200


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(UserError, match=r"'dev'.*train, validation, test"):
        load_scenes("dev")


def test_fresh_scenes_are_new_and_keep_to_the_handwriting_of_the_test_split() -> None:
    fresh = fresh_scenes(7, 41)
    assert len(fresh) == len({sample.id for sample in fresh}) == 41
    assert fresh_scenes(7, 9) == fresh[:9]
    start, stop = DIGIT_BLOCKS["test"]
    digits = [digit.digit for sample in fresh for digit in sample.image.scene.digits]  # type: ignore[union-attr]
    assert digits
    assert all(digit is not None and start <= digit < stop for digit in digits)
    known = {sample.image.digest for split in SPLITS for sample in load_scenes(split)}  # type: ignore[union-attr]
    for seed in (0, 8, 20261126):
        images = {sample.image.digest for sample in fresh_scenes(seed, 20)}  # type: ignore[union-attr]
        assert not images & known
        assert not images & {sample.image.digest for sample in fresh}  # type: ignore[union-attr]


def test_fresh_scenes_replace_the_test_split_alone() -> None:
    assert load_task("scenes", "test", 4, fresh=3) == fresh_scenes(3, 4)
    assert load_task("scenes", "train", 4, fresh=3) == load_task("scenes", "train", 4)
    with pytest.raises(UserError, match="only scenes are drawn anew"):
        load_task("textvqa", "test", 4, fresh=3)
