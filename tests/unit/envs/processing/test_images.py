"""Images come out as a viewer shows them; bad ones are refused by name."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from envs.data import FileImage
from envs.errors import UserError
from envs.processing.images import MAX_PIXELS, image_size, open_image, to_rgb

VIA = {"LA": "RGBA", "PA": "RGBA", "I": "L", "F": "L"}
"""Modes that Pillow reaches through another."""


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def pixel(image: Image.Image, xy: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    value = image.getpixel(xy)
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "HSV", "PA", "I", "F"])
def test_every_mode_keeps_white_and_black(mode: str) -> None:
    picture = Image.new("RGB", (4, 2), "white")
    picture.putpixel((3, 1), (0, 0, 0))
    rgb = to_rgb(picture.convert(VIA.get(mode, "RGB")).convert(mode))
    assert rgb.mode == "RGB"
    assert pixel(rgb) == (255, 255, 255)
    assert pixel(rgb, (3, 1)) == (0, 0, 0)


def test_transparency_is_drawn_over_white(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    layer.putpixel((1, 0), (200, 0, 0, 255))
    rgb = open_image(saved(layer, tmp_path / "a.png"))
    assert [pixel(rgb), pixel(rgb, (1, 0))] == [(255, 255, 255), (200, 0, 0)]
    half = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert abs(pixel(half)[0] - 127) <= 1


def test_palette_transparency_is_drawn_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    rgb = open_image(saved(image, tmp_path / "p.png", transparency=0))
    assert [pixel(rgb), pixel(rgb, (1, 0))] == [(255, 255, 255), (0, 0, 255)]


def test_a_transparent_colour_is_drawn_over_white(tmp_path: Path) -> None:
    rgb = open_image(saved(Image.new("RGB", (1, 1), (9, 8, 7)), tmp_path / "t.png", transparency=(9, 8, 7)))
    assert pixel(rgb) == (255, 255, 255)


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (32768, 128), (65535, 255)])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, value: int, grey: int) -> None:
    path = saved(Image.fromarray(np.full((3, 3), value, np.uint16)), tmp_path / "deep.png")
    assert pixel(open_image(path)) == (grey, grey, grey)


@pytest.mark.parametrize(
    ("values", "greys"),
    [([0.0, 1.0], [0, 255]), ([0.0, 200.0], [0, 200]), ([float("nan"), 1], [0, 255])],
)
def test_float_grey(tmp_path: Path, values: list[float], greys: list[int]) -> None:
    path = saved(Image.fromarray(np.array([values], np.float32)), tmp_path / "f.tiff")
    assert [pixel(open_image(path), (x, 0))[0] for x in (0, 1)] == greys


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (6, 4), "white")
    upright.putpixel((0, 0), (255, 0, 0))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
    }
    undo |= {
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
    }
    undo |= {8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path / "turned.png", exif=exif)
    rgb = open_image(path)
    assert rgb.size == image_size(path) == (6, 4)
    assert pixel(rgb) == (255, 0, 0)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(open_image(path)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.9])
def test_truncated_files_are_refused_by_name(tmp_path: Path, kind: str, keep: float) -> None:
    path = saved(Image.effect_noise((60, 60), 90).convert("RGB"), tmp_path / f"cut.{kind}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=rf"cannot read image .*cut\.{kind}"):
        open_image(path)


@pytest.mark.parametrize("content", [b"not an image", b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.png").write_bytes(content)
    for read in (open_image, image_size):
        with pytest.raises(UserError, match=r"cannot read image .*odd\.png"):
            read(tmp_path / "odd.png")
    with pytest.raises(UserError, match="cannot read row 7"):
        open_image(content, "row 7")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^image \S+nothing\.png does not exist: check the path$"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="cannot read image"):
        open_image(tmp_path)
    with pytest.raises(UserError, match=r"cannot read image .*nothing\.png"):
        FileImage.open(tmp_path / "nothing.png")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims a huge picture."""

    def png_part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = png_part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_part(b"IDAT", zlib.compress(b"\0" * 1000)) + png_part(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 20_000), (100_000, 100_000)])
def test_decompression_bombs_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=rf"bomb\.png.* {MAX_PIXELS:,}"):
            open_image(tmp_path / "bomb.png")


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    one = FileImage.open(saved(Image.new("RGB", (3, 2)), tmp_path / "one.png"))
    (tmp_path / "two.png").write_bytes((tmp_path / "one.png").read_bytes())
    assert FileImage.open(tmp_path / "two.png").digest == one.digest
    assert one.size == one.load().size == (3, 2)
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "png")
    (tmp_path / "two.png").write_bytes(buffer.getvalue())
    assert FileImage.open(tmp_path / "two.png").digest != one.digest
