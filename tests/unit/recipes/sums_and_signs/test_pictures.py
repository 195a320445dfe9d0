"""Pictures and questions: pure functions of their seed, with answers that follow from what is drawn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.data.scenes.layout import DIGIT_BLOCKS, handwriting
from recipes.sums_and_signs.pictures import (
    COLOR_NAMES,
    NOTATIONS,
    OUTLINES,
    Item,
    draw_picture,
    make_picture,
    paint_item,
    sign_values,
)
from recipes.sums_and_signs.questions import FAMILIES, MAX_TOTAL_SUMMANDS, all_questions, caption

seeds = st.integers(0, 2**31)
notations = st.sampled_from(NOTATIONS)


@given(seed=seeds, notation=notations)
@settings(max_examples=60, deadline=None)
def test_a_color_is_worth_what_is_drawn(seed: int, notation: str) -> None:
    picture = make_picture("test", seed, notation=notation)
    for color, number in picture.worth.items():
        shown = [item for item in picture.items if item.color == color]
        if notation == "signs":
            (item,) = shown
            assert item.core is not None
            assert item.core != color
            place = OUTLINES.index(item.kind), COLOR_NAMES.index(color), COLOR_NAMES.index(item.core)
            assert number == sign_values()[place]
        else:
            assert 1 <= len(shown) <= (4 if notation == "sums" else 1)
            assert number == sum(handwriting()[1][item.digit] for item in shown if item.digit is not None)
            start, stop = DIGIT_BLOCKS["test"]
            assert all(item.digit is not None and start <= item.digit < stop for item in shown)
    assert {item.color for item in picture.items} == set(picture.worth)


@given(seed=seeds, notation=notations)
@settings(max_examples=40, deadline=None)
def test_items_do_not_share_a_cell(seed: int, notation: str) -> None:
    picture = make_picture("corpus", seed, notation=notation)
    for number, item in enumerate(picture.items):
        for other in picture.items[:number]:
            far = max(abs(item.x - other.x), abs(item.y - other.y))
            assert far > 0.4 * min(item.size, other.size)


@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_questions_do_not_tell_the_notation(seed: int) -> None:
    """Whatever is asked about one notation can be asked about another in the same words."""
    for notation in NOTATIONS:
        picture = make_picture("train", seed, notation=notation)
        questions = all_questions(picture)
        assert {question.family for question in questions} <= set(FAMILIES)
        assert len({question.text for question in questions}) == len(questions)
        for question in questions:
            colors = [color for color in COLOR_NAMES if f" {color}" in question.text.replace("colors", "")]
            if question.family == "value":
                assert question.answer == str(picture.worth[colors[0]])
            if question.family == "total":
                assert question.answer == str(sum(picture.worth[color] for color in colors))
                assert question.things <= MAX_TOTAL_SUMMANDS
            if question.family == "more":
                assert picture.worth[question.answer] == max(picture.worth[color] for color in colors)
            if question.family == "colors":
                assert question.answer == str(len(picture.worth))


def test_pictures_are_functions_of_stream_and_seed() -> None:
    first, again = (make_picture("validation", 7) for _ in range(2))
    assert first == again
    assert np.array_equal(draw_picture(first), draw_picture(again))
    assert first != make_picture("validation", 8)
    assert first != make_picture("test", 7)


def test_every_notation_size_and_format_is_drawn() -> None:
    pictures = [make_picture("train", seed) for seed in range(80)]
    assert {p.notation for p in pictures} == set(NOTATIONS)
    assert {p.digit_size for p in pictures} == {"small", "large"}
    assert len({p.format for p in pictures}) == 4
    assert all(p.summands[color] >= 1 for p in pictures for color in p.worth)


@pytest.mark.parametrize("kind", OUTLINES)
def test_signs_are_drawn_where_they_stand(kind: str) -> None:
    canvas = np.zeros((60, 80, 3), dtype=np.float32)
    paint_item(canvas, Item(kind, "red", (200, 0, 0), 50.0, 30.0, 30.0, 0.0, 1.0, core="blue", core_rgb=(0, 0, 200)))
    assert canvas[30, 50, 2] == pytest.approx(200)
    assert canvas[..., 0].max() == pytest.approx(200)
    rows, columns = np.nonzero(canvas.sum(-1))
    assert abs(columns.mean() - 50) < 1.5
    assert abs(rows.mean() - 30) < 4
    assert not canvas[:, :30].any()


def test_signs_beyond_the_border_are_cut() -> None:
    canvas = np.zeros((20, 20, 3), dtype=np.float32)
    for x, y in ((-3.0, 10.0), (22.0, 22.0), (200.0, 5.0)):
        paint_item(canvas, Item("square", "red", (200, 0, 0), x, y, 30.0, 0.1, 1.0))
    assert canvas[10, 0, 0] > 0
    assert canvas.shape == (20, 20, 3)


def test_captions_say_everything() -> None:
    for seed in range(20):
        picture = make_picture("corpus", seed)
        words = caption(picture).answer.split()
        assert sum(word.isdigit() for word in words) == sum(item.value is not None for item in picture.items)
        assert all(item.kind == "digit" or f"{item.kind} {item.core}" in " ".join(words) for item in picture.items)
