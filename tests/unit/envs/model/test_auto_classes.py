"""The model, its configuration and its processor through transformers' own interfaces."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast
from transformers.modeling_utils import get_total_byte_count

from envs.embedded import folder as embedded_folder
from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE, AdaptiveMolmoEConfig
from envs.model.inspect import inspect_model
from envs.processing import AdaptiveMolmoEProcessor, MolmoEProcessor

GOLDEN = Path(__file__).parents[3] / "golden"
PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden checkpoint with the embedded tokenizer's files: complete, remote code named in its configs."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    for name in PROCESSOR_FILES:
        shutil.copy(embedded_folder() / name, tmp_path / name)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    config["auto_map"] = {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
def test_the_golden_checkpoint_loads_by_its_model_type(auto: Any, folder: Path, model: AdaptiveMolmoE) -> None:
    found = auto.from_pretrained(folder)
    assert isinstance(found, AdaptiveMolmoE)
    assert found.fingerprint == model.fingerprint
    assert AutoConfig.from_pretrained(folder) == model.config
    assert isinstance(AutoProcessor.from_pretrained(folder), AdaptiveMolmoEProcessor)


def test_the_embedded_model_answers_through_the_auto_classes() -> None:
    model = AutoModel.from_pretrained(embedded_folder(), dtype="bfloat16", device_map="cpu")
    assert model.dtype == torch.bfloat16
    model = AutoModel.from_pretrained(embedded_folder(), device_map={"": "cpu"})
    processor = AutoProcessor.from_pretrained(embedded_folder())
    inputs = processor(images=Image.new("RGB", (90, 50), "red"), text="How many digits are there?")
    wanted = AdaptiveMolmoE.from_pretrained("embedded").generate(inputs, ExecutionPlan(), max_new_tokens=4)
    assert model.generate(**inputs, max_new_tokens=4) == wanted
    assert torch.equal(model(**inputs), model(inputs, ExecutionPlan()))
    assert isinstance(processor.tokenizer, PreTrainedTokenizerFast)


def test_the_loader_can_reserve_a_gpus_memory(model: AdaptiveMolmoE) -> None:
    """What it does before it reads to a GPU, as far as it goes without one."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    gpu = torch.device("cuda:0")
    assert get_total_byte_count(model, dict.fromkeys(sizes, gpu)) == {gpu: sum(sizes.values())}


def test_defaults_are_the_published_model() -> None:
    config = AdaptiveMolmoEConfig()
    assert (config.d_model, config.expert_hidden, config.eos_token_id, config.vision.patches) == (
        2048,
        1024,
        50279,
        576,
    )
    assert (config.hidden_size, config.num_hidden_layers) == (config.d_model, config.n_layers)


def test_a_model_and_its_processor_make_the_round_trip(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.save_pretrained(again), processor.save_pretrained(again)
    published, written = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert published.keys() == written.keys()
    assert all(torch.equal(published[key], written[key]) for key in published)
    config = json.loads((again / "config.json").read_text())
    assert config["model_type"] == "molmo"
    assert config["dtype"] == "float32"
    assert "auto_map" not in config
    restored = AutoProcessor.from_pretrained(again)
    image = Image.effect_noise((90, 50), 80)
    given, wanted = restored(image, "which?"), processor(image, "which?")
    assert all(torch.equal(given[key], wanted[key]) for key in wanted)
    assert restored.max_tokens == processor.max_tokens == 4096


class Hub:
    """A stand-in for the hub: repositories are dictionaries of files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        self.repositories.setdefault(repo_id, {})
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, repo_id: str, operations: Any, **_: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                self.repositories[repo_id][operation.path_in_repo] = file.read()
        return repo_id


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    stand_in = Hub()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: stand_in)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("a card"))
    return stand_in


def test_models_and_processors_are_pushed_to_the_hub(hub: Hub, folder: Path, tmp_path: Path) -> None:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.push_to_hub("someone/model", max_shard_size="1MB")
    processor.push_to_hub("someone/model")
    files = hub.repositories["someone/model"]
    assert {*PROCESSOR_FILES, "config.json", "README.md", "model.safetensors.index.json"} <= set(files)
    assert not any(name.endswith((".bin", ".py")) for name in files)
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in files.items():
        (fetched / name).write_bytes(content)
    assert AutoModel.from_pretrained(fetched).fingerprint == model.fingerprint
    assert AutoProcessor.from_pretrained(fetched).geometry == processor.geometry


def test_packed_experts_are_read(folder: Path, model: AdaptiveMolmoE, tmp_path: Path) -> None:
    """As copies have them that were saved with the experts of a block in two tensors."""
    tensors = load_file(folder / "model.safetensors")
    for block in range(16):
        root = f"model.transformer.blocks.{block}.mlp.experts"
        parts = {
            part: torch.stack([tensors.pop(f"{root}.{expert}.{part}.weight") for expert in range(16)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{root}.gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), 1)
        tensors[f"{root}.down_proj"] = parts["down_proj"]
    save_file(tensors, folder / "model.safetensors")
    assert inspect_model(folder).problems == ()
    packed = AdaptiveMolmoE.from_pretrained(folder)
    assert packed.fingerprint == model.fingerprint
    packed.save_pretrained(tmp_path / "split")
    assert load_file(tmp_path / "split" / "model.safetensors").keys() == load_file(GOLDEN / "model.safetensors").keys()
    del tensors["model.transformer.blocks.3.mlp.experts.down_proj"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing: model\.transformer\.blocks\.3\.mlp\.experts\.down_proj"):
        AdaptiveMolmoE.from_pretrained(folder)


def test_a_loaded_model_does_not_change_with_its_file(folder: Path, model: AdaptiveMolmoE) -> None:
    loaded = AdaptiveMolmoE.from_pretrained(folder)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert loaded.fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config is not allowed"),
        ({"trust_remote_code": True}, "trust_remote_code is not allowed"),
        ({"use_safetensors": False}, "use_safetensors=False is not allowed"),
        ({"variant": "fp16"}, "variant is not allowed"),
        ({"device_map": {"vision": "cpu", "language": "cuda:0"}}, "device_map names 2 devices"),
        ({"device_map": "nowhere"}, "cannot be used"),
        ({"dtype": "int8"}, "dtype 'int8' is not allowed"),
    ],
)
def test_options_that_are_not_supported_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdaptiveMolmoE.from_pretrained(GOLDEN, **options)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"it has pytorch_model\.bin.*save it again as safetensors"):
        AdaptiveMolmoE.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_type": "sequential"}, "block_type is 'sequential'.*not Molmo-7B-D"),
        ({"model_type": "molmo2"}, "model_type is 'molmo2'.*not Molmo-7B-D, Molmo-7B-O or Molmo2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*not quantized"),
    ],
)
def test_other_models_are_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        AdaptiveMolmoE.from_pretrained(folder)


def test_processors_take_transformers_keywords(folder: Path) -> None:
    processor = MolmoEProcessor.from_pretrained(folder)
    image = Image.effect_noise((90, 50), 80)
    named, plain = processor(images=image, text="which?", tier="low"), processor(image, "which?", "low")
    assert named.keys() == plain.keys()
    assert all(torch.equal(named[key], plain[key]) for key in plain)
    alone = processor.image_processor(image.convert("RGB"))
    assert torch.equal(alone["images"], processor(image, "which?", "high")["images"])


def test_the_hubs_options_are_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    AdaptiveMolmoE.from_pretrained("someone/model", token="secret", trust_remote_code=False)
    MolmoEProcessor.from_pretrained("someone/model", revision="v1", local_files_only=True)
    model, processor = (options for options in asked if "dry_run" not in options)
    assert (model["token"], model["revision"]) == ("secret", None)
    assert (processor["local_files_only"], processor["revision"]) == (True, "v1")
    assert not any(pattern.endswith((".bin", ".py")) for options in asked for pattern in options["allow_patterns"])
