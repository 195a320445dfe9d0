"""Image files to RGB as a viewer displays them; errors are one line that names the file."""

import hashlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from envs.errors import UserError

T = TypeVar("T")

MAX_PIXELS: Final = 89_478_485
"""Largest image accepted: a quarter of a GiB of RGB, Pillow's own threshold. A small file may unpack to far more."""

IMAGE_ENDINGS: Final = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".heic", ".heif", ".avif", ".ppm", ".jp2"),
)
"""Endings of image files, in lower case."""

_HEIF_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ORIENTATION_TAG: Final = 0x0112
_WIDE_GREY: Final = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


class ImageRef(ABC):
    """A lazy, picklable image: a frozen dataclass with `digest` as a field or property."""

    digest: str
    """Hex digest of the image's content: two references with equal digests show the same image."""

    @abstractmethod
    def load(self) -> Image.Image:
        """The image as RGB with its EXIF orientation applied.

        Raises:
            UserError: the image cannot be read; the message names where it came from.
        """

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels after EXIF orientation; override if known without decoding."""
        return self.load().size


@dataclass(frozen=True)
class FileImage(ImageRef):
    """An image file, identified by the SHA-256 of its bytes. Make one with `FileImage.open(path)`."""

    path: str
    digest: str
    known_size: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: str | Path) -> "FileImage":
        """Reference to the file at `path`: its bytes are hashed now, its pixels decoded on `load`."""
        try:
            with Path(path).open("rb") as file:
                return cls(str(path), hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UserError(
                f"cannot read image {path}: {error.strerror or error}; give the path of an image file"
            ) from None

    def load(self) -> Image.Image:
        try:
            content = Path(self.path).read_bytes()
        except OSError:
            return open_image(self.path)  # raises with the reason
        # Outcomes are stored by digest: another picture under the same path must not be served as this one.
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise UserError(f"image {self.path} was changed since the data was opened: start again")
        return open_image(content, f"image {self.path}")

    @property
    def size(self) -> tuple[int, int]:
        return self.known_size or image_size(self.path)


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """The image in a file, or in a file's bytes, as RGB with EXIF orientation applied. See `to_rgb`.

    Args:
        source: path of the file, or its content.
        name: of the image in errors; None for the path.

    Raises:
        UserError: unreadable, truncated or not an image, or larger than `MAX_PIXELS`.
    """
    return read_image(source, name, lambda image: to_rgb(image, name or _name(source)))


def image_size(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height in pixels after EXIF orientation, read from the header alone.

    Errors as in `open_image`.
    """
    return read_image(source, name, oriented_size)


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image after its EXIF orientation; decodes no pixels."""
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8) else (width, height)


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """RGB with EXIF orientation applied, transparency over white, 16-bit gray scaled to 8 bits.

    Float images are read as 0..1 if all values are in it, else as 0..255; 32-bit ones as 0..255 or 0..65535.
    Animations give their first frame.

    Raises:
        UserError: larger than `MAX_PIXELS`, without pixels, or of a mode that has no RGB reading.
    """
    check_size(image.size, name)
    try:
        if _ORIENTATION_TAG in image.getexif():
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGB" and "transparency" not in image.info:
            image.load()
            return image
        if image.mode in _WIDE_GREY:
            return _wide_grey(image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            return Image.alpha_composite(white, layer).convert("RGB")
        return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        raise UserError(f"cannot read {name}: {error}; give a complete image file that opens in a viewer") from None


def check_size(size_wh: tuple[int, int], name: str = "the image") -> None:
    """Refuses images without pixels and decompression bombs."""
    width, height = size_wh
    if width < 1 or height < 1:
        raise UserError(f"{name} is {width}x{height} pixels: give an image of at least 1x1")
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} is {width}x{height} pixels, above the limit of {MAX_PIXELS:,}: give a smaller image")


def read_image(source: str | Path | bytes, name: str | None, read: Callable[[Image.Image], T]) -> T:
    """The result of `read` on the opened image. Arguments and errors as in `open_image`."""
    name = name or _name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _open(io.BytesIO(source) if isinstance(source, bytes) else Path(source))
        with image:
            check_size(image.size, name)
            return read(image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: check the path") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} is above the limit of {MAX_PIXELS:,} pixels: give a smaller image") from None
    except Exception as error:
        reason = "not an image in a known format" if isinstance(error, Image.UnidentifiedImageError) else excerpt(error)
        raise UserError(f"cannot read {name}: {reason}; give a complete image file that opens in a viewer") from None


def _open(source: io.BytesIO | Path) -> Image.Image:
    """Opens an image; HEIC, as phones write it, through the optional pillow-heif."""
    try:
        return Image.open(source)
    except Image.UnidentifiedImageError:
        head = source.getvalue()[:12] if isinstance(source, io.BytesIO) else _head(source)
        if head[4:8] != b"ftyp" or head[8:12] not in _HEIF_BRANDS:
            raise
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError("the image is HEIC: pip install 'ray-ctrl[heic]' to read it, or give JPEG or PNG") from None
    pillow_heif.register_heif_opener()
    return Image.open(source)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(12)


def excerpt(value: object, letters: int = 60) -> str:
    """A value for a message: one line of about `letters`, whatever its size."""
    text = repr(value[:letters] if isinstance(value, str | bytes | list) else value)
    if isinstance(value, str | bytes | list) and len(value) > letters:
        text += f" ({len(value):,} in all)"
    return text if len(text) <= letters + 25 else f"{text[: letters - 3]}..."


def _name(source: str | Path | bytes) -> str:
    return "the image" if isinstance(source, bytes) else f"image {_short(str(source))}"


def _short(text: str, letters: int = 300) -> str:
    """A path that may be a picture in base64, passed by mistake."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= letters else f"{text[:60]}... ({len(text):,} letters)"


def _wide_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits scaled to 8. Pillow's own conversion clips it to white."""
    values: npt.NDArray[Any] = np.asarray(image).astype(np.float32)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if image.mode == "F":
        values = values * 255 if low >= 0 and high <= 1 else values
    elif image.mode != "I" or high > 255:
        values = values / 257
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8)).convert("RGB")
