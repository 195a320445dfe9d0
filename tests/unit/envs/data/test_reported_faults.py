"""Faults that users of such data reported elsewhere: images dropped, answers altered, paths misread."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from envs.data import FileImage, Sample, load_task
from envs.data.build import _read
from envs.data.files import split_of
from envs.data.questions import IMAGE_FIELDS
from envs.data.scoring import fitting_metric, score
from envs.errors import UserError

Save = Callable[..., Path]
Picture = Callable[..., bytes]
SPLITS = ("train", "validation", "test")


def everything(task: Any) -> list[Sample]:
    return [sample for split in SPLITS for sample in load_task(str(task), split)]


def texts(save_lines: Save, path: Path, row: dict[str, Any]) -> list[Sample]:
    """The samples of five rows without images that differ in their question alone."""
    return everything(save_lines(path, [{"question": f"{i}?", **row} for i in range(5)]))


# 1: images dropped


@pytest.mark.parametrize("name", [*IMAGE_FIELDS, "Image", "IMAGE-PATH", "File Name"])
def test_every_image_name_is_read_in_json_lines_and_parquet(
    name: str, tmp_path: Path, save_lines: Save, save_picture: Save
) -> None:
    rows = []
    for i in range(5):
        save_picture(tmp_path / f"{i}.png", i)
        rows.append({name: f"{i}.png", "question": "q", "answer": "1"})
    lines = everything(save_lines(tmp_path / "a.jsonl", rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    stored = [{**row, name: (tmp_path / row[name]).read_bytes()} for row in rows]
    pq.write_table(pa.Table.from_pylist(stored), tmp_path / "c.parquet")
    for samples in (lines, everything(tmp_path / "b.parquet"), everything(tmp_path / "c.parquet")):
        assert len({s.image.digest for s in samples if s.image}) == 5


@pytest.mark.parametrize("cell", [["0.png"], {"path": "0.png"}, {"bytes": None, "path": "0.png"}, "0.png"])
def test_forms_of_an_image_cell(cell: Any, tmp_path: Path, save_lines: Save, save_picture: Save) -> None:
    save_picture(tmp_path / "0.png", 1)
    row = {"images": cell, "question": "q", "answer": "1", "split": "train"}
    others = [{"question": f"{i}", "answer": "1", "split": s} for i, s in enumerate(("validation", "test"))]
    save_lines(tmp_path / "a.jsonl", [row, *others])
    pq.write_table(pa.Table.from_pylist([row, *others]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert load_task(str(tmp_path / name), "train")[0].image is not None


@pytest.mark.parametrize(
    "unread",
    [
        *({"scan": "a/0.png"}, {"image_url": "http://x/0"}, {"myPicture": "0"}, {"b64": "data:image/png;base64,xx"}),
        *({"figure": {"path": "a/0.png"}}, {"scans": ["a/0.PNG"]}, {"pictureFile": "0"}),
    ],
)
@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_what_looks_like_an_image_and_is_not_read_is_said(
    unread: dict[str, str], layout: str, tmp_path: Path, save_lines: Save
) -> None:
    rows = [{**unread, "question": f"{i}?", "answer": "1"} for i in range(5)]
    path = tmp_path / f"a.{layout}"
    save_lines(path, rows) if layout == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match="looks like an image and is not read"):
        everything(path)


def test_bytes_in_an_unknown_column_are_said(tmp_path: Path, picture: Picture) -> None:
    rows = [{"pixels": picture(i) * 100, "question": "q", "answer": "1"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"'pixels'.*looks like an image") as caught:
        everything(tmp_path / "a.parquet")
    assert len(caught.value.message) < 400


def test_text_only_rows_may_speak_about_images(tmp_path: Path, save_lines: Save) -> None:
    row = {"answer": "1", "image": None, "image_id": "x9", "image_width": 3, "id": "a"}
    assert all(s.image is None for s in texts(save_lines, tmp_path / "a.jsonl", row))


# 2: paths read as globs


@pytest.mark.parametrize("name", ["mine[1].parquet", "a*.parquet", "a::b.parquet", "d[v1]/x?.parquet", "{a,b}.parquet"])
def test_a_parquet_path_is_no_pattern(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for file, word in ((path, "right"), (tmp_path / "mine1.parquet", "wrong"), (tmp_path / "ab.parquet", "wrong")):
        pq.write_table(pa.table({"question": [f"{word} {i}" for i in range(5)], "answer": ["1"] * 5}), file)
    samples = everything(path)
    assert len(samples) == 5
    assert all(s.question.startswith("right") for s in samples)


# 3: choices


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"choices": ["cat", "dog", "whale"], "answer": 2}, "C"),
        ({"choices": ["cat", "dog", "whale"], "answer": "dog"}, "B"),
        ({"options": ["cat", "dog"], "label": 0}, "A"),
        ({"choices": ["cat", "dog"], "correct_choice_idx": 1}, "B"),
        ({"answer_choices": ["cat", "dog"], "answer": "(b)"}, "B"),
        ({"Choices": ["cat", "dog"], "answerKey": "B."}, "B"),
        ({"candidates": "['cat', 'dog']", "answer": 1}, "B"),
        ({"options": "['cat' 'dog']", "Answer": "A"}, "A"),
        ({"A": "cat", "B": "dog", "C": "whale", "answer": "C"}, "C"),
        ({"option_a": "cat", "Option B": "dog", "optionD": "not reached", "correct_answer": "dog"}, "B"),
    ],
)
@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_choices_make_a_multiple_choice_question(
    row: dict[str, Any], letter: str, layout: str, tmp_path: Path, save_lines: Save
) -> None:
    samples = texts(save_lines, tmp_path / "a.jsonl", row)
    if layout == "parquet":
        pq.write_table(pa.Table.from_pylist([{"question": f"{i}?", **row} for i in range(5)]), tmp_path / "a.parquet")
        samples = everything(tmp_path / "a.parquet")
    assert {s.answers for s in samples} == {(letter,)}
    assert all(s.metric.startswith("multiple_choice:") and "A: cat" in s.question for s in samples)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"my_options": ["cat", "dog"], "answer": "B"}, "'my_options' is .* looks like options"),
        ({"wrongChoices": ["cat", "dog"], "answer": "whale"}, "'wrong_choices' is .* looks like options"),
        ({"choices": {"text": ["cat", "dog"]}, "answer": "cat"}, "choices is .*give a list of texts"),
        ({"choices": "cat, dog", "answer": 0}, "choices is .*give a list of texts"),
        ({"A": "cat", "B": "dog", "answer": "whale"}, "answer is 'whale': give one of the 2 options"),
        ({"choices": ["cat", "dog"], "answer": "2"}, "answer is '2'"),
    ],
)
@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_options_that_cannot_be_read_are_refused(
    row: dict[str, Any], reason: str, layout: str, tmp_path: Path, save_lines: Save
) -> None:
    rows = [{"question": f"{i}?", **row} for i in range(5)]
    path = tmp_path / f"a.{layout}"
    save_lines(path, rows) if layout == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=reason):
        everything(path)


def test_words_about_options_are_no_options(tmp_path: Path, save_lines: Save) -> None:
    row = {"multiple_choice_answer": "yes", "num_choices": 4, "candidates": None, "A": "alone", "answers": ["yes"]}
    assert {s.answers for s in texts(save_lines, tmp_path / "a.jsonl", row)} == {("yes",)}


# 4: answers altered


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answers": "['yes' 'no' 'yes']"}, ("yes", "no", "yes")),
        ({"answers": "['yes'\n 'no']"}, ("yes", "no")),
        ({"answers": "[1 2 3]"}, ("1", "2", "3")),
        ({"answers": '["a", "b"]'}, ("a", "b")),
        ({"answers": "['a', 'b']"}, ("a", "b")),
        ({"answers": "[unclear]"}, ("[unclear]",)),
        ({"answer": "[3]"}, ("[3]",)),
        ({"answer": 3.0}, ("3",)),
    ],
)
def test_answers_are_taken_as_they_stand(row: Any, answers: Any, tmp_path: Path, save_lines: Save) -> None:
    assert {s.answers for s in texts(save_lines, tmp_path / "a.jsonl", row)} == {answers}


@pytest.mark.parametrize(
    "row",
    [
        *('"answers": ["yes", null]', '"answers": "[\\"yes\\", null]"', '"answer": NaN', '"answers": [Infinity]'),
        *('"answers": "[\'yes\' nan]"', '"answers": "[nan]"', '"answers": "[None \'yes\']"', '"answers": "[NaN]"'),
    ],
)
def test_answers_that_are_none_are_refused(row: str, tmp_path: Path, save_lines: Save) -> None:
    with pytest.raises(UserError, match=r"line 1: (an answer is|answers are missing)"):
        everything(save_lines(tmp_path / "a.jsonl", [f'{{"question": "q", {row}}}']))


@pytest.mark.parametrize("text", ["['a' 'b' ... 'z']", "['a', 'b'", "['a' array('b')]", '["a" "b\\" ]'])
def test_a_list_that_cannot_be_read_is_refused_if_it_ends_like_one(text: str, tmp_path: Path, save_lines: Save) -> None:
    path = tmp_path / "a.jsonl"
    if text.endswith("]"):
        with pytest.raises(UserError, match="is a list that cannot be read"):
            texts(save_lines, path, {"answers": text})
    else:
        assert {s.answers for s in texts(save_lines, path, {"answers": text})} == {(text,)}


@pytest.mark.parametrize("names", [("Question", "Answer"), ("QUESTION", "answers"), ("query", "Direct Answers")])
def test_names_count_in_any_case(names: tuple[str, str], tmp_path: Path, save_lines: Save) -> None:
    rows = [{names[0]: f"{i}?", names[1]: "x", "Split": "test" if i < 2 else "train"} for i in range(5)]
    path = save_lines(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in (path, tmp_path / "a.parquet"):
        assert {s.question for s in load_task(str(file), "test")} == {"0?", "1?"}


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.decimal128(4, 1)])
@pytest.mark.parametrize("listed", [False, True])
def test_parquet_numbers_are_as_written(kind: pa.DataType, listed: bool, tmp_path: Path) -> None:
    values = pa.array([3.3] * 5).cast(pa.float32() if kind == pa.float16() else kind)
    values = pa.array(values.to_numpy().astype("float16")) if kind == pa.float16() else values
    column = pa.ListArray.from_arrays(range(6), values) if listed else values
    pq.write_table(pa.table({"question": [f"{i}" for i in range(5)], "answers": column}), tmp_path / "a.parquet")
    assert {s.answers for s in everything(tmp_path / "a.parquet")} == {("3.3",)}


def test_categories_of_pandas_are_texts(tmp_path: Path) -> None:
    answers = pa.array(["x"] * 5).dictionary_encode()
    pq.write_table(pa.table({"question": [f"{i}" for i in range(5)], "answer": answers}), tmp_path / "a.parquet")
    assert {s.answers for s in everything(tmp_path / "a.parquet")} == {("x",)}


# 8: split names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(n, "test") for n in ("test2015", "testdev", "test-dev2015", "test_std", "test1", "myTest", "heldout")],
        *[(n, "validation") for n in ("val1", "minival", "minival2014", "dev2", "eval", "valid_3", "val2014")],
        *[(n, "train") for n in ("train2014", "trainval", "TextVQA_0.5.1_train", "training-00001-of-2")],
        *[(n, None) for n in ("latest", "contest", "value", "data", "developer", "restrained")],
    ],
)
def test_split_words(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_a_parquet_row_names_its_split_as_json_lines_do(tmp_path: Path) -> None:
    splits = ["train", "val1", "testdev"]
    pq.write_table(pa.table({"question": list("abc"), "answer": list("xyz"), "split": splits}), tmp_path / "a.parquet")
    assert [[s.question for s in load_task(str(tmp_path), split)] for split in SPLITS] == [["a"], ["b"], ["c"]]


# 9: replaced with the same size and modification time


@pytest.mark.parametrize("how", ["rewritten", "moved over"])
def test_a_picture_replaced_with_same_size_and_time_is_scanned_anew(
    how: str, tmp_path: Path, save_lines: Save, picture: Picture
) -> None:
    def put(path: Path, number: int) -> None:
        path.write_bytes(picture(number) + b"-" * (500 - len(picture(number))))
        os.utime(path, (1e9, 1e9))

    for i in range(5):
        put(tmp_path / f"{i}.png", i)
    rows = [{"image": f"{i}.png", "question": f"q{i}", "answer": "1"} for i in range(5)]
    path = save_lines(tmp_path / "a.jsonl", rows)
    before = {s.question: s for s in everything(path)}
    target = tmp_path / ("3.png" if how == "rewritten" else "new")
    put(target, 77)
    target.replace(tmp_path / "3.png")
    with pytest.raises(UserError, match="was changed since the data was opened"):
        before["q3"].image.load()  # type: ignore[union-attr]
    _read.cache_clear()  # as a new process would
    after = {s.question: s for s in everything(path)}
    assert [q for q in after if after[q].image.digest != before[q].image.digest] == ["q3"]  # type: ignore[union-attr]


def test_a_table_replaced_with_same_size_and_time_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for answer in ("1", "2"):
        pq.write_table(pa.table({"question": list("abcde"), "answer": [answer] * 5}), path)
        os.utime(path, (1e9, 1e9))
        assert {s.answers for s in everything(path)} == {(answer,)}


# 14: lone surrogates


@pytest.mark.parametrize(
    "row",
    [{"question": "q\ud83d"}, {"answer": "\ud83d"}, {"family": "\ud83d"}, {"style": "\udfff"}, {"image": "\ud83d.png"}],
)
def test_half_characters_are_broken_rows(
    row: dict[str, str], tmp_path: Path, save_lines: Save, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"question": f"{i}", "answer": "1"} for i in range(4)]
    path = save_lines(tmp_path / "a.jsonl", [*good, {"question": "q", "answer": "1", **row}])
    with pytest.raises(UserError, match="line 5") as caught:
        everything(path)
    caught.value.message.encode()
    with caplog.at_level(logging.WARNING):
        assert sum(len(load_task(str(path), split, on_invalid_row="skip")) for split in SPLITS) == 4
    caplog.text.encode()


# 18, 19: links and foreign files


def test_linked_folders_and_files_are_read(tmp_path: Path, save_lines: Save, save_picture: Save) -> None:
    data, blobs = tmp_path / "data", tmp_path / "blobs"
    (data / "nested").mkdir(parents=True)
    rows = []
    for i in range(5):
        (data / f"{i}.png").symlink_to(save_picture(blobs / f"{i}", i))
        rows.append({"image": f"{i}.png", "question": "q", "answer": "1"})
    save_lines(blobs / "rows" / "a.jsonl", [])
    save_lines(data / "a.jsonl", rows)
    (data / "nested" / "loop").symlink_to(data)
    assert len(everything(data)) == 5
    (tmp_path / "linked").symlink_to(data)
    assert len(everything(tmp_path / "linked")) == 5


def test_original_images_in_a_linked_folder(tmp_path: Path, save_json: Save, save_picture: Save) -> None:
    rows = []
    for i in range(5):
        save_picture(tmp_path / "elsewhere" / f"{i}.png", i)
        rows.append({"image": f"train2014/{i}.png", "question": "how many?", "answer": i})
    save_json(tmp_path / "data" / "train.json", rows)
    (tmp_path / "data" / "train2014").symlink_to(tmp_path / "elsewhere")
    assert len(everything(f"tallyqa={tmp_path / 'data'}")) == 5


def test_foreign_files_in_a_data_folder_are_left_alone(tmp_path: Path, save_lines: Save) -> None:
    save_lines(tmp_path / "own.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(5)])
    for name in ("._own.jsonl", ".ipynb_checkpoints/own.jsonl", "__MACOSX/x.jsonl", "runs/a/metrics.jsonl"):
        save_lines(tmp_path / name, [{"iteration": 1}])
    for name in ("config.yaml", "run.json"):
        (tmp_path / "runs" / "a" / name).write_text("{}")
    assert len(everything(tmp_path)) == 5


# 21: bytes and base64 in messages


@pytest.mark.parametrize("value", ["QUJD" * 10_000, "data:image/png;base64," + "QUJD" * 10_000, ["x" * 90_000]])
@pytest.mark.parametrize("field", ["image", "question", "answers", "options", "metric", "style", "split"])
def test_long_values_never_fill_a_screen(value: Any, field: str, tmp_path: Path, save_lines: Save) -> None:
    row = {"question": "q", "answer": "1", "split": "train", field: value}
    with pytest.raises(UserError) as caught:  # one row is too few in any case
        everything(save_lines(tmp_path / "a.jsonl", [row]))
    assert len(caught.value.message.replace(str(tmp_path), "")) < 500


# a right answer scores 1


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11])
def test_a_right_answer_scores_one_however_many_answers_there_are(
    count: int, tmp_path: Path, save_lines: Save, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "envs.data"):
        samples = texts(save_lines, tmp_path / "a.jsonl", {"answers": ["The Cat."] * count})
    assert {score(s.metric, "cat", s.answers) for s in samples} == {1.0}
    assert {s.metric for s in samples} == {"vqa" if count >= 10 else "vqa_exact"}
    assert f"scored: 5 by {samples[0].metric}" in caplog.text


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "textvqa"])
def test_the_metric_fits_in_every_layout(layout: str, tmp_path: Path, save_lines: Save, picture: Picture) -> None:
    rows = [{"image": picture(i), "question": "q", "answers": ["a"]} for i in range(5)]
    if layout == "jsonl":
        samples = texts(save_lines, tmp_path / "a.jsonl", {"answers": ["a"]})
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        samples = everything(f"textvqa={tmp_path}" if layout == "textvqa" else tmp_path)
    assert {score(s.metric, "A", s.answers) for s in samples} == {1.0}


def test_a_metric_that_cannot_reach_one_is_refused(tmp_path: Path, save_lines: Save) -> None:
    for metric in ("vqa", "a_okvqa"):
        assert fitting_metric(metric, 3) == metric
        with pytest.raises(UserError, match="three annotators"):
            texts(save_lines, tmp_path / "a.jsonl", {"answers": ["a", "b"], "metric": metric})


def test_a_file_image_notices_a_change(tmp_path: Path, save_picture: Save) -> None:
    image = FileImage.open(save_picture(tmp_path / "a.png", 1))
    assert image.load().mode == "RGB"
    save_picture(tmp_path / "a.png", 2)
    with pytest.raises(UserError, match="was changed"):
        image.load()
    assert json.dumps(image.digest)
