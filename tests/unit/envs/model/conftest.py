"""The golden model and its numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE

GOLDEN = Path(__file__).parents[3] / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_meta() -> dict[str, Any]:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def model() -> AdaptiveMolmoE:
    return AdaptiveMolmoE.from_pretrained(GOLDEN)


@pytest.fixture(scope="session")
def inputs(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("input_ids", "images", "image_masks", "image_input_idx")
    return {name: golden[f"inputs.{name}"] for name in names}


@pytest.fixture(scope="session")
def variants(golden_meta: dict[str, Any]) -> list[ExecutionPlan]:
    return [
        ExecutionPlan("high", v["insertion_position"], v["top_k"], tuple(v["kept_blocks"]))
        for v in golden_meta["variants"]
    ]
