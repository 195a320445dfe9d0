"""The questions in one record of a data file, whatever the set calls its fields; docs/data.md has the names."""

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from itertools import takewhile
from string import ascii_lowercase, ascii_uppercase
from typing import Any, Final, NamedTuple

from envs.data.catalog import OWN, DataSet
from envs.data.scoring import check_metric, fitting_metric
from envs.errors import UserError
from envs.processing.images import IMAGE_ENDINGS, excerpt
from envs.processing.prompt import with_options

_NESTED: Final = ("qas", "qa")
_QUESTION: Final[tuple[str, ...]] = ("question", "query")
_ANSWERS: Final = ("answers", "direct_answers", "label", "answer")
_OPTIONS: Final = ("choices", "options", "answer_choices", "multiple_choices", "candidates", "alternatives")
_RIGHT_OPTION: Final = (
    *("correct_choice_idx", "correct_choice", "correct_answer", "answer_idx", "answer_index", "answer_key"),
    *("answer", "answers", "label"),
)
_QUOTED_LIST: Final = r"\s*\[\s*['\"]"
_OTHER: Final = ("hint", "metric", "style", "family", "split")
FIELDS: Final = frozenset((*_NESTED, *_QUESTION, *_ANSWERS, *_OPTIONS, *_RIGHT_OPTION, *_OTHER))
"""Fields that are read, in addition to the image, lettered options and the set's `family`."""

IMAGE_FIELDS: Final = (
    *("image", "images", "img", "image_bytes", "image_path", "image_file", "image_name", "picture", "photo"),
    *("jpg", "jpeg", "png", "webp", "file_name", "filename", "file_path"),
)
"""Names of an image; the first with a value is read."""

_LETTERED: Final = re.compile("(?:(?:option|choice)_?)?([a-z])")
_NUMBERED: Final = re.compile("(?:option|choice|candidate|alternative|ending)_?[0-9]+")
_OPTION_WORDS: Final = frozenset(
    ("option", "options", "choice", "choices", "candidates", "alternatives", "opts", "endings")
)
_IMAGE_WORDS: Final = frozenset(
    ("image", "images", "img", "picture", "pictures", "photo", "photos", "jpg", "png", "pixel", "pixels")
)
_BASE64_IMAGE: Final = re.compile(r"\s*(data:image|/9j/|iVBORw0KGgo|R0lGOD|UklGR[A-Za-z0-9+/]{7}RUJQ)")
"""The first letters of a JPEG, PNG, GIF or WebP file in base64."""
_NO_IMAGE: Final = re.compile(
    r"ids?|index|width|height|w|h|size|count|num|class(es)?|category|captions?|description|text|type|format|source|"
    r"license|split|tags|labels?|hash|md5|sha256"
)
"""Words that make the name of an image column one about the image."""


class RowError(Exception):
    """What is wrong with a record; the reader adds its place."""


class Question(NamedTuple):
    """A question of a record; fields as in `Sample`."""

    question: str
    answers: tuple[str, ...]
    metric: str
    style: str | None
    family: str | None


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """A field's name as it is compared: in lower case, with `_` for `-`, a space or in camelCase."""
    return re.sub(r"[\s-]", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())).lower()


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their plain names; of two that become equal, the one that is written plainly counts."""
    return {plain_name(name): value for name, value in sorted(fields.items(), key=lambda f: f[0] == plain_name(f[0]))}


def image_names(names: Iterable[str]) -> list[str]:
    """The names of fields or columns that are those of an image, in the order in which they are tried."""
    known = [name for name in names if plain_name(name) in IMAGE_FIELDS]
    return sorted(known, key=lambda name: IMAGE_FIELDS.index(plain_name(name)))


def is_read(name: str) -> bool:
    """Whether a field other than the image is read, or looks like options and so must be."""
    plain = plain_name(name)
    lettered = _LETTERED.fullmatch(plain) or _NUMBERED.fullmatch(plain)
    return plain in FIELDS or bool(lettered) or not _words(name).isdisjoint(_OPTION_WORDS)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", plain_name(name)))


def unread_image(fields: Mapping[str, Any]) -> str:
    """What is wrong with a row without an image if an unread field looks like one; empty if nothing."""
    for name, value in fields.items():
        if value and not is_read(name) and _looks_like_image(name, value):
            return f"field {excerpt(name)} is {excerpt(value)}, looks like an image and is not read: name it image"
    return ""


def _looks_like_image(name: str, value: Any) -> bool:
    words = {word.rstrip("0123456789") for word in _words(name)}
    about = any(map(_NO_IMAGE.fullmatch, words))
    if words & _IMAGE_WORDS and not about and isinstance(value, str | list | Mapping):
        return True
    if isinstance(value, list):
        return bool(value) and _looks_like_image("", value[0])
    if isinstance(value, Mapping):
        return any(_looks_like_image(plain_name(str(inner)), v) for inner, v in value.items() if v)
    if isinstance(value, str):
        return value.lower().endswith(IMAGE_ENDINGS) or bool(_BASE64_IMAGE.match(value))
    return isinstance(value, bytes)


def questions(fields: Mapping[str, Any], entry: DataSet) -> Iterator[Question]:
    """The questions of one record: one, or several if the set has them per image.

    Raises:
        RowError: a field that is missing, empty or of the wrong kind.
    """
    nested = _nested(fields)
    if nested is None:
        yield _question(fields, entry)
        return
    if not nested:
        raise RowError("the list of questions is empty")
    for inner in nested:
        if not isinstance(inner, Mapping):
            raise RowError(f"a question is {excerpt(inner)}, not an object with question and answer")
        yield _question(plain_fields(inner), entry)


def _nested(fields: Mapping[str, Any]) -> list[Any] | None:
    return next((fields[key] for key in _NESTED if isinstance(fields.get(key), list)), None)


def has_answers(fields: Mapping[str, Any]) -> bool:
    """Whether a record has any answer; published test splits often have none."""
    nested = _nested(fields)
    if nested is not None:
        return any(isinstance(inner, Mapping) and has_answers(plain_fields(inner)) for inner in nested)
    for key in (*_ANSWERS, *_RIGHT_OPTION):
        value = fields.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value >= 0
        try:
            if value is not None and any(_texts(value, key != "answer")):
                return True
        except RowError:
            return True  # something is there; reading it will say what is wrong with it
    return False


def _question(fields: Mapping[str, Any], entry: DataSet) -> Question:
    key, question = _first(fields, _QUESTION)
    if not isinstance(question, str) or not question.strip():
        raise RowError(f"{key or 'question'} is {excerpt(question)}: give a text")
    question = question.strip()
    (_, metric), (_, style) = _first(fields, ("metric",)), _first(fields, ("style",))
    style = entry.style if style is None else style
    options = _options(fields, entry, metric)
    if options:
        answers: tuple[str, ...] = (ascii_uppercase[_right_option(fields, options)],)
        metric = f"multiple_choice:{len(options)}"
        hint = fields.get("hint")
        # The published model read the hint first, then the question.
        context = f"{hint.strip()}\n" if isinstance(hint, str) and hint.strip() else ""
        question = context + with_options(question, options)
    else:
        answers = _answers(fields)
        metric = fitting_metric(entry.metric, len(answers)) if metric is None else metric
        _check_metric(metric, answers)
    if style is not None and not isinstance(style, str):
        raise RowError(f"style is {excerpt(style)}: give a text")
    asked = Question(question, answers, metric, style, _family(fields, entry))
    for text in (question, *answers, style or "", asked.family or ""):
        if re.search("[\ud800-\udfff]", text):
            raise RowError(f"{excerpt(text)} contains half a character (a lone surrogate): write the text as UTF-8")
    return asked


def _check_metric(metric: Any, answers: tuple[str, ...]) -> None:
    try:
        check_metric(metric)
    except (UserError, TypeError):
        raise RowError(f"metric is {excerpt(metric)}: give a known metric") from None
    if fitting_metric(metric, len(answers)) != metric:
        raise RowError(
            f"metric {metric} needs the answers of three annotators or more, and the row has {len(answers)}: "
            "leave metric out, or give vqa_exact"
        )


def _options(fields: Mapping[str, Any], entry: DataSet, metric: Any) -> list[str]:
    """Options of a multiple-choice question; empty for a direct question."""
    key, options = _first(fields, _OPTIONS)
    options = _parsed(options) if isinstance(options, str) else options
    if options is None and entry is OWN:
        key, options = _lettered_options(fields)
    wanted = "multiple_choice" in (entry.metric, metric)
    if options is None and wanted:
        raise RowError("choices are missing")
    if options is None or (entry is not OWN and not wanted):
        return []
    if not isinstance(options, list) or not all(isinstance(o, str) and o for o in options):
        raise RowError(f"{key} is {excerpt(options)}: give a list of texts")
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise RowError(f"{key} has {len(options)} options: give 2 to {len(ascii_uppercase)}")
    return options


def _lettered_options(fields: Mapping[str, Any]) -> tuple[str, list[Any] | None]:
    """Options in fields of their own (`A`, `option_b`), in order; None without A and B.

    Raises:
        RowError: other fields that look like options: a list, numbered fields, or numbers as A and B.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    by_letter = {match[1]: value for name, value in given.items() if (match := _LETTERED.fullmatch(name))}
    options = [by_letter[letter] for letter in takewhile(by_letter.__contains__, ascii_lowercase)]
    if len(options) > 1 and all(isinstance(option, str) for option in options):
        return "A, B, ...", options
    numbered = [name for name in given if _NUMBERED.fullmatch(name)]
    _, right = _first(fields, _RIGHT_OPTION)
    if len(options) > 1 and _letter(right) is not None:
        raise RowError(f"A, B, ... are {excerpt(options)}: write the options as texts")
    if len(numbered) > 1:
        raise RowError(f"fields {', '.join(map(excerpt, numbered[:2]))} look like options: give a list, choices")
    for name, value in given.items():
        if isinstance(value, list | Mapping) and value and name not in FIELDS and _words(name) & _OPTION_WORDS:
            raise RowError(f"field {excerpt(name)} is {excerpt(value)} and looks like options: name it choices")
    return "", None


def _letter(given: Any) -> int | None:
    """The place in the alphabet of a letter as answers name options: B, (b), B."""
    match = re.fullmatch(r"\(?([A-Z])[).:]*", given.strip().upper()) if isinstance(given, str) else None
    return ascii_uppercase.index(match[1]) if match else None


def _right_option(fields: Mapping[str, Any], options: list[str]) -> int:
    """Index of the right option.

    Raises:
        RowError: none is named, or two fields name different ones.
    """
    named = {key: found for key in _RIGHT_OPTION if (found := _option_of(fields.get(key), options)) is not None}
    key, given = _first(fields, _RIGHT_OPTION)
    if key not in named:
        raise RowError(
            f"{key or 'answer'} is {excerpt(given)}: give one of the {len(options)} options, its letter or its index"
        )
    other = next((name for name, index in named.items() if index != named[key]), None)
    if other:
        raise RowError(
            f"{key} is {excerpt(given)} and {other} is {excerpt(fields[other])}, two different options (an index "
            "counts from 0): leave the wrong one out"
        )
    return named[key]


def _option_of(given: Any, options: list[str]) -> int | None:
    """The index of the option that a text, a letter or an index names; None if it names none."""
    right = given[0] if isinstance(given, list) and len(given) == 1 else given
    if isinstance(right, str):
        right = options.index(right) if right in options else _letter(right)
    is_index = isinstance(right, int) and not isinstance(right, bool)
    return right if is_index and 0 <= right < len(options) else None


def _answers(fields: Mapping[str, Any]) -> tuple[str, ...]:
    key, value = _first(fields, _ANSWERS)
    if value is None:
        raise RowError("answers are missing")
    answers = tuple(answer for answer in _texts(value, key != "answer") if answer)
    if not answers:
        raise RowError(f"{key} is {excerpt(value)}: give at least one answer")
    return answers


def _texts(value: Any, listed: bool) -> list[str]:
    """Answers as texts: a text, a number, a list of these or of objects with `answer`, or the text of a list.

    Unless `listed`, a text is taken as a list only if the first item is a text in quotes: `[3]` may be an answer.
    """
    if isinstance(value, str) and (listed or re.match(_QUOTED_LIST, value)):
        value = _parsed(value)
    return [_text(item) for item in (value if isinstance(value, list) else [value])]


def _parsed(text: str) -> Any:
    """The list that a text spells in JSON, Python or as numpy prints it (without commas); else the text itself.

    Raises:
        RowError: a list of texts that cannot be read, such as a shortened one.
    """
    stripped = text.strip()
    if not stripped.startswith("[") or not stripped.endswith("]"):
        return text
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        pass
    try:
        parsed = ast.literal_eval(_with_commas(stripped))
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
        if re.match(_QUOTED_LIST, text):
            raise RowError(f"{excerpt(text)} is a list that cannot be read: give a list of texts") from None
        return text
    return parsed if isinstance(parsed, list) else text


def _with_commas(text: str) -> str:
    """A list as numpy prints it with a comma after each value; nan and null are None.

    Raises:
        ValueError: a quote that is not closed, or two values without a space between them.
    """
    values, missing = (tokenize.STRING, tokenize.NUMBER), ("nan", "null", "None")
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string.strip()]
    written: list[str] = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        starts_value = token.type in values or token.string in missing or token.string == "-"
        if before and starts_value and (before.type in values or before.string in missing):
            if before.end == token.start:
                raise ValueError(f"no space before {token.string}")
            written.append(",")
        if token.type == tokenize.ERRORTOKEN:
            raise ValueError(f"{token.string} is not closed")
        written.append("None" if token.string in missing else token.string)
    return "".join(written)


def _text(item: Any) -> str:
    if isinstance(item, Mapping):
        item = item.get("answer")
    number = isinstance(item, int | float | Decimal) and not isinstance(item, bool) and math.isfinite(item)
    if not number and not isinstance(item, str):
        raise RowError(f"an answer is {excerpt(item)}: give texts or numbers")
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
    """The first key that has a value, and the value; the empty text and None if there is none.

    NaN, which pandas writes for what is missing, is no value.
    """
    given = ((key, fields[key]) for key in keys if fields.get(key) is not None)
    return next(((key, v) for key, v in given if not (isinstance(v, float) and math.isnan(v))), ("", None))
