"""The public data sets known by name: where each comes from, how its rows are read and answers scored.

`docs/data.md` shows them as a table, with what is known of the columns of each hub copy; tests compare the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from envs.errors import UserError


class HubSplit(NamedTuple):
    """Rows of one split on the Hugging Face hub."""

    repo: str
    split: str

    def __str__(self) -> str:
        return f"{self.repo}: {self.split}"


@dataclass(frozen=True)
class DataSet:
    """One visual question answering set.

    Args:
        name: its name in `load_task`.
        style: prompt style of the published model; None for a plain question.
        metric: a name of `envs.data.scoring.METRICS`, `multiple_choice`, or `by_answers` (see `fitting_metric`).
        hub: split -> rows on the hub. Splits without published answers are left out.
        files: split -> glob of the original JSON files. Split "" is for files whose records name their split.
        image: how the original records name their image: a format string over the record's fields,
            with `{split}` (train, val or test) and `{coco}` (train2014, val2014, test2015).
        family: fields that name the kind of question; the first present is used.
        images_only: whether rows without an image are left out silently; otherwise they are invalid.
    """

    name: str
    style: str | None
    metric: str
    hub: Mapping[str, HubSplit] = field(default_factory=dict, hash=False)
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    image: str = "{image}"
    family: tuple[str, ...] = ()
    images_only: bool = False


def _hub(**splits: str) -> dict[str, HubSplit]:
    """Splits given as "repository:split"."""
    return {name: HubSplit(*place.split(":")) for name, place in splits.items()}


_PARTS: Final = {"train": "train", "validation": "val", "test": "test"}
_TWO_PARTS: Final = {"train": "train", "validation": "val"}
_COCO: Final = "COCO_{coco}_{image_id:012d}.jpg"
_A_OKVQA_HUB: Final = _hub(train="HuggingFaceM4/A-OKVQA:train", validation="HuggingFaceM4/A-OKVQA:validation")
_A_OKVQA_FILES: Final = {"train": "aokvqa_v*_train.json", "validation": "aokvqa_v*_val.json"}
_A_OKVQA_IMAGE: Final = "{image_id:012d}.jpg"

DATA_SETS: Final = (
    DataSet(
        "textvqa",
        "text_vqa",
        "vqa",
        _hub(train="lmms-lab/textvqa:train", validation="lmms-lab/textvqa:validation"),
        {"train": "TextVQA_*_train.json", "validation": "TextVQA_*_val.json"},
        "{image_id}.jpg",
    ),
    DataSet(
        "vqav2",
        "vqa2",
        "vqa",
        _hub(train="Multimodal-Fatima/VQAv2_train:train", validation="lmms-lab/VQAv2:validation"),
        {split: f"v2_OpenEnded_mscoco_{part}2014_questions.json" for split, part in _TWO_PARTS.items()},
        _COCO,
        ("answer_type",),
    ),
    DataSet(
        "okvqa",
        "okvqa",
        "vqa",
        _hub(train="Multimodal-Fatima/OK-VQA_train:train", validation="lmms-lab/OK-VQA:val2014"),
        {split: f"OpenEnded_mscoco_{part}2014_questions.json" for split, part in _TWO_PARTS.items()},
        _COCO,
        ("question_type",),
    ),
    DataSet("aokvqa", "a_okvqa_da", "a_okvqa", _A_OKVQA_HUB, _A_OKVQA_FILES, _A_OKVQA_IMAGE),
    DataSet("aokvqa_mc", "a_okvqa_mc", "multiple_choice", _A_OKVQA_HUB, _A_OKVQA_FILES, _A_OKVQA_IMAGE),
    DataSet(
        "scienceqa",
        "science_qa",
        "multiple_choice",
        {split: HubSplit("derek-thomas/ScienceQA", split) for split in ("train", "validation", "test")},
        {"": "problems.json"},
        "{split}/{key}/{image}",
        ("subject",),
        images_only=True,
    ),
    DataSet(
        "tallyqa",
        "tally_qa",
        "exact_match",
        _hub(test="vikhyatk/tallyqa-test:test"),
        {"train": "train.json", "test": "test.json"},
        family=("is_simple", "issimple"),
    ),
    DataSet(
        "docvqa",
        "doc_qa",
        "anls",
        _hub(train="HuggingFaceM4/DocumentVQA:train", validation="HuggingFaceM4/DocumentVQA:validation"),
        {"train": "train_v*.json", "validation": "val_v*.json"},
        family=("question_types",),
    ),
    DataSet(
        "stvqa", "st_qa", "anls", _hub(train="vikhyatk/st-vqa:train"), {"train": "train_task_3.json"}, "{file_path}"
    ),
    DataSet(
        "chartqa",
        "chart_qa",
        "relaxed",
        {split: HubSplit("HuggingFaceM4/ChartQA", part) for split, part in _PARTS.items()},
        {split: f"{part}/{part}_*.json" for split, part in _PARTS.items()},
        "{split}/png/{imgname}",
        ("human_or_machine",),
    ),
)

OWN: Final = DataSet("own", style=None, metric="by_answers", family=("family",))
"""How a user's own files are read: rows may name metric, style, family and options themselves."""


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


_BY_NAME: Final = {_plain(entry.name): entry for entry in DATA_SETS}


def is_data_set(name: str) -> bool:
    """Whether there is a public set of this name; case, hyphens and underscores do not count."""
    return _plain(name) in _BY_NAME


def data_set(name: str) -> DataSet:
    """The public set of this name.

    Raises:
        UserError: no such set.
    """
    if not is_data_set(name):
        known = ", ".join(entry.name for entry in DATA_SETS)
        raise UserError(f"unknown data set {name!r}: choose one of {known}")
    return _BY_NAME[_plain(name)]


def data_set_on_hub(repo: str) -> DataSet | None:
    """The first public set with a split in this hub repository."""
    return next((entry for entry in DATA_SETS if any(source.repo == repo for source in entry.hub.values())), None)
