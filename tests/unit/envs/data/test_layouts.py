"""Every public set is read from its original files and from parquet in its hub copy's columns."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.data import Sample, load_task, questions
from envs.data.catalog import DATA_SETS, data_set, is_data_set
from envs.data.scoring import METRICS

Save = Callable[..., Path]
Picture = Callable[..., bytes]
TEN = [{"answer": "red", "answer_id": i, "answer_confidence": "yes"} for i in range(10)]


def everything(task: str) -> list[Sample]:
    splits = {split: list(load_task(task, split)) for split in ("train", "validation", "test")}
    digests = {s: {x.image.digest for x in v if x.image} for s, v in splits.items()}
    assert not digests["train"] & digests["test"]
    assert not digests["train"] & digests["validation"]
    assert not digests["validation"] & digests["test"]
    samples = [sample for split in splits.values() for sample in split]
    for sample in samples:
        assert sample.image is not None
        assert sample.image.load().size == sample.image.size
        assert sample.image.load().mode == "RGB"
    return samples


def original(name: str, folder: Path, json: Save, image: Save) -> int:
    """Writes a small copy of the set in its original files; returns how many questions it has."""
    n = 6
    if name == "textvqa":
        for split, start in (("train", 0), ("val", n)):
            rows = [
                {"question": f"what {i}?", "image_id": f"a{i:02}", "answers": ["red"] * 10}
                for i in range(start, start + n)
            ]
            json(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": rows})
        for i in range(2 * n):
            image(folder / "train_images" / f"a{i:02}.jpg", i)
        return 2 * n
    if name in ("vqav2", "okvqa"):
        v2 = "v2_" if name == "vqav2" else ""
        for split, start in (("train2014", 0), ("val2014", n)):
            ids = range(start, start + n)
            asked = [{"question_id": i * 7, "image_id": i, "question": f"is {i}?"} for i in ids]
            annotated = [{"question_id": i * 7, "answers": TEN, "answer_type": "other"} for i in ids]
            json(folder / f"{v2}OpenEnded_mscoco_{split}_questions.json", {"questions": asked})
            json(folder / f"{v2}mscoco_{split}_annotations.json", {"annotations": annotated})
            for i in ids:
                image(folder / split / f"COCO_{split}_{i:012d}.jpg", i)
        return 2 * n
    if name in ("aokvqa", "aokvqa_mc"):
        for split, start in (("train", 0), ("val", n)):
            rows = [
                {
                    "split": split,
                    "image_id": i,
                    "question_id": f"q{i}",
                    "question": "why?",
                    "choices": ["rain", "sun", "snow", "wind"],
                    "correct_choice_idx": 2,
                    "direct_answers": ["snow"] * 9 + ["cold"],
                }
                for i in range(start, start + n)
            ]
            json(folder / f"aokvqa_v1p0_{split}.json", rows)
            for i in range(start, start + n):
                image(folder / f"{split}2017" / f"{i:012d}.jpg", i)
        return 2 * n
    if name == "scienceqa":
        problems = {}
        for i in range(n):
            split = ("train", "val", "test")[i % 3]
            problems[str(i)] = {
                "question": "Which one?",
                "choices": ["A goat", "A sheep"],
                "answer": i % 2,
                "hint": "Look." if i else "",
                "image": "image.png",
                "split": split,
                "subject": "natural science",
            }
            image(folder / "images" / split / str(i) / "image.png", i)
        problems["99"] = {**problems["0"], "image": None}
        json(folder / "problems.json", problems)
        return n
    if name == "tallyqa":
        for split, start in (("train", 0), ("test", n)):
            rows = [
                {
                    "image": f"VG_100K/{i}.jpg",
                    "question": "how many?",
                    "answer": i,
                    "issimple": i % 2 == 0,
                }
                for i in range(start, start + n)
            ]
            json(folder / f"{split}.json", rows)
        for i in range(2 * n):
            image(folder / "VG_100K" / f"{i}.jpg", i)
            image(folder / "VG_100K_2" / f"{i}.jpg", 100 + i)
        return 2 * n
    if name == "docvqa":
        for split, start in (("train", 0), ("val", n)):
            rows = [
                {
                    "question": "when?",
                    "image": f"documents/d{i}.png",
                    "answers": ["1999", "in 1999"],
                    "question_types": ["form", "layout"],
                }
                for i in range(start, start + n)
            ]
            json(folder / f"{split}_v1.0_withQT.json", {"data": rows})
        for i in range(2 * n):
            image(folder / "spdocvqa_images" / f"d{i}.png", i)
        return 2 * n
    if name == "stvqa":
        rows = [
            {"question": "what word?", "file_path": f"coco-text/{i}.jpg", "answers": ["Stop", "STOP"]} for i in range(n)
        ]
        json(folder / "train_task_3.json", {"task_name": "task3", "data": rows})
        for i in range(n):
            image(folder / "coco-text" / f"{i}.jpg", i)
        return n
    assert name == "chartqa"
    for number, split in enumerate(("train", "val", "test")):
        for half, kind in enumerate(("human", "augmented")):
            i = 2 * number + half
            row = {"imgname": f"{i}.png", "query": "how much?", "label": "14.5"}
            json(folder / split / f"{split}_{kind}.json", [row])
            image(folder / split / "png" / f"{i}.png", i)
    return n


@pytest.mark.parametrize("entry", DATA_SETS, ids=lambda entry: entry.name)
def test_original_files(entry: Any, tmp_path: Path, save_json: Save, save_picture: Save) -> None:
    folder = tmp_path / "some" / "where"
    count = original(entry.name, folder, save_json, save_picture)
    samples = everything(f"{entry.name}={tmp_path}")
    assert len(samples) == count
    assert len({s.id for s in samples}) == count
    assert {s.style for s in samples} == {entry.style}
    assert {s.metric.partition(":")[0] for s in samples} == {entry.metric}


EXPECTED = {
    "textvqa": ("what 0?", ("red",) * 10, "vqa", None),
    "vqav2": ("is 0?", ("red",) * 10, "vqa", "other"),
    "okvqa": ("is 0?", ("red",) * 10, "vqa", None),
    "aokvqa": ("why?", ("snow",) * 9 + ("cold",), "a_okvqa", None),
    "aokvqa_mc": (
        "why?\nA: rain\nB: sun\nC: snow\nD: wind\n",
        ("C",),
        "multiple_choice:4",
        None,
    ),
    "scienceqa": (
        "Which one?\nA: A goat\nB: A sheep\n",
        ("A",),
        "multiple_choice:2",
        "natural science",
    ),
    "tallyqa": ("how many?", ("0",), "exact_match", "simple"),
    "docvqa": ("when?", ("1999", "in 1999"), "anls", "form"),
    "stvqa": ("what word?", ("Stop", "STOP"), "anls", None),
    "chartqa": ("how much?", ("14.5",), "relaxed", None),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_fields_and_image_of_a_record(name: str, tmp_path: Path, save_json: Save, save_picture: Save) -> None:
    original(name, tmp_path, save_json, save_picture)
    samples = everything(f"{name}={tmp_path}")
    one = save_picture(tmp_path.parent / "one.jpg", 0)
    if name in ("scienceqa", "docvqa", "chartqa"):
        one = save_picture(tmp_path.parent / "one.png", 0)
    pixels = one.read_bytes()
    first = [s for s in samples if s.image and Path(s.image.path).read_bytes() == pixels]
    assert [(s.question, s.answers, s.metric, s.family) for s in first] == [EXPECTED[name]]


HUB_COLUMNS: dict[str, dict[str, Any]] = {
    "textvqa": {"question": "what?", "answers": ["red"] * 10, "image_classes": ["a"]},
    "vqav2": {"question": "is it?", "answers": TEN, "answer_type": "yes/no"},
    "okvqa": {"question": "is it?", "answers": ["red"] * 10, "question_type": "one"},
    "aokvqa": {
        "question": "why?",
        "choices": ["rain", "sun"],
        "correct_choice_idx": 1,
        "direct_answers": "['snow', \"it's cold\"]",
    },
    "aokvqa_mc": {"question": "why?", "choices": ["rain", "sun"], "correct_choice_idx": 1},
    "scienceqa": {
        "question": "Which?",
        "choices": ["x", "y"],
        "answer": 1,
        "hint": "Look closely.",
        "subject": "social science",
    },
    "tallyqa": {"qa": [{"question": "how many?", "answer": 3, "is_simple": False}]},
    "docvqa": {"question": "when?", "answers": ["1999"], "question_types": ["form"]},
    "stvqa": {"qas": [{"question": "what?", "answers": ["a", "b"]}]},
    "chartqa": {"query": "how much?", "label": ["12"], "human_or_machine": 1},
}
FROM_HUB = {
    "textvqa": ("what?", ("red",) * 10, None),
    "vqav2": ("is it?", ("red",) * 10, "yes/no"),
    "okvqa": ("is it?", ("red",) * 10, "one"),
    "aokvqa": ("why?", ("snow", "it's cold"), None),
    "aokvqa_mc": ("why?\nA: rain\nB: sun\n", ("B",), None),
    "scienceqa": ("Look closely.\nWhich?\nA: x\nB: y\n", ("B",), "social science"),
    "tallyqa": ("how many?", ("3",), "complex"),
    "docvqa": ("when?", ("1999",), "form"),
    "stvqa": ("what?", ("a", "b"), None),
    "chartqa": ("how much?", ("12",), "machine"),
}


@pytest.mark.parametrize("name", HUB_COLUMNS)
def test_parquet_in_the_hub_copys_columns(name: str, tmp_path: Path, save_parquet: Save, picture: Picture) -> None:
    for part, split in enumerate(("train", "train", "validation")):
        images = [picture(10 * part + i) for i in range(4)]
        columns = {key: [value] * 4 for key, value in HUB_COLUMNS[name].items()}
        file = tmp_path / "data" / f"{split}-{part:05d}-of-00003-0a1b2c.parquet"
        save_parquet(file, {"image": images, **columns})
    samples = everything(f"{name}={tmp_path}")
    assert len(samples) == 12
    assert {(s.question, s.answers, s.family) for s in samples} == {FROM_HUB[name]}
    assert len(load_task(f"{name}={tmp_path}", "test")) == 4


def test_the_hub_copy_is_read_through_datasets(
    monkeypatch: pytest.MonkeyPatch, picture: Picture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    asked = []

    class Builder:
        info = SimpleNamespace(download_size=13_000_000_000)
        cache_dir = str(tmp_path / "missing")

        def __init__(self, repo: str, *, revision: str | None) -> None:
            self.repo, self.revision = repo, revision

        def download_and_prepare(self) -> None:
            assert "HuggingFaceM4/ChartQA: fetching 13.0 GB from the hub" in caplog.text

        def as_dataset(self, *, split: str) -> Any:
            asked.append((self.repo, split, self.revision))
            images = [{"bytes": picture(100 * len(asked) + i), "path": None} for i in range(12)]
            columns = {"image": images, "query": ["?"] * 12, "label": [["1"]] * 12}
            rows = datasets.Dataset.from_dict(columns)
            file = f"{datasets.config.HF_DATASETS_CACHE}/{split}"
            rows.cast_column("image", datasets.Image()).save_to_disk(file)
            return datasets.load_from_disk(file)

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    assert len(everything("chartqa")) == 36
    repo = "HuggingFaceM4/ChartQA"
    assert asked == [(repo, s, None) for s in ("train", "val", "test")]


def test_names_are_forgiving() -> None:
    assert data_set("OK-VQA").name == "okvqa"
    assert data_set("A_OKVQA").name == "aokvqa"
    assert not is_data_set("nothing")


def documented(first_column: str) -> dict[str, list[str]]:
    """Rows of the table in docs/data.md that begins with this column, by their first cell."""
    lines = (Path(__file__).parents[4] / "docs" / "data.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {first: rest for first, *rest in cells}


def test_the_documented_sets_are_the_known_ones() -> None:
    table = documented("name")
    assert list(table) == [entry.name for entry in DATA_SETS]
    for entry in DATA_SETS:
        hub, columns, files, style, metric = table[entry.name]
        assert hub.split("<br>") == [str(source) for source in entry.hub.values()]
        assert files.split("<br>") == [f"`{glob}`" for glob in entry.files.values()]
        assert (style, metric) == (entry.style, entry.metric)
        assert set(re.findall(r"\w+", columns)) & {"question", "query"}


def test_every_hub_copy_is_documented() -> None:
    table = documented("hub copy")
    named = {(source.repo, source.split) for entry in DATA_SETS for source in entry.hub.values()}
    assert {repo for repo, _ in named} == set(table)
    for repo, split in named:
        splits, _, seen = table[repo]
        assert split in splits.replace(",", " ").split()
        assert f"https://huggingface.co/datasets/{repo}" in seen
    for entry in DATA_SETS:
        for source in entry.hub.values():
            assert all(c in table[source.repo][1] for c in HUB_COLUMNS[entry.name].keys() - {"image_classes"})


def test_the_documented_fields_are_those_that_are_read() -> None:
    names = {what: tuple(re.findall("`(.+?)`", cells[0])) for what, cells in documented("what").items()}
    assert names["image"] == questions.IMAGE_FIELDS
    assert names["question"] == questions._QUESTION
    assert names["questions of one image"] == questions._NESTED
    assert names["answers"] == questions._ANSWERS
    assert names["options"] == questions._OPTIONS
    assert names["right option"] == questions._RIGHT_OPTION
    assert {name for cells in names.values() for name in cells} == questions.FIELDS | set(questions.IMAGE_FIELDS)


def test_the_documented_metrics_are_those_that_score() -> None:
    assert list(documented("metric | rule")) == [f"`{name}`" for name in (*METRICS, "multiple_choice:N")]
