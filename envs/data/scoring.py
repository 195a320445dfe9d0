"""Scores of answers by the published rules of each benchmark: functions of prediction and answers to 0..1."""

import re
from collections.abc import Callable, Sequence
from typing import Final

from envs.errors import UserError

_ARTICLES: Final = frozenset({"a", "an", "the"})
_NUMBERS: Final = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
_PERIOD: Final = re.compile(r"\.(?!\d)")
_PERIODS_STRIPPED: Final = 32
"""The official evaluation passes a flag where the number of replacements goes; its value is 32."""

_CONTRACTED: Final = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905


def _misspelt(word: str) -> list[str]:
    """The word with each of its apostrophes left out in turn."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS: Final = {wrong: right for right in _CONTRACTED for wrong in _misspelt(right)} | {
    "somebody'd": "somebodyd"  # in this order in the official table
}


def normalize_vqa_answer(answer: str) -> str:
    """An answer as the VQA evaluation compares it.

    Lower case, without articles and most punctuation, number words as digits, contractions with their apostrophes.

    Source: the official evaluation of VQA (Antol et al. 2015, https://visualqa.org/evaluation).
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    glued = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        # A mark next to a space vanishes; one inside a word splits it.
        vanishes = glued or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if vanishes else " ")
    out = _PERIOD.sub("", out, count=_PERIODS_STRIPPED)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA soft accuracy after normalization: a third for every annotator who gave the predicted answer, at most 1."""
    wanted = normalize_vqa_answer(prediction)
    return min(1.0, sum(normalize_vqa_answer(answer) == wanted for answer in answers) / 3)


def vqa_exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals an accepted answer after `normalize_vqa_answer`, else 0."""
    wanted = normalize_vqa_answer(prediction)
    return float(any(normalize_vqa_answer(answer) == wanted for answer in answers))


def a_okvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Direct-answer accuracy of A-OKVQA: as `vqa_accuracy`, but only case and outer spaces are ignored."""
    wanted = prediction.strip().lower()
    return min(1.0, sum(answer.strip().lower() == wanted for answer in answers) / 3)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalized Levenshtein similarity with the closest answer, case ignored; 0.5 or less counts as 0.

    Source: Biten et al. 2019, "Scene Text Visual Question Answering", equation 1.
    """
    return max((_similarity(prediction, answer) for answer in answers), default=0.0)


def _similarity(one: str, two: str) -> float:
    one, two = one.lower(), two.lower()
    longest = max(len(one), len(two))
    similarity = 1.0 if longest == 0 else 1 - edit_distance(one, two) / longest
    return similarity if similarity > 0.5 else 0.0


def edit_distance(one: str, two: str) -> int:
    """Insertions, deletions and substitutions of single letters that turn one text into the other.

    Source: Wagner and Fischer 1974.
    """
    if len(one) < len(two):
        one, two = two, one
    row = list(range(len(two) + 1))
    for i, letter in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(two, start=1):
            substituted = diagonal + (letter != other)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals an accepted answer, case ignored, else 0."""
    wanted = prediction.lower()
    return float(any(answer.lower() == wanted for answer in answers))


def relaxed_correctness(prediction: str, answers: Sequence[str]) -> float:
    """1 if a number is within 5 % of an accepted one, or a text equal, case ignored, else 0; 5% is read as 0.05.

    Source: Methani et al. 2020, "PlotQA"; used by ChartQA.
    """
    return float(any(_relaxed(prediction, answer) for answer in answers))


def _relaxed(prediction: str, answer: str) -> bool:
    predicted, target = _number(prediction), _number(answer)
    if predicted is not None and target:
        return abs(predicted - target) / abs(target) <= 0.05
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def select_option(prediction: str, options: Sequence[str]) -> int:
    """Index of the option equal to a prediction; else the only one that contains it; else the nearest in edit distance.

    Case and outer spaces do not count.
    """
    wanted = prediction.strip().lower()
    names = [option.strip().lower() for option in options]
    if wanted in names:
        return names.index(wanted)
    containing = [index for index, name in enumerate(names) if wanted in name]
    if len(containing) == 1:
        return containing[0]
    distances = [edit_distance(wanted, name) for name in names]
    return distances.index(min(distances))


def multiple_choice(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    """1 if the selected option is an accepted answer, else 0."""
    return exact_match(options[select_option(prediction, options)], answers)


def extract_answer(text: str) -> str:
    """The answer in generated text: the part after the first `Answer:`, else the first line."""
    _, found, rest = text.partition("Answer:")
    if found:
        return rest.partition("Answer:")[0].strip()
    return " ".join(text.strip().partition("\n")[0].split())


METRICS: Final[dict[str, Callable[[str, Sequence[str]], float]]] = {
    "vqa": vqa_accuracy,
    "vqa_exact": vqa_exact_match,
    "a_okvqa": a_okvqa_accuracy,
    "anls": anls,
    "exact_match": exact_match,
    "relaxed": relaxed_correctness,
}
"""Scores by name, in addition to `multiple_choice:N`: N options lettered from A, answers letters."""

ANNOTATORS: Final = 10
"""Answers per question of VQA, one per annotator; from this number on, agreement is counted in a user's own data."""


def fitting_metric(metric: str, answers: int) -> str:
    """The metric under which a right answer scores 1 for a question with this many answers.

    `by_answers` is soft accuracy from ten answers and an exact match with any of fewer. Metrics that count annotators
    need three; with fewer they become the exact match, too.
    """
    if metric == "by_answers":
        return "vqa" if answers >= ANNOTATORS else "vqa_exact"
    return "vqa_exact" if metric in ("vqa", "a_okvqa") and answers < 3 else metric


def check_metric(metric: str) -> None:
    """Refuses a name that `score` does not know."""
    if metric not in METRICS and not re.fullmatch(r"multiple_choice:([2-9]|1\d|2[0-6])", metric):
        known = ", ".join(METRICS)
        raise UserError(f"unknown metric {metric!r}: choose one of {known} or multiple_choice:N with N from 2 to 26")


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """Score in 0..1 of generated text under a metric of `METRICS` or `multiple_choice:N`.

    Raises:
        UserError: an unknown metric.
    """
    check_metric(metric)
    answer = extract_answer(prediction)
    if metric in METRICS:
        return METRICS[metric](answer, answers)
    letters = [chr(ord("A") + i) for i in range(int(metric.partition(":")[2]))]
    return multiple_choice(answer, answers, letters)
