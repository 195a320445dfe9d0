"""The published `config.json` as a transformers configuration: checked, and named when wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedConfig

from envs.errors import UserError, first_line
from envs.knobs import MODEL_BLOCKS, TOP_KS

_OTHER_MODELS = "this package reads MolmoE-1B alone, not Molmo-7B-D, Molmo-7B-O or Molmo2"
_HINTS = {
    "model_type": _OTHER_MODELS,
    "block_type": _OTHER_MODELS,
    "quantization_config": "give the checkpoint that was not quantized, with `dtype` to save memory",
}
# Keys with a single supported value: another value would need code that does not exist here.
_FIXED: Final[Mapping[str, Any]] = {
    "model_type": "molmo", "block_type": "moe", "activation_type": "swiglu", "alibi": False,
    "attention_layer_norm": True, "attn_logit_softcapping": None, "clip_qkv": None, "final_logit_softcapping": None,
    "image_padding_embed": "pad_and_partial_pad", "image_pooling_2d": "attention-meanq", "image_projector": "mlp",
    "include_bias": False, "layer_norm_type": "rms", "moe_interleave": False, "moe_shared_expert": False,
    "multi_query_attention": None, "norm_after": False, "normalize_input_embeds": False, "qkv_bias": False,
    "rope": True, "scale_logits": False, "use_cls_feature": False, "weight_tying": False,
}  # fmt: skip
_VISION_COUNTS = {
    "image_emb_dim": "width",
    "image_head_dim": "head_dim",
    "image_mlp_dim": "mlp_dim",
    "image_num_heads": "heads",
    "image_patch_size": "patch_size",
}
_FIXED_VISION = {"image_mlp_activations": "quick_gelu", "image_model_type": "openai"}
# Keys that a file may leave out or have as null.
_OPTIONAL = ("mlp_hidden_size", "mlp_ratio", "embedding_size", "additional_vocab_size", "eos_token_id", "pad_token_id")
# What transformers itself passes on; every other unknown key of a published file is about training.
_TRANSFORMERS_KEYS = {"name_or_path", "dtype", "torch_dtype", "attn_implementation", "experts_implementation"}

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

    def to_published(self) -> dict[str, Any]:
        """The published `vision_backbone`."""
        return _FIXED_VISION | {
            **{key: getattr(self, name) for key, name in _VISION_COUNTS.items()},
            "image_default_input_size": [self.crop_size, self.crop_size],
            "image_norm_eps": self.norm_eps,
            "image_num_key_value_heads": self.heads,
            "image_num_layers": self.layers,
            "image_num_pos": self.patches + 1,
            "image_pos_patch_size": self.patch_size,
        }


MOLMOE_1B_VISION: Final = VisionConfig(336, 14, 1024, 23, 16, 64, 4096, 1e-5, (-2, -9), (2, 2))


class AdaptiveMolmoEConfig(PreTrainedConfig):
    """Shape of a MolmoE under the names of the published `config.json`; the defaults are MolmoE-1B's.

    `vision` is `vision_backbone` with `vit_layers` and the pooling, `VisionConfig`. `blank_crops` names the crops that
    give no image features: "published" those with a single exact -1.0 in them, as in the released code, "trainer" those
    of nothing but -1.0 (padding), as in the code that trained the weights.

    Raises:
        UserError: a value that is not supported; names key and value.
    """

    model_type = "molmo"
    attribute_map = {  # noqa: RUF012 - as in transformers
        "hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
        "n_experts": "moe_num_experts", "norm_eps": "layer_norm_eps",
    }  # fmt: skip

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = MODEL_BLOCKS
    moe_num_experts: int = 64
    moe_top_k: int = max(TOP_KS)
    mlp_hidden_size: int = 0  # or null: mlp_ratio x d_model
    mlp_ratio: float = 1
    vocab_size: int = 50280
    embedding_size: int = 50304
    additional_vocab_size: int = 128
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_sequence_length: int = 4096
    eos_token_id: Any = None
    pad_token_id: int = 1
    max_crops: int = 12
    overlap_margins: Any = (4, 4)
    image_pooling_h: int = 2
    image_pooling_w: int = 2
    vit_layers: Any = MOLMOE_1B_VISION.feature_layers
    vision_backbone: Any = None
    blank_crops: str = BLANK_CROPS[0]

    def __post_init__(self, **kwargs: Any) -> None:
        values: dict[str, Any] = self.__dict__
        _check_fixed(kwargs, {**_FIXED, "quantization_config": None})
        if kwargs.get("n_kv_heads") not in (None, self.n_heads):
            raise _error(kwargs, "n_kv_heads", f"null or {self.n_heads} (= n_heads)")
        for key in ("d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length", "max_crops"):
            _count(values, key)
        _count(values, "moe_num_experts", _MAX_REPEATS)
        self.layer_norm_eps, self.rope_theta = (_number(values, key) for key in ("layer_norm_eps", "rope_theta"))
        wide = self.mlp_hidden_size or int(_number(values, "mlp_ratio") * self.d_model)
        self.mlp_hidden_size = _count({"mlp_hidden_size": wide}, "mlp_hidden_size", _MAX_SIZE**2) // 2 * 2
        self.embedding_size = _count(values, "embedding_size") if self.embedding_size else self.vocab_size
        self.additional_vocab_size = _count(values, "additional_vocab_size") if self.additional_vocab_size else 0
        # The published tokenizer's end-of-text is the last id before the added ones.
        for key, default in (("eos_token_id", self.vocab_size - 1), ("pad_token_id", 1)):
            values[key] = default if values[key] is None else values[key]
            _checked(values, key, lambda token: isinstance(token, int) and token >= 0, "null or one token id")
        self.overlap_margins = list(_pair(values, "overlap_margins"))
        self.vision = _vision(values)
        self.vit_layers, self.vision_backbone = list(self.vision.feature_layers), self.vision.to_published()
        self._check_model()
        super().__post_init__(**{key: value for key, value in kwargs.items() if key in _TRANSFORMERS_KEYS})

    def _check_model(self) -> None:
        most, even = max(TOP_KS), self.d_model % self.n_heads == 0 == self.head_dim % 2
        for key, fits, allowed in (
            ("n_layers", self.n_layers == MODEL_BLOCKS, f"{MODEL_BLOCKS}, because plans name {MODEL_BLOCKS} blocks"),
            ("moe_top_k", self.moe_top_k == most, f"{most}, the published number of experts per token"),
            ("moe_num_experts", self.moe_num_experts >= most, f"at least {most}"),
            ("n_heads", even, f"a divisor of d_model ({self.d_model}) that leaves an even head width"),
            ("blank_crops", self.blank_crops in BLANK_CROPS, ", ".join(BLANK_CROPS)),
        ):
            if not fits:
                raise _error(vars(self), key, allowed)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def expert_hidden(self) -> int:
        """Hidden width of one expert, and of the image projector."""
        return self.mlp_hidden_size // 2

    def image_tokens(self, tiling: tuple[int, int] | None) -> int:
        """Prompt positions of an image at a tiling: per view a start mark, an end mark and a mark after each row.

        The crops' overlap margins are cut before pooling, except at the rim of the image.
        """
        if tiling is None:
            return 0
        rim = sum(self.overlap_margins)
        sides = zip(tiling, self.vision.pooling, strict=True)
        high, wide = (-(-(crops * (self.vision.grid - rim) + rim) // pool) for crops, pool in sides)
        rows, columns = self.vision.token_grid
        return rows * (columns + 1) + 2 + high * (wide + 1) + 2

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Any:
        """As in transformers, `config.json` in `folder`.

        Raises:
            UserError: the file is missing or broken, a key is missing, or a value is not supported.
        """
        try:
            return super().from_pretrained(folder, **kwargs)
        except UserError as error:
            raise UserError(f"config.json in {folder}: {error.message}") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = first_line(error)
            raise UserError(
                f"cannot read config.json in {folder} ({reason}): give the published MolmoE layout"
            ) from None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a file must name every key that has no neutral value.

        Raises:
            UserError: a key is missing or has an unsupported value.
        """
        _check_fixed(config_dict, {key: _FIXED[key] for key in ("model_type", "block_type")})
        if not isinstance(config_dict.get("vision_backbone", {}), Mapping):
            raise _error(config_dict, "vision_backbone", "an object; a model without one is not supported")
        missing = [
            key for key in cls.__annotations__ if key not in config_dict and key not in (*_OPTIONAL, "blank_crops")
        ]
        if missing:
            raise UserError(f"{missing[0]} is missing: give a published config.json")
        return super().from_dict({**dict.fromkeys(_OPTIONAL), **config_dict}, **kwargs)

    def to_published(self) -> dict[str, Any]:
        """What decides the model's numbers, under the published keys."""
        # The rule only where it differs, so that the fingerprint of the published one stays what it was.
        rule = {} if self.blank_crops == BLANK_CROPS[0] else {"blank_crops": self.blank_crops}
        shape = {key: vars(self)[key] for key in type(self).__annotations__ if key not in ("mlp_ratio", "blank_crops")}
        names = {"architectures": ["OLMoForCausalLM"], "crop_mode": "overlap-and-resize-c2", "n_kv_heads": None}
        return {**_FIXED, **rule, **names, **shape}

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        content = self.to_published() | ({} if self.dtype is None else {"dtype": self.dtype})
        self.dict_dtype_to_str(content)
        return content

    to_diff_dict = to_dict

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdaptiveMolmoEConfig) and self.to_published() == other.to_published()


def _vision(values: Mapping[str, Any]) -> VisionConfig:
    backbone = values["vision_backbone"]
    backbone = MOLMOE_1B_VISION.to_published() if backbone is None else backbone
    _check_fixed(backbone, _FIXED_VISION)
    crop, patch = _pair(backbone, "image_default_input_size"), _count(backbone, "image_patch_size")
    if crop[0] != crop[1] or crop[0] % patch or not crop[0]:
        raise _error(backbone, "image_default_input_size", f"a square, sides a multiple of image_patch_size ({patch})")
    layers, depth = values["vit_layers"], _count(backbone, "image_num_layers", _MAX_REPEATS)
    if not isinstance(layers, list | tuple) or not layers or any(not -depth <= int(layer) < depth for layer in layers):
        raise _error(values, "vit_layers", f"indices into the {depth} layers of the image encoder")
    vision = VisionConfig(
        crop_size=crop[0],
        layers=depth,
        **{name: _count(backbone, key) for key, name in _VISION_COUNTS.items()},
        norm_eps=_number(backbone, "image_norm_eps"),
        feature_layers=tuple(int(layer) for layer in layers),
        pooling=(_count(values, "image_pooling_h"), _count(values, "image_pooling_w")),
    )
    if backbone.get("image_num_key_value_heads", vision.heads) != vision.heads:
        raise _error(backbone, "image_num_key_value_heads", f"{vision.heads} (= image_num_heads)")
    if backbone.get("image_num_pos", vision.patches + 1) != vision.patches + 1:
        raise _error(backbone, "image_num_pos", f"{vision.patches + 1}: one per patch, one for the class token")
    return vision


def _error(values: Mapping[str, Any], key: str, allowed: str) -> UserError:
    hint = f" ({_HINTS[key]})" if key in _HINTS else ""
    return UserError(f"{key} is {values.get(key)!r}; supported: {allowed}{hint}")


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, only in fixed.items():
        if key in values and (values[key] or None) != (only or None):  # null and false say the same
            raise _error(values, key, repr(only))


def _checked(values: Mapping[str, Any], key: str, fits: Callable[[Any], bool], allowed: str) -> Any:
    value = values.get(key)
    if isinstance(value, bool) or not fits(value):
        raise _error(values, key, allowed)
    return value


def _count(values: Mapping[str, Any], key: str, most: int = _MAX_SIZE) -> int:
    allowed = f"an integer from 1 to {most:,}"
    return int(_checked(values, key, lambda value: isinstance(value, int) and 1 <= value <= most, allowed))


def _number(values: Mapping[str, Any], key: str) -> float:
    allowed = f"a number above 0 and at most {_MAX_SIZE:,}"
    return float(_checked(values, key, lambda n: isinstance(n, int | float) and 0 < n <= _MAX_SIZE, allowed))


def _pair(values: Mapping[str, Any], key: str) -> tuple[int, int]:
    def fits(pair: Any) -> bool:
        return isinstance(pair, list | tuple) and len(pair) == 2 and all(item in range(_MAX_SIZE) for item in pair)

    first, second = _checked(values, key, fits, f"two integers from 0 to {_MAX_SIZE:,}")
    return first, second
