"""Between the published checkpoint and the parameters in memory, as conversions of transformers' own loader.

The published layout names every expert and every projection; in memory experts are stacked and projections fused, and
the rows of query and key are reordered so that rotary pairs are adjacent (attention only sees their products, so
nothing else changes). transformers applies the list when it loads and, reversed, when it saves.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, Transpose
from transformers.core_model_loading import WeightConverter as Convert
from transformers.core_model_loading import WeightRenaming as Rename


class RotaryPairs(ConversionOps):
    """Rows of query and key from half-split to pairwise rotary order: (x_0..x_d/2-1, y_0..) to (x_0, y_0, x_1, ...).

    Of `parts` 3, the stacked projection (3 D, D), whose value rows stay, or 2, the norms (D,) as one (2, D).
    """

    def __init__(self, parts: int, inverse: bool = False) -> None:
        self.parts, self.inverse = parts, inverse

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        config = kwargs["config"]
        half = config.head_dim // 2
        pairs = (half, 2) if self.inverse else (2, half)
        rows = torch.cat([_first(input_dict[source]) for source in source_patterns])
        rows = rows.reshape(self.parts, config.n_heads, *pairs, -1)
        shape = (-1, config.d_model, rows.shape[-1])
        turned = rows[:2].transpose(2, 3).reshape(shape)
        if self.parts == 3:
            return {target_patterns[0]: torch.cat((turned, rows[2:].reshape(shape))).flatten(0, 1)}
        norms = turned.squeeze(-1)
        return dict(zip(target_patterns, norms, strict=True)) if self.inverse else {target_patterns[0]: norms}

    @property
    def reverse_op(self) -> "RotaryPairs":
        return RotaryPairs(self.parts, not self.inverse)


class JoinWords(ConversionOps):
    """Published words and added ones as one embedding; without added ones the second key does not exist."""

    def __init__(self, inverse: bool = False) -> None:
        self.inverse = inverse

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        if not self.inverse:
            parts = [_first(input_dict[source]) for source in source_patterns if source in input_dict]
            return {target_patterns[0]: torch.cat(parts)}
        words = _first(input_dict[source_patterns[0]])
        parts = words.split([kwargs["config"].embedding_size, len(words) - kwargs["config"].embedding_size])
        return {target: part for target, part in zip(target_patterns, parts, strict=True) if len(part)}

    @property
    def reverse_op(self) -> "JoinWords":
        return JoinWords(not self.inverse)


def _first(tensors: Tensor | list[Tensor]) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def is_packed(keys: Iterable[str]) -> bool:
    """Whether a checkpoint has the experts of a block in two tensors."""
    return any(key.endswith(".experts.gate_up_proj") for key in keys)


def conversions(packed: bool = False) -> list[Rename | Convert]:
    """Published names to those in memory; `packed` for copies with the experts of a block in two tensors.

    Renamings apply in turn, then one converter; on saving, one converter and the renamings from last to first.
    """
    renamings = (
        (r"^model\.transformer\.", "language."),
        (r"^lm_head\.weight", "language.lm_head"),
        (r"ln_f\.weight", "ln_f"),
        (r"\.attn\.attn_norm\.weight", ".attn_norm"),
        (r"\.attn\.attn_out\.weight", ".attn_out"),
        (r"\.mlp\.ff_norm\.weight", ".ff_norm"),
        (r"\.mlp\.gate\.weight", ".router"),
        (r"^model\.vision_backbone\.", "vision."),
        (r"image_pooling_2d\.wq", "pooling.query"),
        (r"image_pooling_2d\.wo", "pooling.out"),
        (r"image_projector\.w2", "projector_out"),
        (r"image_vit\.", "encoder."),
        (r"encoder\.transformer\.resblocks", "encoder.blocks"),
        (r"attention\.wo", "attention_out"),
        (r"feed_forward\.w1", "mlp_in"),
        (r"feed_forward\.w2", "mlp_out"),
    )
    if packed:
        gate_up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
        experts = [Rename(gate_up, "gate_up"), Convert(down, "down", [Transpose(1, 2)])]
    else:
        gate, up, down = (f"mlp.experts.*.{part}_proj.weight" for part in ("gate", "up", "down"))
        experts = [
            Convert([gate, up], "gate_up", [MergeModulelist(0), Concatenate(1)]),
            Convert(down, "down", [MergeModulelist(0), Transpose(1, 2)]),
        ]
    return [
        *(Rename(source, target) for source, target in renamings),
        Convert(["wte.embedding", "wte.new_embedding"], "wte", [JoinWords()]),
        Convert(["attn.q_norm.weight", "attn.k_norm.weight"], "qk_norm", [RotaryPairs(2)]),
        Convert("attn.att_proj.weight", "qkv", [RotaryPairs(3)]),
        *experts,
        Convert(["image_pooling_2d.wk", "image_pooling_2d.wv"], "pooling.key_value", [Concatenate(0)]),
        Convert(["image_projector.w1", "image_projector.w3"], "projector_in", [Concatenate(0)]),
        Convert(["attention.wq", "attention.wk", "attention.wv"], "attention_in", [Concatenate(0)]),
    ]


CONVERTED = tuple(entry.target_patterns[0] for entry in conversions() if isinstance(entry, Convert))
"""Parts of the names in memory of parameters that are more than a renamed tensor."""
