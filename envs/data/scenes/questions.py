"""Questions about scenes, by family, with their answers.

| family | asks | needs |
|---|---|---|
| color | the color of a shape | few crops |
| shape | which shape has a color | few crops |
| count | shapes, digits or one kind of shape | few crops |
| sum | two kinds of shapes, or everything | few crops, many blocks: counted, then added |
| corners | corners of two kinds of shapes, or of all | few crops, many experts: counted, weighed, added |
| digit | the digit of a color | crops, if digits are small |
| compare | the larger of two digits, by color | two digits read |
| match | the digit with a shape's color | two steps: shape to color, color to digit |
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Final

from envs.data.scenes.layout import COLORS, SHAPES, Scene

FAMILIES: Final = ("color", "shape", "count", "sum", "corners", "digit", "compare", "match")

CORNERS: Final = MappingProxyType({"circle": 0, "square": 4, "triangle": 3, "cross": 12})


@dataclass(frozen=True)
class Question:
    """A question, its one right answer and its family."""

    family: str
    text: str
    answer: str


def all_questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one right answer in the scene, in a fixed order."""
    kinds = Counter(o.kind for o in scene.shapes)
    by_color = {o.color: o for o in scene.digits}
    lone = [o for o in scene.shapes if kinds[o.kind] == 1]
    questions = [Question("color", f"What color is the {o.kind}?", o.color) for o in lone]
    questions += [Question("shape", f"What shape is {o.color}?", o.kind) for o in scene.shapes]
    questions.append(Question("count", "How many shapes are there?", str(len(scene.shapes))))
    questions.append(Question("count", "How many digits are there?", str(len(scene.digits))))
    # Of the kinds that are missing only one is asked for, or most counts would be 0.
    missing = [kind for kind in SHAPES if not kinds[kind]]
    counted = [*sorted(kinds), *missing[scene.noise_seed % len(missing) :][:1]] if missing else sorted(kinds)
    questions += [Question("count", f"How many {_plural(kind)} are there?", str(kinds[kind])) for kind in counted]
    questions += _sums(scene, kinds)
    questions += _corners(kinds)
    questions += [Question("digit", f"What digit is {o.color}?", str(o.value)) for o in scene.digits]
    for a in scene.digits:
        for b in scene.digits:
            if a.value is not None and b.value is not None and a.value > b.value:
                for first, second in ((a, b), (b, a)):
                    text = f"Which digit is larger, {first.color} or {second.color}?"
                    questions.append(Question("compare", text, a.color))
    for o in lone:
        if o.color in by_color:
            text = f"What digit has the color of the {o.kind}?"
            questions.append(Question("match", text, str(by_color[o.color].value)))
    return questions


def _sums(scene: Scene, kinds: Mapping[str, int]) -> list[Question]:
    """Questions of the family `sum`. Of the pairs of kinds that add up to 1 only one is asked for, or most would."""
    questions = [Question("sum", "How many shapes and digits are there?", str(len(scene.objects)))]
    pairs = list(combinations(SHAPES, 2))
    ones = [pair for pair in pairs if kinds[pair[0]] + kinds[pair[1]] == 1]
    asked = [pair for pair in pairs if kinds[pair[0]] + kinds[pair[1]] > 1]
    for first, second in [*asked, *ones[scene.noise_seed % max(len(ones), 1) :][:1]]:
        text = f"How many {_plural(first)} and {_plural(second)} are there?"
        questions.append(Question("sum", text, str(kinds[first] + kinds[second])))
    return questions


def _corners(kinds: Counter[str]) -> list[Question]:
    """Questions of the family `corners`: about all shapes, and about pairs of kinds that add up to at least two."""
    if not kinds:
        return []
    asked = [("How many corners are there?", tuple(kinds))]
    for first, second in combinations([kind for kind in SHAPES if CORNERS[kind]], 2):
        if kinds[first] + kinds[second] > 1:
            asked.append((f"How many corners of {_plural(first)} and {_plural(second)} are there?", (first, second)))
    return [Question("corners", text, str(sum(CORNERS[k] * kinds[k] for k in those))) for text, those in asked]


def caption(scene: Scene) -> Question:
    """The complete scene as text: for every color in turn the digit and the shape that have it, or none."""
    digits, shapes = ({o.color: o for o in group} for group in (scene.digits, scene.shapes))
    words = []
    for color in COLORS:
        digit = str(digits[color].value) if color in digits else "none"
        words += [color, digit, shapes[color].kind if color in shapes else "none"]
    return Question("caption", "Describe the scene.", " ".join(words))


def _plural(kind: str) -> str:
    return "crosses" if kind == "cross" else f"{kind}s"
