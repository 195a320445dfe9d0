"""A data set on disk in a public layout, by the commands of every other task: train, evaluate, answer, importance."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import fine, refused
from PIL import Image

from envs.data.scenes import load_scenes
from ray_ctrl.load_config import load_config

CONFIG = load_config("smoke")
ANNOTATORS = 10
# As the hub copy of TextVQA has them: published test splits come with empty answers.
SPLITS = {"train": 20, "validation": 6, "test": 4}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` keeps of the tables goes away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def textvqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images with questions in TextVQA's columns, one parquet file a split."""
    folder = tmp_path_factory.mktemp("textvqa")
    (folder / "data").mkdir()
    asked = iter(load_scenes("train"))
    seen: set[str] = set()
    for split, count in SPLITS.items():
        rows: dict[str, list[object]] = {"image_id": [], "question_id": [], "question": [], "image": [], "answers": []}
        while len(rows["image"]) < count:
            sample = next(asked)
            assert sample.image is not None
            if sample.image.digest in seen:
                continue
            seen.add(sample.image.digest)
            rows["image_id"].append(sample.id)
            rows["question_id"].append(len(seen))
            rows["question"].append(sample.question)
            rows["image"].append({"bytes": _png(sample.image.load()), "path": None})
            rows["answers"].append([sample.answers[0] if split != "test" else ""] * ANNOTATORS)
        pq.write_table(pa.table(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def run(textvqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own") / "run"
    done = fine("train", "--preset", "smoke", "--task", f"textvqa={textvqa}", "--run-dir", root)
    assert done.err == "", "reading tables leaves no progress bars in a log"
    return root


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def test_a_training_run_on_it_is_complete(run: Path, textvqa: Path) -> None:
    assert load_config(None, run / "config.yaml").task.name == f"textvqa={textvqa}"
    assert len((run / "metrics.jsonl").read_text("utf-8").splitlines()) == CONFIG.run.iterations
    assert (run / "controller" / "controller.safetensors").is_file()
    summary = json.loads((run / "evaluation" / "summary.json").read_text("utf-8"))
    assert {"controller", "lookup table", "full plan"} <= set(summary["methods"])
    # Its published validation split is what it is tested on.
    asked = {row["sample"] for row in _rows(run / "evaluation" / "rollouts.csv")}
    assert len(asked) == min(CONFIG.task.test_samples, SPLITS["validation"])


def test_it_is_evaluated_again_with_the_same_rows(run: Path, tmp_path: Path) -> None:
    fine("evaluate", run, "--out", tmp_path / "again")
    assert _rows(tmp_path / "again" / "rollouts.csv") == _rows(run / "evaluation" / "rollouts.csv")


def test_its_controller_answers_on_other_data(run: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "mine"
    pictures.mkdir()
    lines = []
    for number in range(6):
        Image.new("RGB", (150, 120 + number), (40 * number, 90, 160)).save(pictures / f"{number}.png")
        row = {"image": f"{number}.png", "question": "What color is it?", "answers": ["red"], "split": "test"}
        lines.append(json.dumps(row | ({"split": "train"} if number < 2 else {})))
    lines.append(json.dumps({"question": "How many?", "answers": ["2"], "split": "validation"}))
    (pictures / "mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fine("evaluate", run, "--task", pictures / "mine.jsonl", "--out", tmp_path / "out")
    assert len({row["sample"] for row in _rows(tmp_path / "out" / "rollouts.csv")}) == 4


def test_importance_is_measured_on_it_and_used(run: Path, textvqa: Path, tmp_path: Path) -> None:
    file = tmp_path / "importance.json"
    arguments = ("importance", "--task", f"textvqa={textvqa}", "--split", "train", "--samples", "4")
    done = fine(*arguments, "--out", file)
    for words in ("block importance by cross entropy, 4 samples", "in use: blocks", "left out first: blocks"):
        assert words in done.out
    content = json.loads(file.read_text("utf-8"))
    assert len(content["importance"]) == len(content["standard_error"]) == 16
    assert content["task"] == f"textvqa={textvqa}"
    assert -1 <= content["compared_with"]["in use"]["rank_correlation"] <= 1
    assert "left out first" in fine("inspect", file).out

    assert "exists already" in refused(*arguments, "--out", file)
    assert "exists already" in refused(*arguments), "the embedded model comes with its own"
    assert "test samples must choose nothing" in refused(
        "importance", "--split", "test", "--out", tmp_path / "other.json"
    )
    assert "no local folder" in refused("importance", "model.name=someone/model")
    assert "no file of block importance" in refused("evaluate", run, "model.block_importance=/no/such.json")

    # A controller's block counts stand for other blocks under other scores.
    content["importance"][1:] = [-score for score in content["importance"][1:]]
    file.write_text(json.dumps(content), encoding="utf-8")
    message = refused("evaluate", run, f"model.block_importance={file}", "--out", tmp_path / "evaluation")
    assert "trained with another block importance" in message
