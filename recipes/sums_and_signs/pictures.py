"""Pictures of numbers, and their pixels.

A picture shows things of several colors, and every color is worth a number. How the number is to be had depends on the
picture's notation, which no question names:

| notation | a color is drawn as | its number |
|---|---|---|
| digits | one handwritten digit | that digit |
| sums | one to four handwritten digits | their sum |
| signs | one sign: an outline around a core of another color | to be known by heart, see `sign_values` |

A picture is a pure function of (stream, seed). Streams are those of `envs.data.scenes`: they share no handwriting.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from envs.data.scenes.draw import blank, finish, paint
from envs.data.scenes.layout import FORMATS, STREAMS, SceneObject, pick_digit

VERSION: Final = 1
"""Part of every seed: raise it with any change to what is placed or how it is drawn."""

COLORS: Final = MappingProxyType(
    {
        "red": (225, 50, 45),
        "green": (60, 190, 70),
        "blue": (60, 100, 240),
        "yellow": (235, 215, 60),
        "pink": (240, 110, 190),
        "white": (235, 235, 235),
        "orange": (235, 130, 30),
        "cyan": (70, 215, 220),
    }
)
COLOR_NAMES: Final = tuple(COLORS)
OUTLINES: Final = ("circle", "square", "triangle", "diamond", "cross", "star")
NOTATIONS: Final = ("digits", "sums", "signs")
NOTATION_WEIGHTS: Final = (0.2, 0.4, 0.4)
FORMAT_NAMES: Final = ("landscape", "portrait", "wide", "tall")
DIGIT_SIZES: Final = MappingProxyType({"small": (9.5, 12.5), "large": (28.0, 40.0)})
"""One class per picture: small digits need many crops."""
SMALL_SHARE: Final = 0.35
SIGN_SIZES: Final = (25.0, 38.0)
MAX_SUMMANDS: Final = 4
_CORE_SHARE: Final = 0.5
_VALUES_SEED: Final = 77


@dataclass(frozen=True)
class Item:
    """A digit or a sign. `size`, `x` and `y` (its center) are pixels, `angle` radians.

    `digit` is an index into `load_digits` and `value` the digit that it shows; `core` is a sign's inner color.
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
    core: str | None = None
    core_rgb: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Picture:
    """Everything a picture is drawn from, and questions are asked about; `worth` has a number for every color drawn."""

    format: str
    width: int
    height: int
    background: tuple[int, int, int]
    noise_seed: int
    notation: str
    digit_size: str
    items: tuple[Item, ...]
    worth: dict[str, int]

    @property
    def summands(self) -> dict[str, int]:
        """How many things every color has."""
        return {color: sum(item.color == color for item in self.items) for color in self.worth}


@cache
def sign_values() -> npt.NDArray[np.int64]:
    """The number (outlines, colors, core colors) of every sign: 0 to 9, without a rule."""
    shape = (len(OUTLINES), len(COLORS), len(COLORS))
    return np.random.default_rng(_VALUES_SEED).integers(0, 10, shape)


def make_picture(
    stream: str,
    seed: int,
    format_name: str | None = None,
    notation: str | None = None,
    small_share: float = SMALL_SHARE,
) -> Picture:
    """The picture of `seed` in `stream`; what is given fixes the canvas, the notation, the share of small digits."""
    rng = np.random.default_rng([VERSION, STREAMS.index(stream), seed])
    drawn_format, drawn = str(rng.choice(FORMAT_NAMES)), str(rng.choice(NOTATIONS, p=NOTATION_WEIGHTS))
    name, notation = format_name or drawn_format, notation or drawn
    canvas = FORMATS[name]
    width, height = (round(side * rng.uniform(0.93, 1.0)) for side in (canvas.width, canvas.height))
    digit_size = "small" if rng.random() < small_share else "large"
    colors = [COLOR_NAMES[i] for i in rng.permutation(len(COLORS))]
    cells = [(row, column) for row in range(canvas.rows) for column in range(canvas.columns)]
    items, worth = _draw_items(rng, stream, notation, digit_size, colors, len(cells))
    placed = []
    for item, cell in zip(items, rng.permutation(len(cells)), strict=False):
        row, column = cells[cell]
        cell_w, cell_h = width / canvas.columns, height / canvas.rows
        free_x, free_y = (max(0.0, (side - item["size"]) / 2) for side in (cell_w, cell_h))
        x = (column + 0.5) * cell_w + float(rng.uniform(-free_x, free_x))
        y = (row + 0.5) * cell_h + float(rng.uniform(-free_y, free_y))
        placed.append(Item(x=x, y=y, **item))
    r, g, b = (int(v) for v in rng.integers(8, 60) + rng.integers(0, 16, 3))
    noise_seed = int(rng.integers(2**31))
    return Picture(name, width, height, (r, g, b), noise_seed, notation, digit_size, tuple(placed), worth)


def _draw_items(
    rng: np.random.Generator, stream: str, notation: str, digit_size: str, colors: list[str], cells: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The fields of every item but its place, and what each color is worth."""
    items: list[dict[str, Any]] = []
    worth: dict[str, int] = {}
    colors_used = int(rng.integers(2, 5) if notation == "sums" else rng.integers(3, min(7, cells) + 1))
    for color in colors[:colors_used]:
        left = cells - len(items) - (colors_used - len(worth) - 1)
        summands = min(int(rng.integers(1, MAX_SUMMANDS + 1)), left) if notation == "sums" else 1
        numbers = []
        for _ in range(summands):
            item, number = _draw_item(rng, stream, notation == "signs", digit_size, color)
            items.append(item)
            numbers.append(number)
        worth[color] = sum(numbers)
    return items, worth


def _draw_item(
    rng: np.random.Generator, stream: str, is_sign: bool, digit_size: str, color: str
) -> tuple[dict[str, Any], int]:
    low, high = SIGN_SIZES if is_sign else DIGIT_SIZES[digit_size]
    item: dict[str, Any] = {"color": color, "rgb": jitter(rng, color), "size": float(rng.uniform(low, high))}
    item |= {"angle": float(rng.uniform(-0.2, 0.2)), "stretch": float(rng.uniform(0.87, 1.13))}
    if not is_sign:
        digit, value = pick_digit(rng, stream)
        return {"kind": "digit", "digit": digit, "value": value, **item}, value
    kind = OUTLINES[int(rng.integers(len(OUTLINES)))]
    core = str(rng.choice([name for name in COLOR_NAMES if name != color]))
    number = sign_values()[OUTLINES.index(kind), COLOR_NAMES.index(color), COLOR_NAMES.index(core)]
    return {"kind": kind, "core": core, "core_rgb": jitter(rng, core), **item}, int(number)


def jitter(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    """A shade of the color."""
    r, g, b = (
        min(255, max(0, level + change)) for level, change in zip(COLORS[color], rng.integers(-12, 13, 3), strict=True)
    )
    return int(r), int(g), int(b)


def draw_picture(picture: Picture) -> npt.NDArray[np.uint8]:
    """The pixels (height, width, 3)."""
    rng = np.random.default_rng(picture.noise_seed)
    canvas = blank(picture.height, picture.width, picture.background, rng)
    for item in picture.items:
        paint_item(canvas, item)
    return finish(canvas)


def paint_item(canvas: npt.NDArray[np.float32], item: Item) -> None:
    """Blends one item onto the canvas (height, width, 3) in place; parts outside are cut."""
    if item.kind == "digit":
        places = (item.x, item.y, item.size, item.angle, item.stretch)
        paint(canvas, SceneObject("digit", item.color, item.rgb, *places, item.digit, item.value))
        return
    side = math.ceil(item.size * 1.5) + 1
    left, top = math.floor(item.x - side / 2), math.floor(item.y - side / 2)
    rows = slice(max(top, 0), max(min(top + side, canvas.shape[0]), 0))
    columns = slice(max(left, 0), max(min(left + side, canvas.shape[1]), 0))
    axis = np.arange(side, dtype=np.float32) + 0.5
    dx, dy = (axis - (item.x - left))[None, :], (axis - (item.y - top))[:, None]
    outline = np.clip(0.5 - _distance(item, dx, dy), 0.0, 1.0)
    core = np.clip(0.5 - (np.hypot(dx, dy) - item.size * _CORE_SHARE / 2), 0.0, 1.0)
    region = canvas[rows, columns]
    for alpha, rgb in ((outline, item.rgb), (core, item.core_rgb if item.core else None)):
        if rgb is not None:
            part = alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
            region += part.astype(np.float32) * (np.asarray(rgb, dtype=np.float32) - region)


def _distance(item: Item, dx: npt.NDArray[np.float32], dy: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Signed distance of each pixel from the sign's outline, about in pixels, negative inside."""
    cos, sin, half = math.cos(item.angle), math.sin(item.angle), item.size / 2
    u, v = (cos * dx + sin * dy) / item.stretch, (cos * dy - sin * dx) * item.stretch
    wide, high = np.abs(u), np.abs(v)
    match item.kind:
        case "circle":
            distance = np.hypot(u, v) - half * 0.9
        case "square":
            distance = np.maximum(wide, high) - half * 0.82
        case "triangle":
            distance = np.maximum(wide * 0.894 - (v + half) * 0.447, v - half * 0.8)
        case "diamond":
            distance = (wide + high - half * 1.05) * 0.707
        case "cross":
            distance = np.maximum(np.minimum(wide, high) - half * 0.42, np.maximum(wide, high) - half)
        case "star":
            distance = np.hypot(u, v) - half * (0.72 + 0.28 * np.cos(5 * np.arctan2(v, u) - 2.5 * math.pi))
        case other:
            raise ValueError(f"no drawing for {other!r}")
    return distance.astype(np.float32)
