"""The public data sets known by name: where each comes from and how its rows are read.

One entry holds everything: hub copy, original files, prompt style of the published model, metric. What is known of the
hub copies, and from where, is in `envs.data.hub_copies`. `docs/data.md` shows both tables; a test keeps them equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from envs.errors import UserError


@dataclass(frozen=True)
class HubSplit:
    """Rows of one split on the Hugging Face hub."""

    repo: str
    split: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}{f' ({self.config})' if self.config else ''}: {self.split}"


@dataclass(frozen=True)
class DataSet:
    """One visual question answering set.

    Args:
        name: what `load_task` calls it.
        style: prompt style of the published model; None for a plain question.
        metric: a name of `envs.data.scoring.METRICS`, `multiple_choice`, or `by_answers` (see `fitting_metric`).
        columns: the columns of the hub copy that are read.
        hub: split -> rows on the hub. Splits without published answers are left out.
        files: split -> glob of the original JSON files below a folder. Split "" stands for files
            whose records name their split themselves.
        image: how the original records name their image: a format string over the record's fields,
            with `{split}` (train, val or test) and `{coco}` (train2014, val2014, test2015).
        family: fields that name the kind of question, the first present is used.
        images_only: rows without an image are left out silently; elsewhere they are broken.
    """

    name: str
    style: str | None
    metric: str
    columns: str = ""
    hub: Mapping[str, HubSplit] = field(default_factory=dict, hash=False)
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    image: str = "{image}"
    family: tuple[str, ...] = ()
    images_only: bool = False


_COCO: Final = "COCO_{coco}_{image_id:012d}.jpg"
_A_OKVQA: Final[dict[str, Any]] = {
    "hub": {
        "train": HubSplit("HuggingFaceM4/A-OKVQA", "train"),
        "validation": HubSplit("HuggingFaceM4/A-OKVQA", "validation"),
    },
    "files": {"train": "aokvqa_v*_train.json", "validation": "aokvqa_v*_val.json"},
    "image": "{image_id:012d}.jpg",
}

DATA_SETS: Final[tuple[DataSet, ...]] = (
    DataSet(
        name="textvqa",
        style="text_vqa",
        metric="vqa",
        columns="image, question, answers",
        hub={
            "train": HubSplit("lmms-lab/textvqa", "train"),
            "validation": HubSplit("lmms-lab/textvqa", "validation"),
        },
        files={"train": "TextVQA_*_train.json", "validation": "TextVQA_*_val.json"},
        image="{image_id}.jpg",
    ),
    DataSet(
        name="vqav2",
        style="vqa2",
        metric="vqa",
        columns="image, question, answers (text, or answer in a struct), answer_type",
        hub={
            "train": HubSplit("Multimodal-Fatima/VQAv2_train", "train"),
            "validation": HubSplit("lmms-lab/VQAv2", "validation"),
        },
        files={
            "train": "v2_OpenEnded_mscoco_train2014_questions.json",
            "validation": "v2_OpenEnded_mscoco_val2014_questions.json",
        },
        image=_COCO,
        family=("answer_type",),
    ),
    DataSet(
        name="okvqa",
        style="okvqa",
        metric="vqa",
        columns="image, question, answers, question_type",
        hub={
            "train": HubSplit("Multimodal-Fatima/OK-VQA_train", "train"),
            "validation": HubSplit("lmms-lab/OK-VQA", "val2014"),
        },
        files={
            "train": "OpenEnded_mscoco_train2014_questions.json",
            "validation": "OpenEnded_mscoco_val2014_questions.json",
        },
        image=_COCO,
        family=("question_type",),
    ),
    DataSet(
        name="aokvqa",
        style="a_okvqa_da",
        metric="a_okvqa",
        columns="image, question, direct_answers (a list, or its text)",
        **_A_OKVQA,
    ),
    DataSet(
        name="aokvqa_mc",
        style="a_okvqa_mc",
        metric="multiple_choice",
        columns="image, question, choices, correct_choice_idx",
        **_A_OKVQA,
    ),
    DataSet(
        name="scienceqa",
        style="science_qa",
        metric="multiple_choice",
        columns="image, question, hint, choices, answer (index), subject",
        hub={split: HubSplit("derek-thomas/ScienceQA", split) for split in ("train", "validation", "test")},
        files={"": "problems.json"},
        image="{split}/{key}/{image}",
        family=("subject",),
        images_only=True,
    ),
    DataSet(
        name="tallyqa",
        style="tally_qa",
        metric="exact_match",
        columns="image, qa: question, answer, is_simple",
        hub={"test": HubSplit("vikhyatk/tallyqa-test", "test")},
        files={"train": "train.json", "test": "test.json"},
        family=("is_simple", "issimple"),
    ),
    DataSet(
        name="docvqa",
        style="doc_qa",
        metric="anls",
        columns="image, question, answers, question_types",
        hub={split: HubSplit("HuggingFaceM4/DocumentVQA", split) for split in ("train", "validation")},
        files={"train": "train_v*.json", "validation": "val_v*.json"},
        family=("question_types",),
    ),
    DataSet(
        name="stvqa",
        style="st_qa",
        metric="anls",
        columns="image, qas: question, answers",
        hub={"train": HubSplit("vikhyatk/st-vqa", "train")},
        files={"train": "train_task_3.json"},
        image="{file_path}",
    ),
    DataSet(
        name="chartqa",
        style="chart_qa",
        metric="relaxed",
        columns="image, query, label, human_or_machine",
        hub={
            "train": HubSplit("HuggingFaceM4/ChartQA", "train"),
            "validation": HubSplit("HuggingFaceM4/ChartQA", "val"),
            "test": HubSplit("HuggingFaceM4/ChartQA", "test"),
        },
        files={
            "train": "train/train_*.json",
            "validation": "val/val_*.json",
            "test": "test/test_*.json",
        },
        image="{split}/png/{imgname}",
        family=("human_or_machine",),
    ),
)

OWN: Final = DataSet(name="own", style=None, metric="by_answers", family=("family",))
"""How a user's own files are read: rows may name metric, style, family and options themselves."""


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


_BY_NAME: Final = {_plain(entry.name): entry for entry in DATA_SETS}


def is_data_set(name: str) -> bool:
    """Whether the table has a set of this name; case, hyphens and underscores do not count."""
    return _plain(name) in _BY_NAME


def data_set(name: str) -> DataSet:
    """The table's entry of this name.

    Raises:
        UserError: no such set.
    """
    if not is_data_set(name):
        known = ", ".join(entry.name for entry in DATA_SETS)
        raise UserError(f"unknown data set {name!r}: choose one of {known}")
    return _BY_NAME[_plain(name)]


def data_set_on_hub(repo: str) -> DataSet | None:
    """The table's first entry with a split in this hub repository."""
    for entry in DATA_SETS:
        if any(source.repo == repo for source in entry.hub.values()):
            return entry
    return None


def table_markdown() -> str:
    """The table as Markdown, as it stands in `docs/data.md`."""
    lines = [
        "| name | hub copy | columns read | original files | prompt style | metric |",
        "|---|---|---|---|---|---|",
    ]
    for entry in DATA_SETS:
        hub = "<br>".join(dict.fromkeys(str(source) for source in entry.hub.values()))
        files = "<br>".join(f"`{glob}`" for glob in entry.files.values())
        cells = (entry.name, hub, entry.columns, files, entry.style or "", entry.metric)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
