"""Reading and writing the published layout."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE, AdaptiveMolmoEConfig
from recipes.embedded_model.fresh_weights import initialise

GOLDEN = Path(__file__).parents[3] / "golden"


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    return tmp_path


def test_round_trip_is_bit_equal(model, tmp_path):
    published = load_file(GOLDEN / "model.safetensors")
    exported = model.published_state_dict()
    assert set(exported) == set(published)
    assert all(torch.equal(exported[key], tensor) for key, tensor in published.items())
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in published.items())
    again = AdaptiveMolmoE.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint


def test_shards_are_bounded_and_read_back(model, tmp_path):
    bound = 2**20
    model.save_pretrained(tmp_path, max_shard_size=bound)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 4
    assert all(sum(t.numel() * 4 for t in load_file(shard).values()) <= bound for shard in shards)
    assert AdaptiveMolmoE.from_pretrained(tmp_path).fingerprint == model.fingerprint


def test_what_was_written_before_is_not_read_again(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=2**20)
    other = initialise(model.config, seed=5)
    other.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert AdaptiveMolmoE.from_pretrained(tmp_path).fingerprint == other.fingerprint
    model.save_pretrained(tmp_path, max_shard_size=2**21)
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    assert AdaptiveMolmoE.from_pretrained(tmp_path).fingerprint == model.fingerprint


def test_bfloat16_makes_the_round_trip_bit_for_bit(folder, tmp_path):
    half = AdaptiveMolmoE.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "a", max_shard_size=2**20)
    again = AdaptiveMolmoE.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    again.save_pretrained(tmp_path / "b", max_shard_size=2**20)
    shards = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert shards == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in shards:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_dtypes(folder, model, inputs):
    half = AdaptiveMolmoE.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    logits = half(inputs, ExecutionPlan())
    assert logits.dtype == torch.bfloat16
    full = model(inputs, ExecutionPlan())
    agreement = torch.nn.functional.cosine_similarity(logits[:, :35].float(), full[:, :35], dim=-1)
    assert agreement.mean() > 0.97
    assert half.fingerprint != model.fingerprint
    assert len(half.generate(inputs, ExecutionPlan(), max_new_tokens=3, stop_at_eos=False)) == 2


def test_pixels_near_the_padding_mark_survive_bfloat16(folder):
    half = AdaptiveMolmoE.from_pretrained(folder, dtype=torch.bfloat16)
    crop = torch.full((1, 36, 588), -1.001)
    assert half.vision.vit_features(crop).abs().max() > 0


def test_stored_as_float16_is_cast(model, tmp_path):
    copy.deepcopy(model).half().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    assert AdaptiveMolmoE.from_pretrained(tmp_path).dtype == torch.float32


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_keys_are_named(folder):
    def change(tensors):
        del tensors["model.transformer.ln_f.weight"]
        tensors["extra.weight"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(5, 64)

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        AdaptiveMolmoE.from_pretrained(folder)
    for part in ("ln_f.weight", "extra.weight", "lm_head.weight is (5, 64) instead of (512, 64)"):
        assert part in caught.value.message


@pytest.mark.parametrize("size", [0, 4, 5000, 8_000_000])
def test_truncated_weights(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="corrupt or incomplete"):
        AdaptiveMolmoE.from_pretrained(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        AdaptiveMolmoE.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "gone.safetensors", 3])
def test_index_stays_in_its_folder(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match="names"):
        AdaptiveMolmoE.from_pretrained(folder)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/nowhere/at/all"])
def test_no_folder(name):
    with pytest.raises(UserError, match="no model folder"):
        AdaptiveMolmoE.from_pretrained(name)


def test_hub_failures_are_one_line(monkeypatch):
    def refuse(name, **settings):
        assert settings["revision"] == "abc"
        assert not any(pattern.endswith(".py") for pattern in settings["allow_patterns"])
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"someone/model at revision abc from the hub \(no route to host\)"):
        AdaptiveMolmoE.from_pretrained("someone/model", revision="abc")


def test_only_a_hub_id_has_revisions(folder):
    for name in (folder, "embedded"):
        with pytest.raises(UserError, match="only a hub id has revisions"):
            AdaptiveMolmoE.from_pretrained(name, revision="v1")


def test_bad_device(folder):
    with pytest.raises(UserError, match="cannot be used") as caught:
        AdaptiveMolmoE.from_pretrained(folder, device="quantum")
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message


def published(**changes):
    return {**json.loads((GOLDEN / "config.json").read_text()), **changes}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layers", 12),
        ("moe_top_k", 4),
        ("moe_num_experts", 6),
        ("n_heads", 7),
        ("d_model", "wide"),
        ("weight_tying", True),
        ("vit_layers", [-12]),
        ("image_pooling_2d", "mean"),
        ("overlap_margins", 4),
        ("n_kv_heads", 2),
        ("rope_theta", 0),
        ("vision_backbone", None),
    ],
)
def test_unsupported_config_is_named(key, value):
    with pytest.raises(UserError, match=key):
        AdaptiveMolmoEConfig.from_dict(published(**{key: value}))


def test_missing_config_key_is_named():
    config = published()
    del config["rope_theta"]
    with pytest.raises(UserError, match="rope_theta is missing"):
        AdaptiveMolmoEConfig.from_dict(config)


def test_config_round_trip(model):
    assert AdaptiveMolmoEConfig.from_dict(model.config.to_published()) == model.config
    assert model.config.eos_token_id == 499


def test_fingerprint_follows_weights(folder):
    one = AdaptiveMolmoE.from_pretrained(folder)
    before = one.fingerprint
    assert before == AdaptiveMolmoE.from_pretrained(folder).fingerprint
    with torch.no_grad():
        one.language.ln_f[3] += 1
    assert one.fingerprint != before


@pytest.mark.parametrize(("layers", "depth"), [([-1], 3), ([-1, -2], 3), ([0, 1], 3)])
def test_other_shapes(layers, depth, inputs):
    """Few experts more, another width, a shallow image encoder, no added vocabulary."""
    config = published(vit_layers=layers, d_model=32, n_heads=2, moe_num_experts=12, mlp_hidden_size=48, vocab_size=300)
    config.update(embedding_size=320, additional_vocab_size=0)
    config["vision_backbone"] = {**config["vision_backbone"], "image_num_layers": depth}
    model = initialise(AdaptiveMolmoEConfig.from_dict(config))
    batch = {**inputs, "input_ids": inputs["input_ids"].clamp(max=319)}
    assert model(batch, ExecutionPlan()).shape == (2, 48, 320)
    assert "model.transformer.wte.new_embedding" not in model.published_state_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("model_type", "molmo2"),
        ("eos_token_id", [0, 1]),
        ("eos_token_id", "0"),
        ("pad_token_id", -1),
    ],
)
def test_configs_that_are_not_read_are_refused_by_name(folder, key, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{key} is .*supported:"):
        AdaptiveMolmoE.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_quantized_tensors_are_refused(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 of a dtype other than F64, F32, F16, BF16: lm_head\.weight is"):
        AdaptiveMolmoE.from_pretrained(folder)


def test_a_key_in_two_shards_is_refused(model, folder):
    model.save_pretrained(folder, max_shard_size=2**21)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    key = next(iter(load_file(first)))
    save_file(load_file(last) | {key: load_file(first)[key] + 1}, last)
    with pytest.raises(UserError, match=f"{key} is stored twice, in {first.name} and {last.name}"):
        AdaptiveMolmoE.from_pretrained(folder)
