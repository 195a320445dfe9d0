"""The processor equals the published one bit for bit, and its prompts token for token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from envs.processing import MolmoEProcessor
from envs.processing.image_processor import AdaptiveMolmoEImageProcessor, ImageGeometry, make_layout, select_tiling
from envs.processing.images import open_image
from envs.processing.prompt import prompt_text, with_options

ROOT = Path(__file__).parents[4]
GOLDEN = ROOT / "tests" / "golden"
TOKENIZER = ROOT.parent / "shared" / "tokenizer"
PREPROC = json.loads((GOLDEN / "preproc" / "preproc.json").read_text())
PROMPTS = json.loads((GOLDEN / "text" / "prompts.json").read_text())
TIER = {3: "low", 6: "medium", 12: "high"}
PUBLISHED = {
    "base_image_input_size": [336, 336],
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_patch_size": 14,
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_token_length_h": 12,
    "image_token_length_w": 12,
    "overlap_margins": [4, 4],
}
# The golden sample of patches takes every 29th patch and every 31st number.
SAMPLE = (slice(None), slice(None, None, 29), slice(None, None, 31))

needs_tokenizer = pytest.mark.skipif(
    not TOKENIZER.is_dir(), reason="the published tokenizer is not at ../shared/tokenizer"
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "preproc" / "preproc.safetensors")


@pytest.fixture(scope="module")
def processor() -> MolmoEProcessor:
    return MolmoEProcessor.from_pretrained(TOKENIZER)


@pytest.mark.parametrize("case", PREPROC["cases"], ids=lambda case: case["key"])
def test_image_is_bit_equal(case: dict[str, Any], golden: dict[str, Tensor]) -> None:
    geometry = ImageGeometry.from_config(PUBLISHED)
    image = open_image(GOLDEN / "preproc" / case["png"])
    tiling = select_tiling(geometry, image.size, case["max_crops"])
    images, masks = AdaptiveMolmoEImageProcessor(**PUBLISHED).patches(image, tiling)
    layout = make_layout(geometry, tiling, (50280, 50281, 50282, 50283))
    want = {name: golden[f"{case['key']}.{name}"] for name in ("patches_sample", "image_masks", "image_input_idx")}

    assert list(tiling) == case["tiling"]
    assert list(images.shape) == case["images_shape"]
    assert torch.equal(images[SAMPLE], want["patches_sample"])
    assert torch.equal(masks, want["image_masks"])
    # Sums in double precision see every number; they differ by their own rounding alone.
    for name, value in (
        ("crop_sum", images),
        ("crop_abs_sum", images.abs()),
        ("crop_sq_sum", images.double() ** 2),
    ):
        total = value.double().sum((1, 2))
        torch.testing.assert_close(total, golden[f"{case['key']}.{name}"], rtol=1e-14, atol=1e-9)
    index = np.where(layout.input_idx < 0, layout.input_idx, layout.input_idx + 1)
    assert np.array_equal(index, want["image_input_idx"].numpy())


def test_complete_image_is_equal_in_half_precision(golden: dict[str, Tensor]) -> None:
    geometry = ImageGeometry.from_config(PUBLISHED)
    images, _ = AdaptiveMolmoEImageProcessor(**geometry.to_config()).patches(
        open_image(GOLDEN / "preproc" / "p3.png"), (1, 1)
    )
    assert torch.equal(images.half(), golden["p3.mc3.pad.images_f16"])


@needs_tokenizer
@pytest.mark.parametrize("case", PREPROC["cases"], ids=lambda case: case["key"])
def test_request_is_equal(case: dict[str, Any], golden: dict[str, Tensor], processor: MolmoEProcessor) -> None:
    tier, question = TIER[case["max_crops"]], PREPROC["prompt"]
    inputs = processor(GOLDEN / "preproc" / case["png"], question, tier=tier)
    for name in ("input_ids", "image_masks", "image_input_idx"):
        assert torch.equal(inputs[name][0], golden[f"{case['key']}.{name}"].to(inputs[name].dtype)), name
    shape = processor.shape((case["width"], case["height"]), tier, question)
    assert shape.crops == case["n_crops"] == inputs["images"].shape[1]
    assert shape.prompt_tokens == case["n_tokens"] == inputs["input_ids"].shape[1]


@needs_tokenizer
@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: f"{case['style']}-{case['question'][:8]}-{case['kind']}")
def test_prompt_is_equal(case: dict[str, Any], processor: MolmoEProcessor) -> None:
    question = with_options(case["question"], case["options"]) if "options" in case else case["question"]
    assert prompt_text(question, case["style"]) == case["text"]
    assert processor.prompt_ids(question, case["style"]) == case["ids"]
    assert processor(None, question, style=case["style"])["input_ids"].tolist() == [[50279, *case["ids"]]]
