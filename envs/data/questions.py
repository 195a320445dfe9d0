"""One record of a data file to the questions in it, whatever the set calls its fields."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from envs.data.catalog import DataSet
from envs.data.scoring import check_metric
from envs.errors import UserError
from envs.processing.processor import with_options

_NESTED: Final = ("qas", "qa")
_QUESTION: Final[tuple[str, ...]] = ("question", "query")
_ANSWERS: Final = ("answers", "direct_answers", "label", "answer")
_OPTIONS: Final = ("choices", "options")
_RIGHT_OPTION: Final = ("correct_choice_idx", "answer", "answers")
FIELDS: Final = frozenset((*_NESTED, *_QUESTION, *_ANSWERS, *_OPTIONS, *_RIGHT_OPTION, "hint", "metric", "style"))
"""Fields that are read, besides the image and the set's `family`."""

_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class RowError(Exception):
    """What is wrong with a record. The reader adds where it stands."""


@dataclass(frozen=True)
class Question:
    """A question of a record; fields as in `Sample`."""

    question: str
    answers: tuple[str, ...]
    metric: str
    style: str | None
    family: str | None


def questions(fields: Mapping[str, Any], entry: DataSet) -> Iterator[Question]:
    """The questions of one record: one, or several where the set keeps them per image.

    Raises:
        RowError: a field that is missing, empty or of the wrong kind.
    """
    nested = next((fields[key] for key in _NESTED if isinstance(fields.get(key), list)), None)
    if nested is None:
        yield _question(fields, entry)
        return
    if not nested:
        raise RowError("the list of questions is empty")
    for inner in nested:
        if not isinstance(inner, Mapping):
            raise RowError(f"a question is {_shown(inner)}, not an object with question and answer")
        yield _question(inner, entry)


def has_answers(fields: Mapping[str, Any]) -> bool:
    """Whether a record holds any answer; published test splits often hold none."""
    nested = next((fields[key] for key in _NESTED if isinstance(fields.get(key), list)), None)
    if nested is not None:
        return any(isinstance(inner, Mapping) and has_answers(inner) for inner in nested)
    for key in (*_ANSWERS, "correct_choice_idx"):
        value = fields.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value >= 0
        try:
            if value is not None and any(_texts(value)):
                return True
        except RowError:
            return True  # something is there; reading it will say what is wrong with it
    return False


def _question(fields: Mapping[str, Any], entry: DataSet) -> Question:
    key, question = _first(fields, _QUESTION)
    if not isinstance(question, str) or not question.strip():
        raise RowError(f"{key or 'question'} is {_shown(question)}: give a text")
    question = question.strip()
    metric, style = fields.get("metric", entry.metric), fields.get("style", entry.style)
    options = _options(fields, metric)
    if options:
        answers: tuple[str, ...] = (_LETTERS[_right_option(fields, options)],)
        metric = f"multiple_choice:{len(options)}"
        hint = fields.get("hint")
        # The published model read the hint first, then the question.
        context = f"{hint.strip()}\n" if isinstance(hint, str) and hint.strip() else ""
        question = context + with_options(question, options)
    else:
        answers = _answers(fields)
    _check_own(metric, style)
    return Question(question, answers, metric, style, _family(fields, entry))


def _check_own(metric: Any, style: Any) -> None:
    try:
        check_metric(metric)
    except (UserError, TypeError):
        raise RowError(f"metric is {_shown(metric)}: give a known metric") from None
    if style is not None and not isinstance(style, str):
        raise RowError(f"style is {_shown(style)}: give a text")


def _options(fields: Mapping[str, Any], metric: Any) -> list[str]:
    """Options of a multiple-choice question; empty where the set asks for a direct answer."""
    key, options = _first(fields, _OPTIONS)
    if key == "choices" and metric != "multiple_choice":
        return []
    if options is None:
        if metric == "multiple_choice":
            raise RowError("choices are missing")
        return []
    if not isinstance(options, list) or not all(isinstance(o, str) and o for o in options):
        raise RowError(f"{key} is {_shown(options)}: give a list of texts")
    if not 2 <= len(options) <= len(_LETTERS):
        raise RowError(f"{key} holds {len(options)} options: give 2 to {len(_LETTERS)}")
    return options


def _right_option(fields: Mapping[str, Any], options: list[str]) -> int:
    key, given = _first(fields, _RIGHT_OPTION)
    right = given
    if isinstance(right, list) and len(right) == 1:
        right = right[0]
    if isinstance(right, str):
        if right in options:
            return options.index(right)
        letter = right.strip().upper()
        right = _LETTERS.index(letter) if len(letter) == 1 and letter in _LETTERS else right
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise RowError(
            f"{key or 'answer'} is {_shown(given)}: give one of the {len(options)} options, its letter or its index"
        )
    return right


def _answers(fields: Mapping[str, Any]) -> tuple[str, ...]:
    key, value = _first(fields, _ANSWERS)
    if value is None:
        raise RowError("answers are missing")
    answers = tuple(answer for answer in _texts(value) if answer)
    if not answers:
        raise RowError(f"{key} is {_shown(value)}: give at least one answer")
    return answers


def _texts(value: Any) -> list[str]:
    """Answers as texts.

    A text, a number, a list of either, of objects with `answer`, or its text.
    """
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            parsed = value
        value = parsed if isinstance(parsed, list) else value
    items = value if isinstance(value, list) else [value]
    return [_text(item) for item in items]


def _text(item: Any) -> str:
    if isinstance(item, Mapping):
        item = item.get("answer")
    if isinstance(item, bool) or not isinstance(item, str | int | float):
        raise RowError(f"an answer is {_shown(item)}: give texts or numbers")
    if isinstance(item, float) and item.is_integer():
        item = int(item)
    return str(item).strip()


def _family(fields: Mapping[str, Any], entry: DataSet) -> str | None:
    key, value = _first(fields, entry.family)
    if isinstance(value, list):
        value = value[0] if value else None
    if key in ("is_simple", "issimple") and value is not None:
        return "simple" if value else "complex"
    if key == "human_or_machine" and isinstance(value, int):
        return ("human", "machine")[value] if value in (0, 1) else None
    return str(value) if value not in (None, "") else None


def _first(fields: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The first key that has a value, and the value; the empty text and None if there is none."""
    return next(((key, fields[key]) for key in keys if fields.get(key) is not None), ("", None))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
