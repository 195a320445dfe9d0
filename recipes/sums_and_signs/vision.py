"""Vision phase: the tower alone learns to name what stands under each of its tokens, digits above all.

Trained from questions alone the image encoder stays blind to handwriting for very long. Here it sees single crops with
a few things of every size that the tiers produce, and every token on a thing is asked for its kind, color, digit and
core through linear heads, which are thrown away afterwards. The tower does not learn from then on: what a sign is worth
cannot be learned by the tower, and later phases spend no time on its gradients.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from envs.data.scenes.draw import blank, finish
from envs.data.scenes.layout import pick_digit
from envs.model.vision import VisionBackbone
from recipes.embedded_model.shape import GEOMETRY
from recipes.embedded_model.warmup import patchify
from recipes.sums_and_signs.pictures import COLOR_NAMES, OUTLINES, Item, jitter, paint_item

_IGNORE: Final = -100
_KINDS: Final = ("none", "digit", *OUTLINES)
_NO_CORE: Final = len(COLOR_NAMES)
READOUTS: Final = {"kind": len(_KINDS), "color": len(COLOR_NAMES), "digit": 10, "core": len(COLOR_NAMES) + 1}
"""What each token is asked, and the number of answers."""
_DIGIT_SHARE: Final = 0.75
_SIZES: Final = {"digit": (8.0, 42.0), "sign": (11.0, 42.0)}
_ATTEMPTS: Final = (2, 7)


@dataclass(frozen=True)
class CropBatch:
    """Crops (N, patches, pixels), and labels (readouts, N, tokens) in the order of `READOUTS`, -100 where none."""

    crops: Tensor
    labels: Tensor


class Crops(Dataset[CropBatch]):
    """Batch `i` is a pure function of (seed, i), so that a resumed run sees what an uninterrupted one would."""

    def __init__(self, steps: int, batch: int, seed: int, stream: str = "corpus") -> None:
        self.steps, self.batch, self.seed, self.stream = steps, batch, seed, stream

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> CropBatch:
        rng = np.random.default_rng([self.seed, 1, step])
        pixels = np.empty((self.batch, GEOMETRY.crop, GEOMETRY.crop, 3), dtype=np.float32)
        labels = np.full((len(READOUTS), self.batch, GEOMETRY.tokens_per_crop), _IGNORE, dtype=np.int64)
        labels[0] = 0
        for n in range(self.batch):
            pixels[n], items = _draw_crop(rng, self.stream)
            for item in items:
                _label(labels[:, n], item)
        mean, std = (np.asarray(v, dtype=np.float32) for v in (GEOMETRY.mean, GEOMETRY.std))
        return CropBatch(torch.from_numpy(patchify((pixels / 255 - mean) / std)), torch.from_numpy(labels))


def _draw_crop(rng: np.random.Generator, stream: str) -> tuple[np.ndarray, list[Item]]:
    """One crop and what was painted on it: things of log-uniform sizes that hardly touch, some cut by the border."""
    side = GEOMETRY.crop
    r, g, b = (int(v) for v in rng.integers(8, 60) + rng.integers(0, 16, 3))
    canvas = blank(side, side, (r, g, b), rng)
    items: list[Item] = []
    for _ in range(int(rng.integers(*_ATTEMPTS))):
        is_digit = rng.random() < _DIGIT_SHARE
        low, high = _SIZES["digit" if is_digit else "sign"]
        size = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        x, y = (float(v) for v in rng.uniform(-2, side + 2, 2))
        if any(max(abs(x - other.x), abs(y - other.y)) < 0.5 * (size + other.size) for other in items):
            continue
        item = _draw_thing(rng, stream, is_digit, x, y, size)
        paint_item(canvas, item)
        items.append(item)
    return finish(canvas), items


def _draw_thing(rng: np.random.Generator, stream: str, is_digit: bool, x: float, y: float, size: float) -> Item:
    color = COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))]
    angle, stretch = float(rng.uniform(-0.2, 0.2)), float(rng.uniform(0.85, 1.15))
    if is_digit:
        digit, value = pick_digit(rng, stream)
        return Item("digit", color, jitter(rng, color), x, y, size, angle, stretch, digit, value)
    kind, core = OUTLINES[int(rng.integers(len(OUTLINES)))], COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))]
    rgb = jitter(rng, color)
    if core == color:
        return Item(kind, color, rgb, x, y, size, angle, stretch)
    return Item(kind, color, rgb, x, y, size, angle, stretch, core=core, core_rgb=jitter(rng, core))


def _label(labels: np.ndarray, item: Item) -> None:
    """Marks the tokens on the thing's middle: the one at its center, more for large things."""
    token = GEOMETRY.crop / GEOMETRY.tokens[0]
    centers = (np.arange(GEOMETRY.tokens[0]) + 0.5) * token
    reach = max(token / 2, 0.25 * item.size)
    rows, columns = np.abs(centers - item.y) <= reach, np.abs(centers - item.x) <= reach
    covered = np.flatnonzero(rows[:, None] & columns)
    labels[0, covered] = _KINDS.index(item.kind)
    labels[1, covered] = COLOR_NAMES.index(item.color)
    if item.value is not None:
        labels[2, covered] = item.value
    else:
        labels[3, covered] = _NO_CORE if item.core is None else COLOR_NAMES.index(item.core)


class TokenHeads(nn.Module):
    """Linear readouts of an image token (..., D): logits by name."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.heads = nn.ModuleDict({name: nn.Linear(d_model, answers) for name, answers in READOUTS.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        normed = self.norm(tokens)
        return {name: head(normed) for name, head in self.heads.items()}


def vision_loss(vision: VisionBackbone, heads: TokenHeads, batch: CropBatch) -> tuple[Tensor, dict[str, float]]:
    """Summed cross entropies, and the shares of tokens read right."""
    tokens = vision(batch.crops[:, None])[:, 0]
    loss = tokens.new_zeros((), dtype=torch.float32)
    metrics = {}
    for (name, logits), labels in zip(heads(tokens).items(), batch.labels, strict=True):
        loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORE)
        known = labels > 0 if name == "kind" else labels != _IGNORE
        metrics[name] = float((logits.argmax(-1) == labels)[known].float().mean())
    return loss, metrics
