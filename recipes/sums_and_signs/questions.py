"""The same questions about every picture, whatever its notation.

| family | asks |
|---|---|
| value | what a color is worth |
| total | what two colors are worth together |
| more | which of two colors is worth more |
| colors | how many colors there are |
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Final

from recipes.sums_and_signs.pictures import COLOR_NAMES, Picture

FAMILIES: Final = ("value", "total", "more", "colors")
MAX_TOTAL_SUMMANDS: Final = 5
"""Two colors with more digits than this are not added up: nobody could."""


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, its family, and how many things the answer has to be made from."""

    family: str
    text: str
    answer: str
    things: int


def all_questions(picture: Picture) -> list[Question]:
    """Every question that has exactly one right answer, in a fixed order."""
    worth, summands = picture.worth, picture.summands
    questions = [Question("value", f"How much is {c}?", str(worth[c]), summands[c]) for c in worth]
    for first, second in combinations(worth, 2):
        things = summands[first] + summands[second]
        if things <= MAX_TOTAL_SUMMANDS:
            text = f"How much are {first} and {second}?"
            questions.append(Question("total", text, str(worth[first] + worth[second]), things))
        if worth[first] != worth[second]:
            answer = max(first, second, key=worth.__getitem__)
            questions.append(Question("more", f"Which is more, {first} or {second}?", answer, things))
    questions.append(Question("colors", "How many colors are there?", str(len(worth)), len(picture.items)))
    return questions


def caption(picture: Picture) -> Question:
    """What stands in the picture: for every color in turn its digits, or its sign's outline and core."""
    words = []
    for color in COLOR_NAMES:
        items = [item for item in picture.items if item.color == color]
        if items:
            words.append(color)
            words += [f"{i.kind} {i.core}" if i.value is None else str(i.value) for i in items]
    return Question("caption", "Describe the picture.", " ".join(words), len(picture.items))
