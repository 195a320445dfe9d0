"""What a processor accepts as image and question, and how the rest is refused."""

import io
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from envs.errors import UserError
from envs.processing import MolmoEProcessor
from envs.processing.images import open_image


@pytest.fixture(scope="module")
def embedded() -> MolmoEProcessor:
    return MolmoEProcessor.from_pretrained("embedded")


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
def test_heic_without_its_reader_is_named(brand: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    content = b"\0\0\0\x18ftyp" + brand + bytes(40)
    (tmp_path / "a.HEIC").write_bytes(content)
    for source in (content, tmp_path / "a.HEIC"):
        with pytest.raises(UserError, match=r"HEIC: pip install 'ray-ctrl\[heic\]'"):
            open_image(source)


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 3), (40, 60, 4)])
def test_arrays_of_pixels_are_images(embedded: MolmoEProcessor, shape: tuple[int, ...]) -> None:
    pixels = np.full(shape, 255, np.uint8)
    pixels[:20] = 90
    pixels[..., 3:] = 255
    given = embedded(pixels, "what?")
    wanted = embedded(Image.fromarray(pixels), "what?")
    assert all(torch.equal(given[key], wanted[key]) for key in wanted)


def test_the_bytes_of_a_file_are_an_image(embedded: MolmoEProcessor) -> None:
    image, buffer = Image.new("RGB", (30, 20), (9, 8, 7)), io.BytesIO()
    image.save(buffer, "png")
    assert torch.equal(embedded(buffer.getvalue(), "?")["images"], embedded(image, "?")["images"])


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros(4, np.uint8),
        torch.zeros(3, 4, 4),
        [[1, 2]],
        5,
        "QUJD" * 10_000,
        b"QUJD" * 10_000,
        "a\udcff.png",
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_image_is_refused_in_a_line(embedded: MolmoEProcessor, image: Any) -> None:
    with pytest.raises(UserError) as caught:
        embedded(image, "what?")
    assert len(caught.value.message.encode()) < 400


@pytest.mark.parametrize("question", ["q\ud83d", "\udcff what"])
def test_half_characters_in_a_question_are_refused(embedded: MolmoEProcessor, question: str) -> None:
    for ask in (lambda: embedded(None, question), lambda: embedded.shape((9, 9), "low", question)):
        with pytest.raises(UserError, match="not valid Unicode"):
            ask()


def test_prompts_beyond_the_models_length_are_refused(embedded: MolmoEProcessor) -> None:
    again = pickle.loads(pickle.dumps(embedded))
    assert again.max_tokens == embedded.max_tokens == 4096
    words = "word " * 5000
    for size, image in ((None, None), ((9, 9), Image.new("RGB", (9, 9)))):
        with pytest.raises(UserError, match="max_sequence_length of 4,096: shorten the question"):
            again(image, words)
        with pytest.raises(UserError, match="max_sequence_length"):
            again.shape(size, "low", words)
    exact = MolmoEProcessor(
        embedded.image_processor, embedded.tokenizer, max_tokens=embedded.shape(None, "low", "a").prompt_tokens
    )
    assert exact(None, "a")["input_ids"].shape[1] == exact.max_tokens
    with pytest.raises(UserError, match="shorten"):
        exact(Image.new("RGB", (9, 9)), "a")
