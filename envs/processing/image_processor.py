"""Images to crops of patches, bit for bit as the published MolmoE processor makes them, for any crop geometry.

The model gets an image downscaled (the global view) and, larger, as a grid of overlapping crops (its tiling). The
tiling and with it every count and index depend on the image's size alone, so they are computed without pixels.

Source: the image processor published with allenai/MolmoE-1B-0924 ("overlap-and-resize").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import BaseImageProcessor, BatchFeature

from envs.errors import UserError

INVALID: Final = -100
"""`image_input_idx` of a crop's token that another crop already covers."""

STRIPS_ABOVE: Final = 1 << 22
"""Larger images are resized in strips of about `STRIP_PIXELS`."""
STRIP_PIXELS: Final = 1 << 18


@dataclass(frozen=True)
class ImageGeometry:
    """Crops as `preprocessor_config.json` describes them.

    Args:
        crop: side of a square crop in pixels.
        patch: side of a square patch in pixels.
        margins: patches a crop shares with its neighbour before and after it.
        tokens: rows and columns of tokens a crop becomes after pooling.
        mean: per channel, subtracted from values in 0..1.
        std: per channel, divided by.
    """

    crop: int
    patch: int
    margins: tuple[int, int]
    tokens: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImageGeometry":
        """Geometry of a published config.

        Raises:
            UserError: a missing key, or a value that does not fit the others; names key and value.
        """

        def read(key: str, count: int) -> tuple[Any, ...]:
            value = config.get(key)
            values = tuple(value) if isinstance(value, list | tuple) else (value,)
            if len(values) != count or not all(isinstance(v, int | float) and v >= 0 for v in values):
                raise UserError(f"{key} is {value!r}: give {count} number{'s'[: count - 1]} of 0 or more")
            return values

        height, width = read("base_image_input_size", 2)
        if height != width:
            raise UserError(f"base_image_input_size is {[height, width]}: only square crops are supported")
        (patch,), (before, after) = read("image_patch_size", 1), read("overlap_margins", 2)
        tokens = tuple(int(read(f"image_token_length_{side}", 1)[0]) for side in "hw")
        margins, mean, std = (int(before), int(after)), read("image_mean", 3), read("image_std", 3)
        geometry = cls(int(height), int(patch), margins, (tokens[0], tokens[1]), mean, std)
        if misfit := geometry._misfit():
            raise UserError(misfit)
        return geometry

    def _misfit(self) -> str | None:
        """What does not fit, under the published keys."""
        if min(self.std) <= 0:
            return f"image_std is {self.std}: give three numbers above 0"
        if self.patch < 1 or self.crop < self.patch or self.crop % self.patch:
            crops = f"crops of {self.crop} pixels (base_image_input_size)"
            return f"{crops} do not divide into patches of {self.patch} (image_patch_size)"
        if min(self.tokens) < 1 or any(self.patches % t for t in self.tokens) or len(set(self.tokens)) != 1:
            keys = "image_token_length_h, image_token_length_w"
            return f"{self.patches} patches a side do not pool into {list(self.tokens)} ({keys}): give one divisor"
        if any(margin % self.pool for margin in self.margins) or self.window < self.pool:
            allowed = f"multiples of {self.pool} that leave at least {self.pool} of {self.patches} patches between them"
            return f"overlap_margins {list(self.margins)} do not fit: give {allowed}"
        return None

    def to_config(self) -> dict[str, Any]:
        """The published keys, as in `from_config`."""
        return {
            "base_image_input_size": [self.crop, self.crop],
            "image_mean": list(self.mean),
            "image_patch_size": self.patch,
            "image_std": list(self.std),
            "image_token_length_h": self.tokens[0],
            "image_token_length_w": self.tokens[1],
            "overlap_margins": list(self.margins),
        }

    @property
    def patches(self) -> int:
        """Patches along a crop's side."""
        return self.crop // self.patch

    @property
    def pool(self) -> int:
        """Patches pooled into one token, along a side."""
        return self.patches // self.tokens[0]

    @property
    def window(self) -> int:
        """Patches along a side that a crop adds to its neighbours."""
        return self.patches - sum(self.margins)

    def token_grid(self, tiling: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens that a grid of crops becomes after pooling."""
        rows, columns = ((n * self.window + sum(self.margins)) // self.pool for n in tiling)
        return rows, columns

    @property
    def tokens_per_crop(self) -> int:
        return self.tokens[0] * self.tokens[1]


@lru_cache(maxsize=64)
def _candidates(max_crops: int) -> npt.NDArray[np.int32]:
    """All (rows, columns) of at most `max_crops` crops, smaller grids first so that ties fall to them."""
    grids = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    return np.array(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])), dtype=np.int32)


@lru_cache(maxsize=65536)
def select_tiling(geometry: ImageGeometry, size_wh: tuple[int, int], max_crops: int) -> tuple[int, int]:
    """Rows and columns of crops for an image: the grid of least enlargement, or if all shrink it, of least shrinking.

    Computed in float32, as published, because a last bit can decide between two grids.
    """
    margin, window = sum(geometry.margins) * geometry.patch, geometry.window * geometry.patch
    grids = _candidates(max_crops)
    size_hw = np.array([size_wh[1] - margin, size_wh[0] - margin], dtype=np.float32)
    with np.errstate(divide="ignore"):
        scale = ((grids * window).astype(np.float32) / size_hw).min(axis=-1)
    best = scale.argmax() if (scale < 1).all() else np.where(scale < 1, np.float32(10e9), scale).argmin()
    return int(grids[best, 0]), int(grids[best, 1])


@dataclass(frozen=True)
class ImageLayout:
    """Positions of an image's tokens; a function of the tiling alone.

    Args:
        ids: the image's token ids, global view first (image_tokens,).
        input_idx: for every token of every crop the position in `ids` whose embedding it is added to, `INVALID` if a
            neighboring crop covers it (1 + crops, tokens per crop).
    """

    ids: npt.NDArray[np.int64]
    input_idx: npt.NDArray[np.int64]


def make_layout(geometry: ImageGeometry, tiling: tuple[int, int], ids: tuple[int, int, int, int]) -> ImageLayout:
    """Layout of one tiling; `ids` are the start, end, patch and column token."""
    rows, columns = geometry.token_grid(tiling)
    tokens_h, tokens_w = geometry.tokens
    crop_y, grid_y = _owned(geometry, tiling[0])
    crop_x, grid_x = _owned(geometry, tiling[1])
    crops = np.full((tiling[0], tokens_h, tiling[1], tokens_w), INVALID, dtype=np.int64)
    flat = crops.reshape(tiling[0] * tokens_h, tiling[1] * tokens_w)
    offset = tokens_h * (tokens_w + 1) + 2  # the global view's tokens
    flat[np.ix_(crop_y, crop_x)] = offset + _positions(rows, columns)[np.ix_(grid_y, grid_x)]
    global_view = _positions(tokens_h, tokens_w).reshape(1, -1)
    per_crop = crops.transpose(0, 2, 1, 3).reshape(-1, geometry.tokens_per_crop)
    sequence = np.concatenate([_view(tokens_h, tokens_w, ids), _view(rows, columns, ids)])
    return ImageLayout(sequence, np.concatenate([global_view, per_crop]))


def _owned(geometry: ImageGeometry, crops: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Along one side, the token indices over all crops that are kept, and the index in the joint grid of each.

    A crop's margins belong to its neighbors, except at the image's edge. Crops keep their row order, so the kept
    tokens are consecutive in the joint grid.
    """
    before, after = (margin // geometry.pool for margin in geometry.margins)
    length = geometry.tokens[0]
    index = np.arange(length)
    kept = [
        crop * length + index[(0 if crop == 0 else before) : (length if crop == crops - 1 else length - after)]
        for crop in range(crops)
    ]
    joined = np.concatenate(kept)
    return joined, np.arange(len(joined))


def _positions(rows: int, columns: int) -> npt.NDArray[np.int64]:
    """Positions of a view's patch tokens from its start token; a column token ends each row."""
    return 1 + np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)


def _view(rows: int, columns: int, ids: tuple[int, int, int, int]) -> npt.NDArray[np.int64]:
    start, end, patch, column = ids
    row = np.full(columns + 1, patch, dtype=np.int64)
    row[-1] = column
    return np.concatenate([[start], np.tile(row, rows), [end]])


def image_token_count(geometry: ImageGeometry, tiling: tuple[int, int]) -> int:
    """Tokens of an image in the prompt, start, end and column tokens included."""
    rows, columns = geometry.token_grid(tiling)
    return geometry.tokens[0] * (geometry.tokens[1] + 1) + rows * (columns + 1) + 4


class AdaptiveMolmoEImageProcessor(BaseImageProcessor):
    """RGB images to normalised patches, from the keys of a published `preprocessor_config.json`.

    Args:
        max_crops: of an image, in addition to the global view, where a call does not name a tiling.
        prompt_styles: whether the model was trained on prompt styles.
        config: the published keys of the geometry, see `ImageGeometry.from_config`; others are ignored.
    """

    model_input_names: ClassVar = ["images", "image_masks"]

    def __init__(self, max_crops: int = 12, prompt_styles: bool = True, **config: Any) -> None:
        super().__init__()
        if not isinstance(prompt_styles, bool):
            raise UserError(f"prompt_styles is {prompt_styles!r}: give true or false")
        self.geometry = ImageGeometry.from_config(config)
        self.max_crops, self.prompt_styles = max_crops, prompt_styles
        self._mean = torch.tensor(self.geometry.mean, dtype=torch.float32)
        self._std = torch.tensor(self.geometry.std, dtype=torch.float32)

    def to_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`, under the published names."""
        names = {"image_processor_type": "MolmoImageProcessor", "processor_class": "MolmoProcessor"}
        rule = {} if self.prompt_styles else {"prompt_styles": False}
        fixed = {"do_normalize": True, "image_padding_mask": True, "max_crops": self.max_crops}
        return self.geometry.to_config() | names | fixed | rule

    def preprocess(self, images: Image.Image, tiling: tuple[int, int] | None = None) -> BatchFeature:
        """`images` and `image_masks` of one RGB image, with a batch of 1 in front; see `patches`."""
        tiling = tiling or select_tiling(self.geometry, images.size, self.max_crops)
        found, masks = self.patches(images, tiling)
        return BatchFeature({"images": found[None], "image_masks": masks[None]})

    def patches(self, image: Image.Image, tiling: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Patches and padding masks of the global view and the crops of `tiling`.

        Args:
            image: RGB.

        Returns:
            images (1 + crops, patches, pixels) float32, a patch's pixels in order row, column, channel; and
            image_masks (1 + crops, patches) float32, the share of each patch that is image. As published, the masks
            of the crops come first and the last row, for the global view, is -1.
        """
        geometry = self.geometry
        side, step = geometry.crop, geometry.window * geometry.patch
        height, width = (n * step + side - step for n in tiling)
        fits = [_fit(image.size, side, side), _fit(image.size, height, width)]
        resized = _resized(image, fits)
        global_view, _ = self._pad(resized[0], side, side)
        tiled, box = self._pad(resized[1], height, width)
        images = torch.empty(1 + tiling[0] * tiling[1], geometry.patches**2, 3 * geometry.patch**2)
        self._cut(global_view, (1, 1), images[:1])
        self._cut(tiled, tiling, images[1:])
        return images, make_masks(geometry, tiling, box).clone()

    def _pad(self, planes: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, int, int, int]]:
        """(3, h, w) centered on black (height, width, 3), normalized; and its box top, left, bottom, right."""
        fit_h, fit_w = planes.shape[1:]
        top, left = (height - fit_h) // 2, (width - fit_w) // 2
        canvas = torch.zeros(height, width, 3)
        canvas[top : top + fit_h, left : left + fit_w] = planes.clamp(0.0, 1.0).permute(1, 2, 0)
        return canvas.sub_(self._mean).div_(self._std), (top, left, top + fit_h, left + fit_w)

    def _cut(self, view: Tensor, tiling: tuple[int, int], out: Tensor) -> None:
        """Copy overlapping crops of (height, width, 3) into `out` (crops, patches, pixels) in one pass."""
        geometry = self.geometry
        n, side, step = geometry.patches, geometry.patch, geometry.window * geometry.patch
        row, column, channel = view.stride()
        shape = (*tiling, n, n, side, side, 3)
        strides = (row * step, column * step, row * side, column * side, row, column, channel)
        out.view(shape).copy_(view.as_strided(shape, strides))


def _fit(size_wh: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Rows and columns of an image once it fits into height x width."""
    # float32 and truncation as published: the last bit can move a size by one pixel.
    scale = min(np.float32(height) / np.float32(size_wh[1]), np.float32(width) / np.float32(size_wh[0]))
    rows, columns = (max(1, int(np.float32(n) * scale)) for n in (size_wh[1], size_wh[0]))
    return rows, columns


def _resized(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The image's planes (3, rows, columns) in 0..1 at several sizes.

    torch resizes along the rows first, so a photo is narrowed strip by strip with the same result bit for bit, and
    without 15 bytes a pixel for copies of it.
    """
    width, height = image.size
    if width * height <= STRIPS_ABOVE:
        planes = _planes(image)
        return [_resize(planes, size) for size in sizes]
    narrow = [torch.empty(3, height, columns) for _, columns in sizes]
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        planes = _planes(image.crop((0, top, width, bottom)))
        for view, (_, columns) in zip(narrow, sizes, strict=True):
            view[:, top:bottom] = _resize(planes, (bottom - top, columns))
    return [_resize(view, size) for view, size in zip(narrow, sizes, strict=True)]


def _planes(image: Image.Image) -> Tensor:
    """(3, height, width) float32 in 0..1; planes resize faster than interleaved channels."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32)).div_(255)


def _resize(planes: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(planes.shape[1:]) == size:
        return planes
    return interpolate(planes[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


@lru_cache(maxsize=1024)
def make_masks(geometry: ImageGeometry, tiling: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """Share of each patch that is image, see `patches`; `box` is the image's top, left, bottom and right.

    The image is a rectangle, so a patch's share is the product of its covered rows and columns.
    """
    top, left, bottom, right = box
    rows = _covered(geometry, tiling[0], top, bottom)
    columns = _covered(geometry, tiling[1], left, right)
    area = (rows[:, None, :, None] * columns[None, :, None, :]).astype(np.float32)
    masks = torch.full((1 + tiling[0] * tiling[1], geometry.patches**2), -1.0)
    masks[:-1] = torch.from_numpy(area / np.float32(geometry.patch**2)).view(-1, geometry.patches**2)
    return masks


def _covered(geometry: ImageGeometry, crops: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Pixels in start..stop of each patch along one side (crops, patches)."""
    first = np.arange(crops)[:, None] * geometry.window + np.arange(geometry.patches)
    pixels = first * geometry.patch
    return (np.minimum(pixels + geometry.patch, stop) - np.maximum(pixels, start)).clip(0)
