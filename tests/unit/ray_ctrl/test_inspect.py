"""A checkpoint's size, fit and memory are known from headers alone, up to full size."""

import json
import math
import re
import shutil
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.errors import UserError
from envs.files import size_text
from envs.model import AdaptiveMolmoE
from envs.model.checkpoint import read_headers
from envs.model.config import AdaptiveMolmoEConfig
from envs.model.inspect import (
    Device,
    describe,
    inspect_model,
    longest_prompt,
    needed_bytes,
    parameter_counts,
    request_memory,
)
from envs.model.molmoe import published_shapes

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
FULL_PARAMETERS = 7_221_875_712


@pytest.fixture(scope="module")
def full() -> AdaptiveMolmoEConfig:
    """MolmoE-1B's shape, from the small golden config with the published sizes put in."""
    published = json.loads((GOLDEN / "config.json").read_text())
    published |= {"d_model": 2048, "n_heads": 16, "moe_num_experts": 64, "max_crops": 12}
    published |= {"embedding_size": 50304, "vocab_size": 50280, "overlap_margins": [4, 4]}
    published["vision_backbone"] |= {
        "image_default_input_size": [336, 336],
        "image_emb_dim": 1024,
        "image_head_dim": 64,
        "image_mlp_dim": 4096,
        "image_num_heads": 16,
        "image_num_key_value_heads": 16,
        "image_num_layers": 23,
        "image_num_pos": 577,
    }
    return AdaptiveMolmoEConfig.from_dict(published)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    return tmp_path


def pattern(key: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", key)


def test_full_size_has_the_published_keys(full: AdaptiveMolmoEConfig) -> None:
    published = json.loads((GOLDEN / "key_patterns.json").read_text())
    repeats = {16: 16, 256: 16 * 64, 10: 23, 1: 1}  # small counts -> full counts
    expected = {key: repeats[entry["count"]] for key, entry in published.items()}
    assert Counter(pattern(key) for key in published_shapes(full)) == expected
    assert len(published_shapes(full)) == 3573


def test_full_size_on_meta_has_the_formulas_parameters(full: AdaptiveMolmoEConfig) -> None:
    with torch.device("meta"):
        model = AdaptiveMolmoE(full)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == FULL_PARAMETERS
    assert sum(p.numel() * 2 for p in parameters) == 14_443_751_424
    assert sum(parameter_counts(full).values()) == FULL_PARAMETERS
    assert sum(math.prod(shape) for shape in published_shapes(full).values()) == FULL_PARAMETERS


def test_the_documented_numbers_are_the_formulas(full: AdaptiveMolmoEConfig) -> None:
    page = (ROOT / "docs" / "model.md").read_text()
    for count in (*parameter_counts(full).values(), FULL_PARAMETERS, 2 * FULL_PARAMETERS):
        assert f"{count:,}" in page
    assert f"{longest_prompt(full, 'high') + 64:,} tokens" in page


def test_longest_prompt_is_the_processors(full: AdaptiveMolmoEConfig) -> None:
    from envs.knobs import TIER_CROPS
    from envs.processing.image_processor import ImageGeometry, image_token_count

    geometry = ImageGeometry(336, 14, (4, 4), (12, 12), (0, 0, 0), (1, 1, 1))
    for tier, crops in TIER_CROPS.items():
        grids = [(i, j) for i in range(1, crops + 1) for j in range(1, crops // i + 1)]
        longest = max(image_token_count(geometry, grid) for grid in grids)
        assert longest_prompt(full, tier) == 1 + longest + 64


def test_memory_grows_with_the_dtype(full: AdaptiveMolmoEConfig) -> None:
    small, large = request_memory(full, "bfloat16"), request_memory(full, "float32")
    assert large.cache == 2 * small.cache == 2 * 16 * 2048 * 1589 * 4
    assert needed_bytes(full, "bfloat16", cuda=True) > needed_bytes(full, "bfloat16", cuda=False)
    assert 14e9 < needed_bytes(full, "bfloat16", cuda=True) < 17e9


def test_summary_of_the_golden_checkpoint(folder: Path) -> None:
    devices = [Device("cpu", 2**30, 2**29), Device("cuda:0 (small)", 2**20, 2**20)]
    summary = inspect_model(folder, devices=devices)
    tensors = load_file(folder / "model.safetensors")
    assert summary.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert summary.parameters == sum(parameter_counts(summary.config).values())
    assert summary.bytes_by("dtype") == {"F32": 4 * summary.parameters}
    assert summary.bytes_by("file") == {"model.safetensors": 4 * summary.parameters}
    assert summary.problems == ()
    assert [need.fits for need in summary.needs] == [True, True, False, False]
    text = describe(summary)
    for part in ("225 combinations, 195 distinct", "2,046,336", "does not fit", "blocks 4, 13, 10, 2"):
        assert part in text


def test_this_machines_memory_is_found(folder: Path) -> None:
    need = inspect_model(folder).needs[0]
    assert need.device.name == "cpu"
    assert 0 < need.device.free <= need.device.total
    assert need.fits


def test_misfits_are_problems_not_errors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.transformer.ln_f.weight"]
    tensors["odd.weight"] = torch.zeros(3)
    tensors["lm_head.weight"] = torch.zeros(5, 5, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    summary = inspect_model(folder)
    assert summary.problems == (
        "1 missing: model.transformer.ln_f.weight",
        "1 unexpected: odd.weight",
        "1 of another shape: lm_head.weight is (5, 5) instead of (512, 64)",
    )
    assert summary.bytes_by("dtype")["BF16"] == 50
    assert "problem     1 missing" in describe(summary)


def test_shards_by_their_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((names[:100], names[100:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / file)
        weight_map |= dict.fromkeys(keys, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    summary = inspect_model(folder)
    assert summary.problems == ()
    assert len(summary.bytes_by("file")) == 2
    assert summary.parameters == 2_046_336
    cut = folder / "model-00002-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    problems = inspect_model(folder).problems
    assert re.search("model-00002-of-00002.safetensors: .*corrupt or incomplete", problems[0])
    assert "missing" in problems[1]


def file_of(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 50) + b"{",
        file_of(b"\xff\xfe"),
        file_of([1, 2]),
        file_of({"a": {"dtype": "F32"}}),
        file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        file_of({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}, b"12345678"),
        file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": 8}}, b"12345678"),
    ],
)
def test_damaged_headers_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    tensors, (problem,) = read_headers(tmp_path)
    assert not tensors
    assert re.search(r"cannot read weights .*model\.safetensors: .*corrupt or incomplete", problem)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model folder "):
        inspect_model(tmp_path / "nothing" / "here")
    with pytest.raises(UserError, match=r"config\.json"):
        inspect_model(tmp_path)


def test_a_hub_model_is_read_by_its_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    asked = []

    def snapshot(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, tuple(allow_patterns)))
        return str(folder)

    def metadata(_: Any, repo: str, *, revision: str | None) -> SafetensorsRepoMetadata:
        tensors = {
            key: TensorInfo(dtype="BF16", shape=list(shape), data_offsets=(0, 0))
            for key, shape in published_shapes(AdaptiveMolmoEConfig.from_pretrained(folder)).items()
        }
        file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        names = {"model.safetensors": file}
        keys = dict.fromkeys(tensors, "model.safetensors")
        return SafetensorsRepoMetadata(None, sharded=False, weight_map=keys, files_metadata=names)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", metadata)
    summary = inspect_model("some/model", revision="v1")
    assert asked == [("some/model", "v1", ("*.json",))]
    assert summary.problems == ()
    assert summary.bytes_by("dtype") == {"BF16": 2 * 2_046_336}


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_cannot_be_loaded_are_problems(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    (problem,) = inspect_model(folder).problems
    assert problem.startswith("1 of a dtype other than F64, F32, F16, BF16: lm_head.weight is ")


def test_a_key_in_two_shards_is_a_problem(folder: Path) -> None:
    AdaptiveMolmoE.from_pretrained(folder).save_pretrained(folder, max_shard_size=2**21)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    key = next(iter(load_file(first)))
    save_file(load_file(last) | {key: load_file(first)[key]}, last)
    assert inspect_model(folder).problems == (
        f"{key} is stored twice, in {first.name} and {last.name}: keep one of them",
    )


def changed_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("key", "value"), [("eos_token_id", [0, 1]), ("moe_num_experts", 10**9), ("d_model", 2**40)])
def test_configs_that_are_not_supported_are_refused_by_name(folder: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} is .*; supported: "):
        inspect_model(changed_config(folder, **{key: value}))


@pytest.mark.parametrize("sizes", [{"embedding_size": 2**24, "d_model": 2**20}, {"mlp_ratio": 2.0**23}])
def test_sizes_beyond_the_files_take_no_memory(folder: Path, sizes: dict[str, Any]) -> None:
    changed_config(folder, mlp_hidden_size=None if "mlp_ratio" in sizes else 64, **sizes)
    assert "of another shape" in inspect_model(folder).problems[0]
    with pytest.raises(UserError, match="do not fit its config"):
        AdaptiveMolmoE.from_pretrained(folder)


def test_download_sizes_are_in_decimal_units() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 2_046_336, 4 * FULL_PARAMETERS)] == [
        *("0 B", "999 B", "1.0 kB", "2.0 MB", "28.9 GB"),
    ]


def test_large_downloads_are_announced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = [SimpleNamespace(file_size=4 * FULL_PARAMETERS, will_download=True)]
    sizes.append(SimpleNamespace(file_size=10**12, will_download=False))  # in the cache already
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, dry_run=False, **__: sizes if dry_run else str(folder)
    )
    AdaptiveMolmoE.from_pretrained("some/model")
    assert "some/model: fetching 28.9 GB from the hub" in caplog.text
