"""The fields of the published `config.json` that decide what is computed, checked and named when wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.knobs import MODEL_BLOCKS, TOP_KS

# Keys with a single supported value: another value would need code that does not exist here.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "activation_type": ("swiglu",),
    "alibi": (False,),
    "attention_layer_norm": (True,),
    "attn_logit_softcapping": (None,),
    "block_type": ("moe",),
    "clip_qkv": (None,),
    "final_logit_softcapping": (None,),
    "image_padding_embed": ("pad_and_partial_pad",),
    "image_pooling_2d": ("attention-meanq",),
    "image_projector": ("mlp",),
    "include_bias": (False,),
    "layer_norm_type": ("rms",),
    "model_type": ("molmo",),
    "moe_interleave": (False,),
    "moe_shared_expert": (False,),
    "multi_query_attention": (None, False),
    "norm_after": (False,),
    "normalize_input_embeds": (False,),
    "qkv_bias": (False,),
    "rope": (True,),
    "scale_logits": (False,),
    "use_cls_feature": (False,),
    "weight_tying": (False,),
}
_FIXED_VISION: Mapping[str, tuple[Any, ...]] = {
    "image_mlp_activations": ("quick_gelu",),
    "image_model_type": ("openai",),
}

BLANK_CROPS = ("published", "trainer")
_MAX_SIZE = 2**24
_MAX_REPEATS = 4096  # layers and experts, which have tensors of their own


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder: a CLIP-like ViT over square crops, and 2-D attention pooling after it."""

    crop_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    feature_layers: tuple[int, ...]
    pooling: tuple[int, int]

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches in a crop."""
        return self.grid**2

    @property
    def pixels(self) -> int:
        """Numbers in one flattened patch."""
        return 3 * self.patch_size**2

    @property
    def feature_dim(self) -> int:
        """Width of the concatenated layer features."""
        return self.width * len(self.feature_layers)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens that a crop leaves after pooling."""
        rows, columns = self.pooling
        return -(-self.grid // rows), -(-self.grid // columns)

    @property
    def tokens(self) -> int:
        """Image tokens in a crop."""
        return self.token_grid[0] * self.token_grid[1]

    @property
    def depth(self) -> int:
        """Layers that must run for the deepest feature layer; later ones are loaded but never computed."""
        return 1 + max(layer % self.layers for layer in self.feature_layers)


@dataclass(frozen=True)
class MolmoEConfig:
    """Shape of a MolmoE. Field names are ours, values those of the published `config.json`.

    `blank_crops` names the crops that give no image features: "published" those with a single exact -1.0 in them, as in
    the released code, "trainer" those of nothing but -1.0 (padding), as in the code that trained the weights.
    """

    d_model: int
    n_heads: int
    n_layers: int
    n_experts: int
    expert_hidden: int
    vocab_size: int
    embedding_size: int
    additional_vocab_size: int
    norm_eps: float
    rope_theta: float
    max_sequence_length: int
    eos_token_id: int
    pad_token_id: int
    projector_hidden: int
    max_crops: int
    overlap_margins: tuple[int, int]
    vision: VisionConfig
    blank_crops: str = BLANK_CROPS[0]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MolmoEConfig":
        """Read `config.json` in `folder`.

        Raises:
            UserError: the file is missing or broken, a key is missing, or a value is not supported.
        """
        path = Path(folder) / "config.json"
        try:
            published = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"no config.json in {folder}: give a folder in the published MolmoE layout") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        return cls.from_published(published, source=str(path))

    @classmethod
    def from_published(cls, published: Mapping[str, Any], source: str = "config") -> "MolmoEConfig":
        """Build from the published keys; `source` names them in errors.

        Raises:
            UserError: a key is missing or has an unsupported value.
        """
        if not isinstance(published, Mapping):
            raise UserError(f"{source} is a {type(published).__name__}, not an object: give a published config.json")
        read = _Reader(published, source)
        read.check({**_FIXED, "quantization_config": (None,)})
        d_model, n_heads = read.count("d_model"), read.count("n_heads")
        if published.get("n_kv_heads") not in (None, n_heads):
            raise read.error("n_kv_heads", f"null or {n_heads} (= n_heads)")
        vocab_size = read.count("vocab_size")
        hidden = read.optional_count("mlp_hidden_size")
        mlp = int(read.number("mlp_ratio") * d_model) if hidden is None else hidden
        config = cls(
            d_model=d_model,
            n_heads=n_heads,
            n_layers=read.count("n_layers"),
            n_experts=read.count("moe_num_experts", _MAX_REPEATS),
            expert_hidden=mlp // 2,
            vocab_size=vocab_size,
            embedding_size=read.optional_count("embedding_size") or vocab_size,
            additional_vocab_size=read.optional_count("additional_vocab_size") or 0,
            norm_eps=read.number("layer_norm_eps"),
            rope_theta=read.number("rope_theta"),
            max_sequence_length=read.count("max_sequence_length"),
            # The published tokenizer's end-of-text is the last id before the added ones.
            eos_token_id=read.optional_id("eos_token_id", vocab_size - 1),
            pad_token_id=read.optional_id("pad_token_id", 1),
            projector_hidden=mlp // 2,
            max_crops=read.count("max_crops"),
            overlap_margins=read.pair("overlap_margins"),
            vision=_vision(read),
        ).with_blank_crops(published.get("blank_crops", BLANK_CROPS[0]))
        if config.n_layers != MODEL_BLOCKS:
            raise read.error("n_layers", f"{MODEL_BLOCKS}, because execution plans name {MODEL_BLOCKS} blocks")
        if read.count("moe_top_k") != max(TOP_KS):
            raise read.error("moe_top_k", f"{max(TOP_KS)}, the published number of experts per token")
        if config.n_experts < max(TOP_KS):
            raise read.error("moe_num_experts", f"at least {max(TOP_KS)}")
        if d_model % n_heads or config.head_dim % 2:
            raise read.error("n_heads", f"a divisor of d_model ({d_model}) that leaves an even head width")
        return config

    def with_blank_crops(self, rule: str) -> "MolmoEConfig":
        """The same shape under another rule for blank crops.

        Raises:
            UserError: a rule that does not exist.
        """
        if rule not in BLANK_CROPS:
            raise UserError(f"blank_crops is {rule!r}: choose one of {', '.join(BLANK_CROPS)}")
        return replace(self, blank_crops=rule)

    def to_published(self) -> dict[str, Any]:
        """The same shape under the published keys, ready for `config.json`."""
        vision = self.vision
        backbone = {
            **{key: values[0] for key, values in _FIXED_VISION.items()},
            "image_default_input_size": [vision.crop_size, vision.crop_size],
            "image_emb_dim": vision.width,
            "image_head_dim": vision.head_dim,
            "image_mlp_dim": vision.mlp_dim,
            "image_norm_eps": vision.norm_eps,
            "image_num_heads": vision.heads,
            "image_num_key_value_heads": vision.heads,
            "image_num_layers": vision.layers,
            "image_num_pos": vision.patches + 1,
            "image_patch_size": vision.patch_size,
            "image_pos_patch_size": vision.patch_size,
        }
        # Only where it differs, so that the fingerprint of the published rule stays what it was.
        rule = {} if self.blank_crops == BLANK_CROPS[0] else {"blank_crops": self.blank_crops}
        return {
            **{key: values[0] for key, values in _FIXED.items()},
            **rule,
            "architectures": ["OLMoForCausalLM"],
            "additional_vocab_size": self.additional_vocab_size,
            "crop_mode": "overlap-and-resize-c2",
            "d_model": self.d_model,
            "embedding_size": self.embedding_size,
            "eos_token_id": self.eos_token_id,
            "image_pooling_h": vision.pooling[0],
            "image_pooling_w": vision.pooling[1],
            "layer_norm_eps": self.norm_eps,
            "max_crops": self.max_crops,
            "max_sequence_length": self.max_sequence_length,
            "mlp_hidden_size": 2 * self.expert_hidden,
            "moe_num_experts": self.n_experts,
            "moe_top_k": max(TOP_KS),
            "n_heads": self.n_heads,
            "n_kv_heads": None,
            "n_layers": self.n_layers,
            "overlap_margins": list(self.overlap_margins),
            "pad_token_id": self.pad_token_id,
            "rope_theta": self.rope_theta,
            "vision_backbone": backbone,
            "vit_layers": list(vision.feature_layers),
            "vocab_size": self.vocab_size,
        }


def _vision(outer: "_Reader") -> VisionConfig:
    backbone = outer.value("vision_backbone")
    if not isinstance(backbone, Mapping):
        raise outer.error("vision_backbone", "an object; a model without a vision backbone is not supported")
    read = _Reader(backbone, f"{outer.source} (vision_backbone)")
    read.check(_FIXED_VISION)
    crop, patch = read.pair("image_default_input_size"), read.count("image_patch_size")
    if crop[0] != crop[1] or crop[0] % patch or not crop[0]:
        raise read.error("image_default_input_size", f"a square with sides a multiple of image_patch_size ({patch})")
    layers = outer.value("vit_layers")
    depth = read.count("image_num_layers", _MAX_REPEATS)
    if not isinstance(layers, list) or not layers or any(not -depth <= int(layer) < depth for layer in layers):
        raise outer.error("vit_layers", f"indices into the {depth} layers of the image encoder")
    vision = VisionConfig(
        crop_size=crop[0],
        patch_size=patch,
        width=read.count("image_emb_dim"),
        layers=depth,
        heads=read.count("image_num_heads"),
        head_dim=read.count("image_head_dim"),
        mlp_dim=read.count("image_mlp_dim"),
        norm_eps=read.number("image_norm_eps"),
        feature_layers=tuple(int(layer) for layer in layers),
        pooling=(outer.count("image_pooling_h"), outer.count("image_pooling_w")),
    )
    if backbone.get("image_num_key_value_heads", vision.heads) != vision.heads:
        raise read.error("image_num_key_value_heads", f"{vision.heads} (= image_num_heads)")
    if backbone.get("image_num_pos", vision.patches + 1) != vision.patches + 1:
        raise read.error("image_num_pos", f"{vision.patches + 1}: one per patch of a crop, and one for the class token")
    return vision


@dataclass(frozen=True)
class _Reader:
    """Typed reading of one JSON object, with errors that name key and value."""

    values: Mapping[str, Any]
    source: str

    def error(self, key: str, allowed: str) -> UserError:
        return UserError(f"{self.source}: {key} is {self.values.get(key)!r}; supported: {allowed}")

    def value(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(f"{self.source}: {key} is missing")
        return self.values[key]

    def count(self, key: str, most: int = _MAX_SIZE) -> int:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.error(key, f"an integer from 1 to {most:,}")
        return value

    def optional_count(self, key: str) -> int | None:
        return self.count(key) if self.values.get(key) else None

    def optional_id(self, key: str, default: int) -> int:
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, "null or one token id of at least 0")
        return value

    def number(self, key: str) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_SIZE:
            raise self.error(key, f"a number above 0 and at most {_MAX_SIZE:,}")
        return float(value)

    def pair(self, key: str) -> tuple[int, int]:
        value = self.value(key)
        if not isinstance(value, list) or len(value) != 2 or any(item not in range(_MAX_SIZE) for item in value):
            raise self.error(key, f"two integers from 0 to {_MAX_SIZE:,}")
        return value[0], value[1]

    def check(self, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        for key, allowed in fixed.items():
            if key in self.values and self.values[key] not in allowed:
                raise self.error(key, " or ".join(repr(value) for value in allowed))
