"""A user's own files.

JSON Lines and parquet, broken rows, splits, paths that leave their folder.
"""

import logging
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from envs.data import Sample, list_tasks, load_task
from envs.data.task_spec import absolute_task
from envs.errors import UserError

Save = Callable[..., Path]
Picture = Callable[..., bytes]
SPLITS = ("train", "validation", "test")


def digests(samples: Any) -> set[str]:
    return {sample.image.digest for sample in samples if sample.image}


@pytest.fixture
def lines(tmp_path: Path, save_lines: Save, save_picture: Save) -> Path:
    rows = []
    for i in range(20):
        save_picture(tmp_path / "pictures" / f"{i}.png", i)
        rows.append({"image": f"pictures/{i}.png", "question": f"q{i}?", "answers": [str(i)]})
    return save_lines(tmp_path / "own.jsonl", rows)


def test_json_lines_are_held_out_by_image(lines: Path) -> None:
    parts = [load_task(str(lines), split) for split in SPLITS]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert parts[0][0].metric == "vqa_exact"
    assert parts[0][0].style is None
    again = [load_task(str(lines), split) for split in SPLITS]
    assert again == parts
    assert len({sample.id for part in parts for sample in part}) == 20


def test_fields_of_a_users_row(tmp_path: Path, save_lines: Save, save_picture: Save) -> None:
    save_picture(tmp_path / "a.png", 1)
    row = {
        "image": "a.png",
        "question": " How? ",
        "answer": 7,
        "metric": "anls",
        "style": "doc_qa",
        "family": "reading",
        "split": "val",
    }
    choice = {"image": "a.png", "question": "Which?", "options": ["x", "y", "z"], "answer": "z"}
    others = [{"question": f"text {i}?", "answers": ["a"]} for i in range(3)]
    path = save_lines(tmp_path / "d.jsonl", [row, {**choice, "split": "validation"}, *others])
    first, second = load_task(str(path), "validation")
    assert (first.question, first.answers, first.metric) == ("How?", ("7",), "anls")
    assert (first.style, first.family) == ("doc_qa", "reading")
    assert (second.question, second.answers) == ("Which?\nA: x\nB: y\nC: z\n", ("C",))
    assert second.metric == "multiple_choice:3"
    assert all(sample.image is None for sample in load_task(str(path), "train"))


def test_files_named_by_split(tmp_path: Path, save_lines: Save, save_picture: Save) -> None:
    for number, split in enumerate(("train", "val", "test")):
        rows = []
        for i in range(3):
            save_picture(tmp_path / f"{number}{i}.png", 10 * number + i)
            rows.append({"image": f"{number}{i}.png", "question": "?", "answers": ["a"]})
        save_lines(tmp_path / f"{split}.jsonl", rows)
    assert [len(load_task(str(tmp_path), split)) for split in SPLITS] == [3, 3, 3]


def test_no_training_image_is_in_validation_or_test(tmp_path: Path, save_parquet: Save, picture: Picture) -> None:
    numbered = {"train": [0, 1, 2, 3, 4], "validation": [3, 4, 5, 6], "test": [4, 6, 7]}
    for split, numbers in numbered.items():
        count = len(numbers)
        columns = {"question": [f"{split}?"] * count, "answers": [["a"]] * count}
        images = [picture(number) for number in numbers]
        save_parquet(tmp_path / f"{split}.parquet", {"image": images, **columns})
    parts = {split: load_task(str(tmp_path), split) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 3,
        "validation": 2,
        "test": 3,
    }
    assert not digests(parts["train"]) & (digests(parts["validation"]) | digests(parts["test"]))
    assert not digests(parts["validation"]) & digests(parts["test"])


def test_a_split_without_answers_counts_as_absent(tmp_path: Path, save_parquet: Save, picture: Picture) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        answers = [[""] * 10 if split == "test" else ["a"] * 10] * 10
        images = [picture(100 * number + i) for i in range(10)]
        columns = {"image": images, "question": [f"{split}?"] * 10, "answers": answers}
        save_parquet(tmp_path / f"{split}-0.parquet", columns)
    parts = {split: load_task(f"textvqa={tmp_path}", split) for split in SPLITS}
    assert {s.question for s in parts["test"]} == {"validation?"}
    assert {s.question for s in (*parts["train"], *parts["validation"])} == {"train?"}
    assert [len(parts[split]) for split in SPLITS] == [9, 1, 10]


def test_limit_and_seed(lines: Path) -> None:
    some = load_task(str(lines), "train", limit=5)
    assert len(some) == 5
    assert load_task(str(lines), "train", limit=5) == some
    assert load_task(str(lines), "train", limit=5, seed=1) != some
    assert set(some) <= set(load_task(str(lines), "train"))
    assert len(load_task(str(lines), "train", limit=500)) == 16


def test_samples_pickle_small_and_load_elsewhere(tmp_path: Path, save_parquet: Save, picture: Picture) -> None:
    columns = {"question": ["?"] * 9, "answers": [["a"]] * 9}
    save_parquet(tmp_path / "d.parquet", {"image": [picture(i) for i in range(9)], **columns})
    sample = load_task(str(tmp_path), "test")[0]
    pickled = pickle.dumps(sample)
    assert len(pickled) < 2000
    again: Sample = pickle.loads(pickled)
    assert again == sample
    assert again.image is not None
    assert again.image.load().size == again.image.size


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "?", "answers": ["a"], "image": "gone.png"}, "no image 'gone.png'"),
        ({"question": "?", "answers": ["a"], "image": "text.png"}, "cannot read the image"),
        ({"question": "?", "answers": ["a"], "image": "cut.png"}, "cannot read the image"),
        ({"question": "?", "answers": ["a"], "image": 5}, "image is 5"),
        ({"question": "?", "answers": ["a"], "image": "../outside.png"}, "outside"),
        ({"question": "?", "answers": ["a"], "image": "/etc/hostname"}, "outside"),
        ({"question": "?", "answers": ["a"], "image": "x" * 5000}, "no image"),
        ({"question": "?", "answers": ["a"], "image": "a\0b"}, "give a path"),
        ({"question": "", "answers": ["a"], "image": "0.png"}, "question is ''"),
        ({"answers": ["a"], "image": "0.png"}, "question is None"),
        ({"question": ["?"], "answers": ["a"], "image": "0.png"}, r"question is \['\?'\]"),
        ({"question": "?", "image": "0.png"}, "answers are missing"),
        ({"question": "?", "answers": [], "image": "0.png"}, r"answers is \[\]"),
        ({"question": "?", "answers": [None], "image": "0.png"}, "an answer is None"),
        ({"question": "?", "answers": ["a"], "metric": "bleu"}, "metric is 'bleu'"),
        ({"question": "?", "answers": ["a"], "metric": ["vqa"]}, r"metric is \['vqa'\]"),
        ({"question": "?", "answers": ["a"], "style": 3}, "style is 3"),
        ({"question": "?", "answers": ["a"], "split": "later"}, "split is 'later'"),
        ({"question": "?", "answers": ["q"], "options": ["x", "y"]}, r"answers is \['q'\]"),
        ({"question": "?", "answer": 2, "options": ["x", "y"]}, "answer is 2"),
        ({"question": "?", "answer": 0, "options": ["x"]}, "1 options"),
        ({"question": "?", "answer": 0, "options": "xy"}, "options is 'xy'"),
        ("{'question': 1}", "not JSON"),
        ("[1, 2]", "a list, not an object"),
    ],
)
def test_a_broken_row_is_reported_with_its_place(
    row: Any,
    reason: str,
    tmp_path: Path,
    save_lines: Save,
    save_picture: Save,
    caplog: pytest.LogCaptureFixture,
    picture: Picture,
) -> None:
    folder = tmp_path / "data"
    good = []
    for i in range(5):
        save_picture(folder / f"{i}.png", i)
        good.append({"image": f"{i}.png", "question": "?", "answers": ["a"]})
    save_picture(tmp_path / "outside.png", 50)
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes(picture(7)[:60])
    save_lines(folder / "d.jsonl", [*good, row])
    with pytest.raises(UserError, match=rf"d\.jsonl, line 6: .*{reason}"):
        load_task(str(folder), "train")
    with caplog.at_level(logging.WARNING):
        parts = [load_task(str(folder), split, on_invalid_row="skip") for split in SPLITS]
    assert sum(len(part) for part in parts) == 5
    assert "d.jsonl, line 6: " in caplog.text
    assert "1 of 6 rows skipped" in caplog.text


def test_a_broken_parquet_row_is_reported_with_its_place(
    tmp_path: Path, save_parquet: Save, caplog: pytest.LogCaptureFixture, picture: Picture
) -> None:
    good = {"question": ["?"] * 5, "answers": [["a"]] * 5}
    save_parquet(tmp_path / "train-0.parquet", {"image": [picture(i) for i in range(5)], **good})
    images = [picture(10), b"no image", None, picture(11), picture(12)]
    bad = {"question": ["?", "?", "?", None, "?"], "answers": [["a"]] * 4 + [[]]}
    save_parquet(tmp_path / "train-1.parquet", {"image": images, **bad})
    with pytest.raises(UserError, match=r"train-1.parquet, row 1: .*cannot read"):
        load_task(f"textvqa={tmp_path}", "train")
    with caplog.at_level(logging.WARNING):
        parts = [load_task(f"textvqa={tmp_path}", split, on_invalid_row="skip") for split in SPLITS]
    assert sum(len(part) for part in parts) == 6
    assert [f"row {i}: " in caplog.text for i in range(5)] == [False, True, True, True, True]


@pytest.mark.parametrize("size", [(10_000, 9_000), (100_000, 100_000)])
def test_a_decompression_bomb_is_a_broken_row(
    tmp_path: Path, save_lines: Save, save_picture: Save, size: tuple[int, int]
) -> None:
    rows = []
    for i in range(4):
        save_picture(tmp_path / f"{i}.png", i)
        rows.append({"image": f"{i}.png", "question": "?", "answers": ["a"]})
    content = (tmp_path / "3.png").read_bytes()
    head = b"IHDR" + struct.pack(">II", *size) + content[24:29]
    (tmp_path / "3.png").write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
    save_lines(tmp_path / "d.jsonl", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"d\.jsonl, line 4: .*(pixels|limit)"):
            load_task(str(tmp_path / "d.jsonl"), "train")
        parts = [load_task(str(tmp_path / "d.jsonl"), split, on_invalid_row="skip") for split in SPLITS]
    assert sum(map(len, parts)) == 3


def test_parquet_cells_may_name_files(tmp_path: Path, save_picture: Save) -> None:
    for i in range(4):
        save_picture(tmp_path / "pictures" / f"{i}.png", i)
    cells = [{"bytes": None, "path": f"pictures/{i}.png"} for i in range(4)]
    columns = {"question": ["?"] * 4, "answers": [["a"]] * 4}
    pq.write_table(pa.table({"image": cells, **columns}), tmp_path / "d.parquet")
    assert sum(len(load_task(str(tmp_path), split)) for split in SPLITS) == 4
    cells[2] = {"bytes": None, "path": "../../secret.png"}
    pq.write_table(pa.table({"image": cells, **columns}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"row 2: .*outside"):
        load_task(str(tmp_path), "train")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"cannot read .*d\.parquet"):
        load_task(str(tmp_path), "train")


def test_changed_files_are_read_anew(lines: Path, save_lines: Save) -> None:
    before = load_task(str(lines), "train")
    rows = [{"image": f"pictures/{i}.png", "question": "new?", "answers": ["b"]} for i in range(9)]
    save_lines(lines, rows)
    after = load_task(str(lines), "train")
    assert {s.question for s in after} == {"new?"}
    assert len(after) != len(before)


def test_a_replaced_image_is_scanned_anew(lines: Path, save_picture: Save) -> None:
    before = {s.question: digests([s]) for split in SPLITS for s in load_task(str(lines), split)}

    save_picture(lines.parent / "pictures" / "3.png", 77)
    from envs.data import build

    build._read.cache_clear()
    after = {s.question: digests([s]) for split in SPLITS for s in load_task(str(lines), split)}
    assert {q for q in before if before[q] != after[q]} == {"q3?"}


def test_mix_by_weight(lines: Path, tmp_path: Path, save_lines: Save) -> None:
    rows = [{"question": f"text {i}?", "answers": ["t"]} for i in range(200)]
    text = save_lines(tmp_path / "text" / "t.jsonl", rows)
    mixed = load_task(f"3*{lines} + 1*own={text}", "train")
    with_image = [sample for sample in mixed if sample.image]
    assert (len(with_image), len(mixed)) == (16, 21)
    twelve = load_task(f"3*{lines},{text}", "train", limit=12)
    assert (len([s for s in twelve if s.image]), len(twelve)) == (9, 12)
    assert load_task(f"3*{lines},{text}", "train", limit=12, seed=1) != twelve
    everything = load_task(f"{lines}+{text}", "train")
    assert len(everything) == 16 + 160


def test_a_mix_keeps_images_apart_across_its_parts(tmp_path: Path, save_parquet: Save, picture: Picture) -> None:
    columns = {"question": ["?"] * 60, "answers": [["a"]] * 60}
    images = [picture(i) for i in range(60)]
    save_parquet(tmp_path / "one" / "train.parquet", {"image": images, **columns})
    columns = {"question": ["!"] * 30, "answers": [["a"]] * 30}
    save_parquet(tmp_path / "two" / "test.parquet", {"image": images[:5] + images[:25], **columns})
    save_parquet(tmp_path / "two" / "train.parquet", {"image": images[20:50], **columns})
    task = f"{tmp_path / 'one'}+{tmp_path / 'two'}"
    parts = {split: load_task(task, split) for split in SPLITS}
    assert all(parts.values())
    assert not digests(parts["train"]) & (digests(parts["validation"]) | digests(parts["test"]))
    assert not digests(parts["validation"]) & digests(parts["test"])
    assert digests(load_task(str(tmp_path / "one"), "train")) & digests(parts["test"])


def test_a_mix_that_leaves_nothing(tmp_path: Path, save_lines: Save) -> None:
    for name, (test, validation) in {"a": ("x?", "y?"), "b": ("y?", "x?")}.items():
        asked = {test: "test", validation: "validation", f"{name}?": "train"}
        rows = [{"question": q, "answers": ["a"], "split": s} for q, s in asked.items()]
        save_lines(tmp_path / f"{name}.jsonl", rows)
    task = f"{tmp_path / 'a.jsonl'}+{tmp_path / 'b.jsonl'}"
    assert {sample.question for sample in load_task(task, "test")} == {"x?", "y?"}
    assert {sample.question for sample in load_task(task, "train")} == {"a?", "b?"}
    with pytest.raises(UserError, match="leaves no validation samples"):
        load_task(task, "validation")


def test_a_path_with_signs_of_the_grammar(tmp_path: Path, save_lines: Save) -> None:
    rows = [{"question": f"{i}?", "answers": ["t"]} for i in range(5)]
    path = save_lines(tmp_path / "a+b, 2*c=d.jsonl", rows)
    assert len(load_task(str(path), "train")) == 3
    assert len(load_task(f"own={path}", "train")) == 3


@pytest.mark.parametrize(
    ("task", "absolute"),
    [
        ("d.jsonl", "{cwd}/d.jsonl"),
        (" ./d.jsonl ", "{cwd}/d.jsonl"),
        ("own=d.jsonl", "own={cwd}/d.jsonl"),
        ("a+b, 2*c=d.jsonl", "{cwd}/a+b, 2*c=d.jsonl"),
        ("own=a+b, 2*c=d.jsonl", "own={cwd}/a+b, 2*c=d.jsonl"),
        ("2*textvqa=d.jsonl + scenes,d.jsonl", "2*textvqa={cwd}/d.jsonl+ scenes,{cwd}/d.jsonl"),
        ("2 * d.jsonl", "2 * {cwd}/d.jsonl"),
        ("scenes", "scenes"),
        ("owner/name@v1", "owner/name@v1"),
        ("missing.jsonl", "missing.jsonl"),
    ],
)
def test_paths_become_absolute_and_nothing_else(
    task: str, absolute: str, tmp_path: Path, save_lines: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("d.jsonl", "a+b, 2*c=d.jsonl"):
        save_lines(tmp_path / name, [{"question": "?", "answers": ["t"]}])
    (tmp_path / "scenes").mkdir()
    monkeypatch.chdir(tmp_path)
    found = absolute_task(task)
    assert found == absolute.format(cwd=tmp_path)
    assert absolute_task(found) == found


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("", "no task given"),
        ("nothing", "unknown task 'nothing': .*scenes, textvqa"),
        ("textvqa=/no/such/place", "unknown task '/no/such/place'"),
        ("nothing=.", "unknown data set 'nothing'"),
        ("scenes+", "unknown task ''"),
        ("0*textvqa+scenes", "weight 0 of 'textvqa' is not above 0"),
        ("x" * 5000, "unknown task"),
        ("no/network", "no data set of that name was found on the hub"),
    ],
)
def test_unknown_tasks(task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(task, "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split 'dev' is not allowed"),
        ({"split": "test", "limit": 0}, "a limit of 0"),
        ({"split": "test", "on_invalid_row": "ignore"}, "on_invalid_row 'ignore'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task("scenes", **options)


def test_too_few_images(tmp_path: Path, save_lines: Save) -> None:
    path = save_lines(tmp_path / "d.jsonl", [{"question": "?", "answers": ["a"]}] * 2)
    with pytest.raises(UserError, match="at least three different images"):
        load_task(str(path), "train")


def test_an_empty_folder_and_a_strange_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no parquet or JSON Lines"):
        load_task(str(tmp_path), "train")
    with pytest.raises(UserError, match="original files of textvqa"):
        load_task(f"textvqa={tmp_path}", "train")
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"cannot read .*d\.csv"):
        load_task(str(tmp_path / "d.csv"), "train")


def test_a_missing_annotation_file_is_named(tmp_path: Path, save_json: Save) -> None:
    save_json(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": []})
    with pytest.raises(UserError, match=r"no v2_mscoco_train2014_annotations\.json next to"):
        load_task(f"vqav2={tmp_path}", "train")


def test_list_tasks() -> None:
    assert list_tasks()[:2] == ("scenes", "textvqa")
