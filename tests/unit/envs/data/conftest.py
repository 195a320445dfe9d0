"""Small data sets in every layout, made on the spot."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def _picture(number: int, kind: str = "png") -> bytes:
    """Image number `number`: different numbers are different images."""
    buffer = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number % 256)
    Image.new("RGB", (20 + number % 7, 16), colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return _picture


@pytest.fixture
def save_picture() -> Callable[[Path, int], Path]:
    def save(path: Path, number: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_picture(number, "jpeg" if path.suffix == ".jpg" else "png"))
        return path

    return save


@pytest.fixture
def save_json() -> Callable[[Path, Any], Path]:
    def save(path: Path, content: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return save


@pytest.fixture
def save_lines() -> Callable[[Path, Sequence[Any]], Path]:
    def save(path: Path, rows: Sequence[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return path

    return save


@pytest.fixture
def save_parquet() -> Callable[[Path, dict[str, list[Any]]], Path]:
    """Saves columns as `datasets` does; `image` contains bytes."""

    def save(path: Path, columns: dict[str, list[Any]]) -> Path:
        from datasets import Dataset
        from datasets import Image as ImageFeature

        path.parent.mkdir(parents=True, exist_ok=True)
        columns = dict(columns)
        if "image" in columns:
            columns["image"] = [
                {"bytes": cell, "path": None} if isinstance(cell, bytes) else cell for cell in columns["image"]
            ]
        rows = Dataset.from_dict(columns)
        if "image" in columns:
            rows = rows.cast_column("image", ImageFeature(decode=False))
            rows = rows.cast_column("image", ImageFeature())
        rows.to_parquet(str(path))
        return path

    return save
