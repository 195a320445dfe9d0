"""The text of a prompt."""

from collections.abc import Sequence


def prompt_text(question: str, style: str | None = None) -> str:
    """The published prompt of a question."""
    named = style not in (None, "demo")  # the published model was trained on demonstrations without a style
    return f" User: {style}: {question} Assistant:" if named else f" User: {question} Assistant:"


def with_options(question: str, options: Sequence[str]) -> str:
    """A multiple-choice question as the published model expects it: options lettered from A."""
    lines = "".join(f"\n{chr(ord('A') + i)}: {option}" for i, option in enumerate(options))
    return f"{question}{lines}\n"
