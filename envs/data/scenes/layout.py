"""The content of a scene: handwritten digits and shapes on a plain background, placed without overlap.

A scene is a pure function of (stream, seed). Streams differ in the handwriting they may use: contiguous blocks of
scikit-learn's `load_digits` (1,797 digits, consecutive ones by the same writers), so that no digit of one block is ever
drawn in a scene of another. Sizes are pixels of the finished image.
"""

from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

VERSION: Final = 5
"""Part of every seed and digest: raise it with any change to what is placed or how it is drawn."""

COLORS: Final = MappingProxyType(
    {
        "red": (225, 50, 45),
        "green": (60, 190, 70),
        "blue": (60, 100, 240),
        "yellow": (235, 215, 60),
        "pink": (240, 110, 190),
        "white": (235, 235, 235),
    }
)
SHAPES: Final = ("circle", "square", "triangle", "cross")

STREAMS: Final = ("corpus", "train", "validation", "test")
"""`corpus` is the endless set that trains the model itself; the others are the splits of the task. No digit of a
split was seen by the model: a controller that learnt where it reads too well would trust it too much elsewhere."""
DIGIT_BLOCKS: Final = MappingProxyType(
    {"corpus": (0, 1200), "train": (1350, 1500), "validation": (1200, 1350), "test": (1500, 1797)}
)


@dataclass(frozen=True)
class Format:
    """A canvas: its size in pixels before jitter, the cells of one object each, and how often it is drawn."""

    width: int
    height: int
    columns: int
    rows: int
    weight: float


# With the embedded model's crops of 56 pixels and windows of 42, the first four get another tiling at each tier (of 12,
# 12, 10 and 8 crops at the high one and 6 at the medium one, so that in wide and tall scenes the step between them is
# small), the banner the same at medium and high, the card the same at all.
FORMATS: Final = MappingProxyType(
    {
        "landscape": Format(182, 140, 4, 3, 0.24),
        "portrait": Format(140, 182, 3, 4, 0.18),
        "wide": Format(220, 98, 5, 2, 0.14),
        "tall": Format(98, 174, 2, 4, 0.36),
        "banner": Format(266, 56, 5, 1, 0.04),
        "card": Format(98, 56, 2, 1, 0.04),
    }
)

DIGIT_SIZES: Final = MappingProxyType({"small": (7.0, 8.5), "medium": (20.0, 26.0), "large": (34.0, 41.0)})
"""One class per scene: small digits need many crops, large ones are legible in few."""
_SIZE_WEIGHTS: Final = (0.68, 0.16, 0.16)
SHAPE_SIZES: Final = (26.0, 38.0)
_MAX_EACH: Final = 4
_PAIRED: Final = 0.75


@dataclass(frozen=True)
class SceneObject:
    """A digit or a shape. `size` is the side of its box, `x` and `y` its centre, all in pixels; `angle` in radians.

    `digit` is an index into `load_digits` and `value` the digit it shows, both None for shapes.
    """

    kind: str
    color: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    size: float
    angle: float
    stretch: float
    digit: int | None = None
    value: int | None = None


@dataclass(frozen=True)
class Scene:
    """Everything a picture is drawn from, and questions are asked about."""

    format: str
    width: int
    height: int
    background: tuple[int, int, int]
    noise_seed: int
    digit_size: str
    objects: tuple[SceneObject, ...]

    @property
    def digits(self) -> tuple[SceneObject, ...]:
        return tuple(o for o in self.objects if o.value is not None)

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        return tuple(o for o in self.objects if o.value is None)


@cache
def handwriting() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All digits as (1797, 8, 8) with 255 as full ink, and their values (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64)


@cache
def _digits_by_value(stream: str) -> tuple[npt.NDArray[np.int64], ...]:
    start, stop = DIGIT_BLOCKS[stream]
    values = handwriting()[1][start:stop]
    return tuple(start + np.flatnonzero(values == value) for value in range(10))


def pick_digit(rng: np.random.Generator, stream: str) -> tuple[int, int]:
    """Index and value of a digit of the stream's block; all ten values are equally likely."""
    value = int(rng.integers(10))
    choices = _digits_by_value(stream)[value]
    return int(choices[rng.integers(len(choices))]), value


def jitter_rgb(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    """A shade of the colour."""
    r, g, b = np.clip(np.array(COLORS[color]) + rng.integers(-15, 16, 3), 0, 255)
    return int(r), int(g), int(b)


def make_scene(stream: str, seed: int, format_name: str | None = None) -> Scene:
    """The scene of `seed` in `stream`; `format_name` fixes the canvas (used to train in batches of equal tiling)."""
    rng = np.random.default_rng([VERSION, STREAMS.index(stream), seed])
    drawn = str(rng.choice(list(FORMATS), p=[f.weight for f in FORMATS.values()]))
    name = format_name or drawn
    canvas = FORMATS[name]
    width, height = (round(side * rng.uniform(0.93, 1.0)) for side in (canvas.width, canvas.height))
    digit_size = str(rng.choice(list(DIGIT_SIZES), p=_SIZE_WEIGHTS))
    cells = [(row, column) for row in range(canvas.rows) for column in range(canvas.columns)]
    kinds = _draw_kinds(rng, stream, len(cells))
    chosen = rng.permutation(len(cells))[: len(kinds)]
    objects = []
    for (kind, color, index, value), cell in zip(kinds, chosen, strict=True):
        low, high = DIGIT_SIZES[digit_size] if value is not None else SHAPE_SIZES
        size = float(rng.uniform(low, high))
        row, column = cells[cell]
        cell_w, cell_h = width / canvas.columns, height / canvas.rows
        free_x, free_y = (max(0.0, (side - size) / 2) for side in (cell_w, cell_h))
        objects.append(
            SceneObject(
                kind=kind,
                color=color,
                rgb=jitter_rgb(rng, color),
                x=(column + 0.5) * cell_w + float(rng.uniform(-free_x, free_x)),
                y=(row + 0.5) * cell_h + float(rng.uniform(-free_y, free_y)),
                size=size,
                angle=float(rng.uniform(-0.2, 0.2)),
                stretch=float(rng.uniform(0.85, 1.15)),
                digit=index,
                value=value,
            )
        )
    r, g, b = (int(v) for v in rng.integers(8, 60) + rng.integers(0, 16, 3))
    return Scene(name, width, height, (r, g, b), int(rng.integers(2**31)), digit_size, tuple(objects))


def _draw_kinds(rng: np.random.Generator, stream: str, cells: int) -> list[tuple[str, str, int | None, int | None]]:
    """Kind, colour, digit index and value of each object. Digits differ in colour from digits, shapes from shapes."""
    names = list(COLORS)
    if cells == 2:
        n_digits, n_shapes = ((1, 1), (2, 0))[int(rng.integers(2))]
    else:
        n_digits = int(rng.integers(2, _MAX_EACH + 1 if cells > 5 else 4))
        n_shapes = int(rng.integers(1, min(_MAX_EACH, cells - n_digits) + 1))
    digit_colors = [names[i] for i in rng.permutation(len(names))[:n_digits]]
    shape_colors = [names[i] for i in rng.permutation(len(names))[:n_shapes]]
    if n_shapes and rng.random() < _PAIRED and digit_colors[0] not in shape_colors:
        shape_colors[0] = digit_colors[0]
    digits = [("digit", color, *pick_digit(rng, stream)) for color in digit_colors]
    shapes = [(SHAPES[int(rng.integers(len(SHAPES)))], color, None, None) for color in shape_colors]
    return [*digits, *shapes]
