"""What the installed package promises: types, and its version by command and attribute."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ray_ctrl

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["ray_ctrl", "envs", "policies", "cluster"])
def test_types_are_shipped(package: str) -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in data["*"]


def test_version_by_module_and_attribute() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ray_ctrl", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == f"ray-ctrl {ray_ctrl.__version__}"
