"""One vocabulary: words that this project once used in place of the field's terms occur nowhere.

Identifiers are split into their words; docstrings, comments, messages, help texts and documents are read as they are.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("envs", "policies", "ray_ctrl", "cluster", "recipes", "examples", "benchmarks")
DOCUMENTS = ("README.md", "CHANGELOG.md", "docs", "envs/embedded/MODEL_CARD.md")
REPLACED = {
    r"desks?": "command line, configuration",
    r"minds?": "controller",
    r"worlds?": "environment, model, scenes",
    r"ground": "cluster access",
    r"rooms?": "package, capacity",
    r"pric(e|es|ed|ing)": "penalty multiplier",
    r"dear(er|est)?": "expensive",
    r"told": "configured",
    r"shown": "observed, clamped, printed",
    r"judged?": "scored",
    r"meant": "intended",
    r"mend(s|ed|ing)?": "fix",
    r"lies?|lay": "be stored, be located",
    r"hold(s|ing)?": "store, contain, reserve",
    r"besides?": "next to, in addition to",
    r"aside": "temporary",
    r"wholly|whole": "complete, entire",
    r"at once": "immediately",
    r"for ever": "indefinitely",
    r"go(es)? on|going on|went on": "continue",
    r"in time": "within budget",
    r"overr(un|uns|an|unning)": "violation, excess",
    r"rounds?": "iteration",
    r"chunks?": "batch, shard",
    r"spreads?": "standard deviation, dispatcher, subset",
    r"setting": "config, run context, knobs",
    r"steer(s|ing|ed)?": "serving",
    r"building": "rllib_setup",
    r"stopping": "signals",
    r"feasibility": "preflight",
}
# Where a word of the list is the field's own. Each pattern is taken out before the text is searched.
ORDINARY = {
    r"round[ _-]trips?": "written and read back",
    r"world[ _]size|world wide": "torch.distributed's term",
    r"ground[ -]truth": "the reference answer",
    r"whole numbers?": "integers, to a user",
    r"\bround\(|\.round\b": "Python's, NumPy's and torch's function",
    r"rounds? (up|down|to|it|half|differently|off)\b|rounds off": "arithmetic",
    r"multi[_ ]round": "lmms-eval's method",
    r"early stopping": "the term of hyperparameter search",
    r"\.?chunk\(|chunked|\"chunk\"": "torch's function, HTTP's transfer encoding",
    r"hold(s|ing)?[ _-]out": "data that training never sees",
    r"price_(bins|initial|step|max|memory)|reward\.overrun|divide_by_spread": "keys of earlier versions",
    r"(outcomes|s|t)\.setting\b|SELECT setting\b|\bsetting TEXT|, setting, used": "a column of the store's file format",
    r"for chunk in|chunks? of (the )?(body|file|log)": "pieces of a stream, as the standard library calls them",
}


def words(identifier: str) -> str:
    """`some_nameLikeThis` as `some name like this`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", identifier).replace("_", " ").lower()


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Prose and identifiers of a file by line number."""
    source = path.read_text("utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string not in ("round", "chunk"):
            yield token.start[0], words(token.string)
        elif tokenize.tok_name[token.type] in ("STRING", "COMMENT", "FSTRING_MIDDLE"):
            yield from enumerate(token.string.splitlines(), token.start[0])


def found(text: str) -> list[str]:
    """Words of the list in a line, ordinary uses aside."""
    for pattern in ORDINARY:
        text = re.sub(pattern, " ", text, flags=re.IGNORECASE)
    joined = "|".join(REPLACED)
    return [match[0] for match in re.finditer(rf"(?<![A-Za-z])({joined})(?![A-Za-z])", words(text), re.IGNORECASE)]


def files() -> list[Path]:
    code = [path for name in CODE for path in sorted((ROOT / name).rglob("*.py"))]
    texts = [
        path for name in DOCUMENTS for path in ([ROOT / name] if name.endswith(".md") else (ROOT / name).rglob("*.md"))
    ]
    yamls = [path for name in ("ray_ctrl", "cluster") for path in sorted((ROOT / name).rglob("*.yaml"))]
    return [*code, *sorted(texts), *yamls]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_fields_words_alone(path: Path) -> None:
    wrong = [f"{number}: {word}" for number, text in lines(path) for word in found(text)]
    assert wrong == [], "see REPLACED for the field's terms"


def test_the_search_finds_words_in_identifiers_and_prose() -> None:
    assert found("a_dearer_plan") == ["dearer"]
    assert found("WorldConfig in time") == ["world", "in time"]
    assert found("whole numbers, held out, ground truth, placeholder, background") == []
