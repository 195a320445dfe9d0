"""Rows and files that nearly have a documented form: read rightly or refused, never taken for something else."""

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from envs.data import Sample, load_task
from envs.data.files import split_of
from envs.errors import UserError

Save = Callable[..., Path]
Picture = Callable[..., bytes]
SPLITS = ("train", "validation", "test")


def everything(task: Any) -> list[Sample]:
    return [sample for split in SPLITS for sample in load_task(str(task), split)]


@pytest.fixture(params=["jsonl", "parquet"])
def save(request: pytest.FixtureRequest, tmp_path: Path, save_lines: Save) -> Callable[[dict[str, Any]], Path]:
    """Saves five rows that differ in their question alone, in each layout."""

    def write(row: dict[str, Any]) -> Path:
        rows = [{"question": f"{i}?", "answer": "1", **row} for i in range(5)]
        path = tmp_path / f"a.{request.param}"
        if request.param == "jsonl":
            return save_lines(path, rows)
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    return write


# images


@pytest.mark.parametrize("name", ["data", "content", "screenshot"])
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_an_image_in_base64_is_not_dropped(name: str, kind: str, save: Save, picture: Picture) -> None:
    path = save({name: base64.b64encode(picture(3, kind)).decode()})
    with pytest.raises(UserError, match=f"field '{name}' is .*looks like an image and is not read"):
        everything(path)


@pytest.mark.parametrize(
    "row",
    [{"image1": "0001"}, {"meta": {"image": "0001"}}, {"views": [{"file": "a/0.png"}]}, {"pixel_values": [[0, 1]]}],
)
def test_numbered_and_nested_images_are_not_dropped(row: dict[str, Any], save: Save) -> None:
    with pytest.raises(UserError, match="looks like an image and is not read"):
        everything(save(row))


def test_bytes_in_a_structure_are_not_dropped(tmp_path: Path, picture: Picture) -> None:
    rows = [{"meta": {"content": picture(i)}, "question": f"{i}?", "answer": "1"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"field 'meta' is .*looks like an image and is not read"):
        everything(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ({"url": "http://x/0.png"}, r"image is \{'url': 'http://x/0.png'\}: give a path"),
        (["0.png", "1.png"], "the row has 2 images: give one"),
    ],
)
def test_an_image_cell_of_another_form_is_refused(cell: Any, reason: str, save: Save) -> None:
    with pytest.raises(UserError, match=reason):
        everything(save({"image": cell}))


def test_bytes_as_arrow_views_are_images(tmp_path: Path, picture: Picture) -> None:
    pictures = pa.array([picture(i) for i in range(5)], pa.binary_view())
    columns = {"question": list("abcde"), "answer": ["1"] * 5, "image": pictures}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert len({sample.image.digest for sample in everything(tmp_path / "a.parquet") if sample.image}) == 5


def test_text_only_rows_may_be_nested(save: Save) -> None:
    row = {"meta": {"image_id": "x9", "author": "a"}, "tags": ["b", "c"], "boxes": [[1, 2], [3, 4]]}
    assert all(sample.image is None for sample in everything(save(row)))


# options


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"option1": "cat", "option2": "dog", "answer": 1}, "'option1', 'option2' look like options"),
        ({"choice_0": "cat", "choice_1": "dog", "answer": "dog"}, "'choice_0', 'choice_1' look like options"),
        ({"ending0": "cat", "ending1": "dog", "label": 1}, "'ending0', 'ending1' look like options"),
        ({"opts": ["cat", "dog"], "answer": "B"}, "'opts' is .* looks like options"),
        ({"A": 1, "B": 2, "answer": "B"}, r"A, B, ... are \[1, 2\]: write the options as texts"),
        ({"choices": ["cat", "dog"], "answer": "dog", "answer_index": 0}, "two different options"),
        ({"choices": ["cat", "dog"], "answer": "A", "label": 1}, "two different options"),
    ],
)
def test_options_that_are_nearly_right_are_refused(row: dict[str, Any], reason: str, save: Save) -> None:
    with pytest.raises(UserError, match=reason):
        everything(save(row))


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["cat", "dog"], "answer": "dog", "answer_index": 1, "label": "animal"},
        {"choices": ["cat", "dog"], "answer": "B", "answers": ["dog"]},
    ],
)
def test_fields_may_name_the_same_option(row: dict[str, Any], save: Save) -> None:
    assert {sample.answers for sample in everything(save(row))} == {("B",)}


def test_numbers_called_a_and_b_are_no_options(save: Save) -> None:
    assert {sample.answers for sample in everything(save({"a": 3, "b": 4, "answer": 7, "option_1": "x"}))} == {("7",)}


# answers


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("[-1 -2]", ("-1", "-2")),
        ("[01 02]", ("[01 02]",)),
        ("['a', 'b'] ", ("a", "b")),
        ("[{'answer': 'x'} {'answer': 'y'}]", None),
        ("['a' 'b\nc']", None),
        ("['it''s']", None),
        ("['a'1]", None),
    ],
)
def test_texts_of_lists_are_never_joined(text: str, answers: tuple[str, ...] | None, save: Save) -> None:
    path = save({"answers": text})
    if answers:
        assert {sample.answers for sample in everything(path)} == {answers}
    elif "{" in text:
        assert {sample.answers for sample in everything(path)} == {(text,)}
    else:
        with pytest.raises(UserError, match="is a list that cannot be read"):
            everything(path)


@pytest.mark.parametrize("text", ["['yes' 'no']", "['yes', 'no']", '["yes", "no"]'])
@pytest.mark.parametrize("name", ["answer", "answers", "label", "direct_answers"])
def test_a_list_of_texts_in_quotes_is_read_under_every_name(name: str, text: str, save: Save) -> None:
    assert {sample.answers for sample in everything(save({"answer": None, name: text}))} == {("yes", "no")}


# splits and files


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "test",
            "testmini devtest tests testset test4k testA testb held-out held_out holdout hold-out 2015test vqa_v2test",
        ),
        ("validation", "valset val5k minival validations development devel evals valmini validationdata"),
        ("train", "trainset train1k minitrain traindata train-00000-of-00002"),
        (None, "testament evaluator developer validated holding outtake trainer"),
    ],
)
def test_words_with_something_behind_are_splits(split: str | None, names: str) -> None:
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


def test_a_folder_may_have_both_layouts(tmp_path: Path, save_lines: Save) -> None:
    save_lines(tmp_path / "val.jsonl", [{"question": f"v{i}", "answer": "1"} for i in range(3)])
    save_lines(tmp_path / "test.jsonl", [{"question": f"t{i}", "answer": "1"} for i in range(3)])
    pq.write_table(pa.table({"question": list("abc"), "answer": list("xyz")}), tmp_path / "train.parquet")
    questions = {split: {sample.question for sample in load_task(str(tmp_path), split)} for split in SPLITS}
    assert questions == {"train": {"a", "b", "c"}, "validation": {"v0", "v1", "v2"}, "test": {"t0", "t1", "t2"}}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("what", ["dangling", "loop", "pipe"])
def test_data_files_that_cannot_be_read_are_named(what: str, ending: str, tmp_path: Path, save_lines: Save) -> None:
    save_lines(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(5)])
    odd = tmp_path / f"b.{ending}"
    os.mkfifo(odd) if what == "pipe" else odd.symlink_to(odd if what == "loop" else tmp_path / "gone")
    with pytest.raises(UserError, match=rf"cannot read .*b\.{ending}"):
        everything(tmp_path)
