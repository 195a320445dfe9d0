"""Vision warm-up: the tower alone learns to name what stands under each of its tokens, digits above all.

Trained from questions alone the image encoder stays blind to handwriting for very long. Here it sees single crops with
a few objects of every size that the tiers produce, and every token on an object is asked for its kind, colour
and digit through linear heads, which are thrown away afterwards.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from envs.data.scenes.draw import blank, finish, paint
from envs.data.scenes.layout import COLORS, SHAPES, SceneObject, jitter_rgb, pick_digit
from envs.model.vision import VisionBackbone
from recipes.embedded_model.shape import GEOMETRY

_KINDS = ("none", "digit", *SHAPES)
_COLOR_NAMES = tuple(COLORS)
_IGNORE = -100
_SIZES = {"digit": (8.0, 42.0), "shape": (10.0, 38.0)}
_ATTEMPTS = (2, 7)


@dataclass(frozen=True)
class CropBatch:
    """Crops (N, patches, pixels) and per token (N, tokens) the kind, colour and digit under it, -100 where none."""

    crops: Tensor
    kinds: Tensor
    colors: Tensor
    digits: Tensor


class WarmupCrops(Dataset[CropBatch]):
    """Batch `i` is a pure function of (seed, i), so that a resumed run sees what an uninterrupted one would."""

    def __init__(self, steps: int, batch: int, seed: int, stream: str = "corpus") -> None:
        self.steps, self.batch, self.seed, self.stream = steps, batch, seed, stream

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> CropBatch:
        rng = np.random.default_rng([self.seed, 1, step])
        side, tokens = GEOMETRY.crop, GEOMETRY.tokens_per_crop
        pixels = np.empty((self.batch, side, side, 3), dtype=np.float32)
        labels = np.full((3, self.batch, tokens), _IGNORE, dtype=np.int64)
        labels[0] = 0
        for n in range(self.batch):
            pixels[n], objects = _draw_crop(rng, side, self.stream)
            for item in objects:
                _label(labels[:, n], item)
        mean, std = (np.asarray(v, dtype=np.float32) for v in (GEOMETRY.mean, GEOMETRY.std))
        crops = torch.from_numpy(patchify((pixels / 255 - mean) / std))
        kinds, colors, digits = torch.from_numpy(labels)
        return CropBatch(crops, kinds, colors, digits)


def patchify(pixels: np.ndarray) -> np.ndarray:
    """Square images (N, side, side, 3) to patches (N, patches, pixels), each in order row, column, channel."""
    n, grid, patch = len(pixels), GEOMETRY.patches, GEOMETRY.patch
    cut = pixels.reshape(n, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(cut.reshape(n, grid * grid, -1), dtype=np.float32)


def _draw_crop(rng: np.random.Generator, side: int, stream: str) -> tuple[np.ndarray, list[SceneObject]]:
    """One crop and what was painted on it: objects of log-uniform sizes that hardly touch, some cut by the border."""
    r, g, b = (int(v) for v in rng.integers(8, 60) + rng.integers(0, 16, 3))
    canvas = blank(side, side, (r, g, b), rng)
    objects: list[SceneObject] = []
    for _ in range(int(rng.integers(*_ATTEMPTS))):
        is_digit = rng.random() < 0.75
        low, high = _SIZES["digit" if is_digit else "shape"]
        size = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        x, y = (float(v) for v in rng.uniform(-2, side + 2, 2))
        if any(max(abs(x - o.x), abs(y - o.y)) < 0.5 * (size + o.size) for o in objects):
            continue
        digit, value = pick_digit(rng, stream) if is_digit else (None, None)
        kind = "digit" if is_digit else SHAPES[int(rng.integers(len(SHAPES)))]
        color = _COLOR_NAMES[int(rng.integers(len(_COLOR_NAMES)))]
        angle, stretch = float(rng.uniform(-0.25, 0.25)), float(rng.uniform(0.8, 1.2))
        item = SceneObject(kind, color, jitter_rgb(rng, color), x, y, size, angle, stretch, digit, value)
        paint(canvas, item)
        objects.append(item)
    return finish(canvas), objects


def _label(labels: np.ndarray, item: SceneObject) -> None:
    """Marks the tokens on the object's core: the one at its center, more for large objects."""
    token = GEOMETRY.crop / GEOMETRY.tokens[0]
    centres = (np.arange(GEOMETRY.tokens[0]) + 0.5) * token
    reach = max(token / 2, 0.25 * item.size)
    rows, columns = np.abs(centres - item.y) <= reach, np.abs(centres - item.x) <= reach
    covered = np.flatnonzero(rows[:, None] & columns)
    labels[0, covered] = _KINDS.index(item.kind)
    labels[1, covered] = _COLOR_NAMES.index(item.color)
    if item.value is not None:
        labels[2, covered] = item.value


class TokenHeads(nn.Module):
    """Linear readouts of an image token."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.kind = nn.Linear(d_model, len(_KINDS))
        self.color = nn.Linear(d_model, len(_COLOR_NAMES))
        self.digit = nn.Linear(d_model, 10)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.norm(tokens)
        return self.kind(normed), self.color(normed), self.digit(normed)


def warmup_loss(vision: VisionBackbone, heads: TokenHeads, batch: CropBatch) -> tuple[Tensor, dict[str, float]]:
    """Summed cross entropies, and the shares of tokens read right."""
    tokens = vision(batch.crops[:, None])[:, 0]
    loss = tokens.new_zeros((), dtype=torch.float32)
    metrics = {}
    for name, logits, labels in zip(
        ("kind", "color", "digit"), heads(tokens), (batch.kinds, batch.colors, batch.digits), strict=True
    ):
        part = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORE)
        loss = loss + part
        known = labels > 0 if name == "kind" else labels != _IGNORE
        metrics[name] = float((logits.argmax(-1) == labels)[known].float().mean())
    return loss, metrics
