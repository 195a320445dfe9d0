"""Scenes to pixels."""

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from envs.data.scenes.layout import Scene, SceneObject, handwriting

FloatArray = npt.NDArray[np.float32]
_PAD = 2  # empty rows around the 8x8 source, so that turned strokes are not cut
_NOISE = 5.0
_INK = 1.25


def draw_scene(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture (height, width, 3)."""
    canvas = blank(scene.height, scene.width, scene.background, np.random.default_rng(scene.noise_seed))
    for item in scene.objects:
        paint(canvas, item)
    return finish(canvas)


def blank(height: int, width: int, background: tuple[int, int, int], rng: np.random.Generator) -> FloatArray:
    """A background that brightens along a random direction, with a little noise."""
    slope = rng.uniform(-12, 12, 2)
    ramp = np.linspace(0, slope[0], height)[:, None] + np.linspace(0, slope[1], width)
    noise = rng.standard_normal((height, width), dtype=np.float32) * _NOISE + ramp.astype(np.float32)
    return np.asarray(background, dtype=np.float32) + noise[..., None]


def finish(canvas: FloatArray) -> npt.NDArray[np.uint8]:
    """Clipped to bytes."""
    return np.clip(canvas, 0, 255).astype(np.uint8)


def paint(canvas: FloatArray, item: SceneObject) -> None:
    """Blends one object onto the canvas (height, width, 3) in place; parts outside are cut."""
    side = math.ceil(item.size * 1.5) + 1
    left, top = math.floor(item.x - side / 2), math.floor(item.y - side / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + side, canvas.shape[1]), min(top + side, canvas.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    centre = (item.x - left, item.y - top)
    alpha = _digit_alpha(item, side, centre) if item.digit is not None else _shape_alpha(item, side, centre)
    alpha = alpha[y0 - top : y1 - top, x0 - left : x1 - left, None]
    region = canvas[y0:y1, x0:x1]
    region += alpha * (np.asarray(item.rgb, dtype=np.float32) - region)


@cache
def _source(digit: int) -> Image.Image:
    """A digit of `load_digits` with a margin."""
    return Image.fromarray(np.pad(handwriting()[0][digit], _PAD))


def _digit_alpha(item: SceneObject, side: int, centre: tuple[float, float]) -> FloatArray:
    """Ink of a handwritten digit, turned and stretched, (side, side) in 0..1."""
    assert item.digit is not None
    source = _source(item.digit)
    # From output to source pixels: the 8 source rows of a digit fill `size`.
    cos, sin, scale = math.cos(item.angle), math.sin(item.angle), 8 / item.size
    a, b = cos * scale / item.stretch, sin * scale / item.stretch
    d, e = -sin * scale * item.stretch, cos * scale * item.stretch
    middle = 4 + _PAD
    c = middle - a * centre[0] - b * centre[1]
    f = middle - d * centre[0] - e * centre[1]
    turned = source.transform((side, side), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC)
    return np.minimum(np.asarray(turned, dtype=np.float32) * (_INK / 255), 1.0)


def _shape_alpha(item: SceneObject, side: int, centre: tuple[float, float]) -> FloatArray:
    """Filled shape with soft edges, (side, side) in 0..1, from signed distances."""
    axis = np.arange(side, dtype=np.float32) + 0.5
    dx, dy = (axis - centre[0])[None, :], (axis - centre[1])[:, None]
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    u = (cos * dx + sin * dy) / item.stretch
    v = (cos * dy - sin * dx) * item.stretch
    half = item.size / 2
    match item.kind:
        case "circle":
            distance = np.sqrt(u * u + v * v) - half * 0.95
        case "square":
            distance = np.maximum(np.abs(u), np.abs(v)) - half * 0.85
        case "triangle":
            slanted = np.abs(u) * 0.894 - (v + half * 0.85) * 0.447
            distance = np.maximum(slanted, v - half * 0.85)
        case "cross":
            short, long = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
            distance = np.maximum(short - half * 0.3, long - half)
        case other:
            raise ValueError(f"no drawing for {other!r}")
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
