"""The task "scenes": finite, fixed splits of questions about drawn scenes."""

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Final

import numpy as np
from PIL import Image

from envs.data.sample import ImageRef, Sample, content_id
from envs.data.scenes.draw import draw_scene
from envs.data.scenes.layout import STREAMS, VERSION, Scene, make_scene
from envs.data.scenes.questions import FAMILIES, Question, all_questions
from envs.errors import UserError

ANNOTATORS: Final = 10


@dataclass(frozen=True)
class SplitSize:
    """Scenes in a split and questions asked about each."""

    scenes: int
    questions: int


# Asked most are the families that one knob decides: digits to be read want crops, sums blocks, corners experts.
_WEIGHTS: Final = MappingProxyType(
    {"color": 1, "shape": 1, "count": 1, "sum": 6, "corners": 6, "digit": 8, "compare": 2, "match": 9}
)

SPLITS: Final = MappingProxyType(
    {"train": SplitSize(5000, 4), "validation": SplitSize(1000, 2), "test": SplitSize(1000, 2)}
)


@dataclass(frozen=True)
class SceneImage(ImageRef):
    """A scene by its stream and seed, the only things that are pickled; it is drawn when loaded."""

    stream: str
    seed: int

    @cached_property
    def scene(self) -> Scene:
        """What the picture shows."""
        return make_scene(self.stream, self.seed)

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        """Hash of everything the picture is drawn from."""
        return hashlib.sha256(f"scenes {VERSION} {self.scene}".encode()).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        return self.scene.width, self.scene.height

    def load(self) -> Image.Image:
        return Image.fromarray(draw_scene(self.scene))

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return SceneImage, (self.stream, self.seed)


@cache
def load_scenes(split: str) -> tuple[Sample, ...]:
    """All samples of a split ("train", "validation", "test"), always the same ones.

    Raises:
        UserError: no such split.
    """
    if split not in SPLITS:
        raise UserError(f"scenes has no split {split!r}: choose one of {', '.join(SPLITS)}")
    size = SPLITS[split]
    rng = np.random.default_rng([VERSION, STREAMS.index(split), 1])
    return tuple(sample for seed in range(size.scenes) for sample in _ask(split, seed, size.questions, rng))


@cache
def fresh_scenes(seed: int, limit: int) -> tuple[Sample, ...]:
    """`limit` samples of new scenes: handwriting that neither training nor validation uses, no scene of the test split.

    A stream of its own for each seed; a larger limit continues a smaller one.
    """
    questions = SPLITS["test"].questions
    first = (seed + 1) << 32  # past every scene of the split
    samples: list[Sample] = []
    while len(samples) < limit:
        scene = first + len(samples) // questions
        samples += _ask("test", scene, questions, np.random.default_rng([VERSION, STREAMS.index("test"), 2, scene]))
    return tuple(samples[:limit])


def _ask(stream: str, seed: int, count: int, rng: np.random.Generator) -> list[Sample]:
    """`count` questions about one scene."""
    image = SceneImage(stream, seed)
    found = []
    for question in pick_questions(image.scene, count, rng):
        answers = (question.answer,) * ANNOTATORS
        identity = content_id(image.digest, question.text, answers)
        found.append(Sample(identity, image, question.text, answers, family=question.family))
    return found


def pick_questions(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """`count` different questions, of different families where the scene allows it: first a family is drawn by weight
    among those still open, then one of its questions.
    """
    open_questions = all_questions(scene)
    chosen: list[Question] = []
    while len(chosen) < count and open_questions:
        used = {q.family for q in chosen}
        families = [f for f in FAMILIES if any(q.family == f for q in open_questions)]
        fresh = [f for f in families if f not in used] or families
        weights = np.array([_WEIGHTS[f] for f in fresh])
        family = str(rng.choice(fresh, p=weights / weights.sum()))
        pool = [q for q in open_questions if q.family == family]
        question = pool[int(rng.integers(len(pool)))]
        open_questions.remove(question)
        chosen.append(question)
    return chosen
