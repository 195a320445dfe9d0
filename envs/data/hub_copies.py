"""What was found out about each data set on the hub without fetching it, and where."""

from dataclasses import dataclass
from typing import Final

_HUB: Final = "https://huggingface.co/datasets/"


@dataclass(frozen=True)
class HubCopy:
    """One repository of `envs.data.catalog`.

    Args:
        repo: owner/name.
        splits: the splits it lists, with their rows where those are known.
        columns: names and types of the columns that are read.
        seen: `card` where the repository's own card lists splits and columns; `viewer` where the splits are those of
            its data viewer, and the columns those that public code reads from it.
        note: what the table should add.
    """

    repo: str
    splits: str
    columns: str
    seen: str
    note: str = ""

    @property
    def source(self) -> str:
        """Where splits and columns were read."""
        return _HUB + self.repo + ("/viewer" if self.seen == "viewer" else "")


HUB_COPIES: Final = (
    HubCopy(
        "lmms-lab/textvqa",
        "train 34,602, validation 5,000, test 5,734",
        "image, question: text, answers: list of texts",
        "viewer",
        "columns from the card of pppop7/textvqa, a duplicate",
    ),
    HubCopy(
        "Multimodal-Fatima/VQAv2_train",
        "train 444k",
        "image, question: text, answers: list of texts, answer_type: text",
        "viewer",
        "columns as on the card of Multimodal-Fatima/VQAv2_sample_test, made alike",
    ),
    HubCopy(
        "lmms-lab/VQAv2",
        "validation 214,354, testdev 107,394, test 447,793",
        "image, question: text, answers: list of {answer: text, ...}, answer_type: text",
        "card",
    ),
    HubCopy(
        "Multimodal-Fatima/OK-VQA_train",
        "train 9.01k",
        "image, question: text, answers: list of texts, question_type: text",
        "card",
        "split from its viewer",
    ),
    HubCopy(
        "lmms-lab/OK-VQA",
        "val2014 5,046",
        "image, question: text, answers: list of texts, question_type: text",
        "card",
    ),
    HubCopy(
        "HuggingFaceM4/A-OKVQA",
        "train 17.1k, validation 1,145, test 6.7k",
        "image, question: text, choices: list of texts, correct_choice_idx: number, direct_answers: a list as text",
        "viewer",
    ),
    HubCopy(
        "derek-thomas/ScienceQA",
        "train 12,726, validation 4,241, test 4,241",
        "image (or none), question: text, choices: list of texts, answer: index, hint: text, subject: text",
        "card",
    ),
    HubCopy(
        "vikhyatk/tallyqa-test",
        "test 26.5k",
        "image, qa: list of {question, answer, is_simple}",
        "viewer",
        "a row is an image",
    ),
    HubCopy(
        "HuggingFaceM4/DocumentVQA",
        "train 39,463, validation 5,349, test 5,188",
        "image, question: text, answers: list of texts, question_types: list of texts",
        "card",
    ),
    HubCopy(
        "vikhyatk/st-vqa",
        "train",
        "image, qas: list of {question, answers}",
        "viewer",
        "split from the names of its files; a row is an image",
    ),
    HubCopy(
        "HuggingFaceM4/ChartQA",
        "train 28,299, val 1,920, test 2,500",
        "image, query: text, label: list of texts, human_or_machine: 0 or 1",
        "card",
    ),
)
"""Every hub repository that the table of data sets names."""


def hub_markdown() -> str:
    """The copies as a Markdown table, as it stands in `docs/data.md`."""
    lines = ["| hub copy | splits, rows | columns read | seen in |", "|---|---|---|---|"]
    for copy in HUB_COPIES:
        seen = f"[{copy.seen}]({copy.source}){f'; {copy.note}' if copy.note else ''}"
        lines.append(f"| {copy.repo} | {copy.splits} | {copy.columns} | {seen} |")
    return "\n".join(lines) + "\n"
