"""Between the published checkpoint and the parameters in memory.

The published layout names every expert and every projection; in memory experts are stacked and projections fused, and
the rows of query and key are reordered so that rotary pairs are adjacent (attention only sees their products, so
nothing else changes). Each published key maps to a `Slot`, a view of one parameter; loading copies into slots, one
tensor at a time, and exporting copies out of them, bit for bit.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from envs.errors import UserError, first_line
from envs.files import size_text
from envs.model.config import MolmoEConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LOADABLE_DTYPES = ("F64", "F32", "F16", "BF16")
"""Number formats of weights; quantized ones mean nothing without their scales."""
_LARGE_DOWNLOAD = 10**8
_SHARDS = "model-?????-of-?????.safetensors"
# What is fetched for a hub id: weights and the JSON and text files next to them, never code.
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_log = logging.getLogger(__name__)


class TensorHeader(NamedTuple):
    """A stored tensor as its file's header describes it; `dtype` in the notation of safetensors."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """The place of one published tensor: rows `start:stop` (of one expert, if given) of a parameter, maybe transposed.

    `pairs` is the number of heads whose rows are reordered from half-split to pairwise rotary order, 0 for none.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None
    expert: int | None = None
    transpose: bool = False
    pairs: int = 0

    def view(self, parameter: Tensor) -> Tensor:
        """The slot's part of its parameter, oriented as published."""
        part = parameter if self.expert is None else parameter[self.expert]
        part = part.T if self.transpose else part
        return part[self.start : self.stop].view(self.shape) if not self.transpose else part

    def write(self, parameter: Tensor, published: Tensor) -> None:
        """Copy a published tensor in, converting dtype and device."""
        if self.pairs:
            published = published[_pair_order(self.shape[0], self.pairs)]
        self.view(parameter).copy_(published)

    def read(self, parameter: Tensor) -> Tensor:
        """The published tensor, a copy."""
        part = self.view(parameter)
        if self.pairs:
            return part[torch.argsort(_pair_order(self.shape[0], self.pairs)).to(part.device)]
        return part.clone(memory_format=torch.contiguous_format)


def _pair_order(rows: int, heads: int) -> Tensor:
    """Indices that bring rows of width d a head from (x_0..x_d/2-1, y_0..) to (x_0, y_0, x_1, y_1, ...)."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def slots(config: MolmoEConfig) -> dict[str, Slot]:
    """Every key of the published layout, with its place in memory."""
    width, words = config.d_model, config.embedding_size
    found = {"model.transformer.wte.embedding": Slot("language.wte", (words, width), 0, words)}
    if config.additional_vocab_size:
        extra = config.additional_vocab_size
        found["model.transformer.wte.new_embedding"] = Slot("language.wte", (extra, width), words, words + extra)
    for block in range(config.n_layers):
        found.update(_block_slots(config, block))
    found["model.transformer.ln_f.weight"] = Slot("language.ln_f", (width,))
    found["lm_head.weight"] = Slot("language.lm_head", (words, width))
    found.update(_vision_slots(config))
    return found


def _block_slots(config: MolmoEConfig, block: int) -> Iterator[tuple[str, Slot]]:
    width, hidden, heads = config.d_model, config.expert_hidden, config.n_heads
    key, name = f"model.transformer.blocks.{block}", f"language.blocks.{block}"
    yield f"{key}.attn.attn_norm.weight", Slot(f"{name}.attn_norm", (width,))
    for row, part in enumerate(("q_norm", "k_norm")):
        yield f"{key}.attn.{part}.weight", Slot(f"{name}.qk_norm", (width,), row, row + 1, pairs=heads)
    # Query, key and value are stacked in one published tensor; only the first two are reordered.
    yield f"{key}.attn.att_proj.weight", QkvSlot(f"{name}.qkv", (3 * width, width), pairs=heads)
    yield f"{key}.attn.attn_out.weight", Slot(f"{name}.attn_out", (width, width))
    yield f"{key}.mlp.ff_norm.weight", Slot(f"{name}.ff_norm", (width,))
    yield f"{key}.mlp.gate.weight", Slot(f"{name}.router", (config.n_experts, width))
    for expert in range(config.n_experts):
        expert_key = f"{key}.mlp.experts.{expert}"
        yield f"{expert_key}.gate_proj.weight", Slot(f"{name}.gate_up", (hidden, width), 0, hidden, expert)
        yield f"{expert_key}.up_proj.weight", Slot(f"{name}.gate_up", (hidden, width), hidden, 2 * hidden, expert)
        yield f"{expert_key}.down_proj.weight", Slot(f"{name}.down", (width, hidden), expert=expert, transpose=True)


@dataclass(frozen=True)
class QkvSlot(Slot):
    """The stacked attention projection: query and key rows are reordered, value rows are not."""

    def write(self, parameter: Tensor, published: Tensor) -> None:
        parameter.copy_(published[self._order()])

    def read(self, parameter: Tensor) -> Tensor:
        return parameter[torch.argsort(self._order()).to(parameter.device)]

    def _order(self) -> Tensor:
        width = self.shape[1]
        order = _pair_order(width, self.pairs)
        return torch.cat((order, order + width, torch.arange(2 * width, 3 * width)))


def _vision_slots(config: MolmoEConfig) -> Iterator[tuple[str, Slot]]:
    vision, root = config.vision, "model.vision_backbone"
    width, inner, features = vision.width, vision.heads * vision.head_dim, vision.feature_dim
    yield f"{root}.pad_embed", Slot("vision.pad_embed", (2, features))
    yield from _linear(f"{root}.image_pooling_2d.wq", "vision.pooling.query", inner, features)
    yield from _linear(f"{root}.image_pooling_2d.wk", "vision.pooling.key_value", inner, features, 0)
    yield from _linear(f"{root}.image_pooling_2d.wv", "vision.pooling.key_value", inner, features, inner)
    yield from _linear(f"{root}.image_pooling_2d.wo", "vision.pooling.out", width, inner)
    hidden = config.projector_hidden
    for part, start in (("w1", 0), ("w3", hidden)):
        slot = Slot("vision.projector_in.weight", (hidden, width), start, start + hidden)
        yield f"{root}.image_projector.{part}.weight", slot
    yield f"{root}.image_projector.w2.weight", Slot("vision.projector_out.weight", (config.d_model, hidden))
    vit, name = f"{root}.image_vit", "vision.encoder"
    yield f"{vit}.class_embedding", Slot(f"{name}.class_embedding", (width,))
    yield f"{vit}.positional_embedding", Slot(f"{name}.positional_embedding", (vision.patches + 1, width))
    yield f"{vit}.patch_embedding.weight", Slot(f"{name}.patch_embedding.weight", (width, vision.pixels))
    for part in ("weight", "bias"):
        yield f"{vit}.pre_ln.{part}", Slot(f"{name}.pre_ln.{part}", (width,))
    for layer in range(vision.layers):
        key, block = f"{vit}.transformer.resblocks.{layer}", f"{name}.blocks.{layer}"
        for row, part in enumerate(("wq", "wk", "wv")):
            yield from _linear(f"{key}.attention.{part}", f"{block}.qkv", inner, width, row * inner)
        yield from _linear(f"{key}.attention.wo", f"{block}.out", width, inner)
        yield from _linear(f"{key}.feed_forward.w1", f"{block}.w1", vision.mlp_dim, width)
        yield from _linear(f"{key}.feed_forward.w2", f"{block}.w2", width, vision.mlp_dim)
        for norm in ("attention_norm", "ffn_norm"):
            for part in ("weight", "bias"):
                yield f"{key}.{norm}.{part}", Slot(f"{block}.{norm}.{part}", (width,))


def _linear(key: str, name: str, rows: int, columns: int, start: int = 0) -> Iterator[tuple[str, Slot]]:
    yield f"{key}.weight", Slot(f"{name}.weight", (rows, columns), start, start + rows)
    yield f"{key}.bias", Slot(f"{name}.bias", (rows,), start, start + rows)


def check_revision(path_or_id: str | Path, revision: str | None) -> None:
    """Refuses a revision of what has none.

    Raises:
        UserError: a revision of the embedded model or of a local folder.
    """
    if revision is not None and (str(path_or_id) == "embedded" or Path(path_or_id).expanduser().exists()):
        raise UserError(
            f"revision {revision!r} of {path_or_id} is not allowed: only a hub id has revisions; leave it out"
        )


def check_name(path_or_id: str | Path) -> None:
    """Refuses what can be no model; looks nothing up on the hub.

    Raises:
        UserError: neither "embedded" nor a folder nor in the form of a hub id.
    """
    folder = Path(path_or_id).expanduser()
    if str(path_or_id) == "embedded" or folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{folder} is a file: give the folder with config.json and the safetensors files")
    if str(path_or_id).count("/") != 1 or str(path_or_id).startswith((".", "/", "~")):
        raise UserError(f"no model folder {path_or_id}: give an existing folder, a hub id, or 'embedded'")


def resolve_folder(path_or_id: str | Path, revision: str | None = None, files: Sequence[str] = _HUB_FILES) -> Path:
    """A local folder for a folder, "embedded", or a hub id (of which `files` are fetched at `revision`).

    Raises:
        UserError: there is no such folder, the hub has or gives nothing of that name, or a folder's revision is asked.
    """
    check_revision(path_or_id, revision)
    folder = Path(path_or_id).expanduser()
    if str(path_or_id) == "embedded":
        from envs.embedded import folder as embedded_folder

        return embedded_folder()
    check_name(path_or_id)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    with suppress(Exception):  # the size is only a courtesy; fetching says what is wrong
        planned = snapshot_download(str(path_or_id), revision=revision, allow_patterns=list(files), dry_run=True)
        size = sum(file.file_size or 0 for file in planned if file.will_download)
        if size > _LARGE_DOWNLOAD:
            _log.warning("%s: fetching %s from the hub", path_or_id, size_text(size))
    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises many unrelated kinds
        reason = first_line(error)
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"cannot fetch {path_or_id}{at} from the hub ({reason}): check the name and the network"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index or as its only file.

    Raises:
        UserError: there are none, the index is broken, or it names a file that is missing or outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        single = folder / WEIGHTS
        if not single.exists():
            raise UserError(f"no {WEIGHTS} or {INDEX} in {folder}: weights in safetensors format are needed")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {index}: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name!r}: weight files must be in the same folder")
        if not (folder / name).exists():
            raise UserError(f"{index} names {name}, which is missing: fetch the checkpoint again")
    return [folder / name for name in names]


def read_headers(folder: Path) -> tuple[dict[str, TensorHeader], list[str]]:
    """Every tensor of the checkpoint in `folder` by its key, and what is wrong with the files, one line each."""
    tensors: dict[str, TensorHeader] = {}
    problems = []
    for path in weight_files(folder):
        try:
            with _opened(path) as file:
                parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
                found = {k: TensorHeader(path.name, p.get_dtype(), tuple(p.get_shape())) for k, p in parts.items()}
        except UserError as error:
            problems.append(error.message)
            continue
        problems += [
            f"{key} is stored twice, in {tensors[key].file} and {path.name}: keep one of them"
            for key in sorted(found.keys() & tensors.keys())
        ]
        tensors |= found
    return tensors, problems


def mismatches(config: MolmoEConfig, tensors: Mapping[str, TensorHeader]) -> list[str]:
    """Keys that are missing, unexpected, of another shape or of a dtype that is not read; one line per kind."""
    wanted = slots(config)
    known = {key: tensor for key, tensor in tensors.items() if key in wanted}
    kinds = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [key for key in tensors if key not in wanted and 0 not in tensors[key].shape],
        "of another shape": [
            f"{key} is {tensor.shape} instead of {wanted[key].shape}"
            for key, tensor in known.items()
            if tensor.shape != wanted[key].shape
        ],
        f"of a dtype other than {', '.join(LOADABLE_DTYPES)}": [
            f"{key} is {tensor.dtype}" for key, tensor in known.items() if tensor.dtype not in LOADABLE_DTYPES
        ],
    }
    return [
        f"{len(keys)} {what}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for what, keys in kinds.items()
        if keys
    ]


def check_weights(folder: Path, config: MolmoEConfig) -> dict[str, TensorHeader]:
    """Headers of a checkpoint that can be loaded; takes no memory for its weights.

    Raises:
        UserError: a file is corrupt, or keys are missing, duplicate, unexpected or of another shape or dtype.
    """
    tensors, problems = read_headers(folder)
    problems = problems or mismatches(config, tensors)
    if problems:
        raise UserError(f"weights in {folder} do not fit its config.json; {'; '.join(problems)}")
    return tensors


def load_weights(
    folder: Path, config: MolmoEConfig, tensors: Mapping[str, TensorHeader], parameters: Mapping[str, Tensor]
) -> None:
    """Fill `parameters` from the checked checkpoint in `folder`, tensor by tensor, with their dtype and device."""
    wanted = slots(config)
    with torch.no_grad():
        for name in sorted({tensor.file for tensor in tensors.values()}):
            with _opened(folder / name) as file:
                for key in (key for key, tensor in tensors.items() if tensor.file == name and key in wanted):
                    slot = wanted[key]
                    slot.write(parameters[slot.parameter].data, file.get_tensor(key))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read weights {path}: {error}; the file is corrupt or incomplete") from None


def published_state_dict(config: MolmoEConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their published keys, copied, on their device and in their dtype."""
    return {key: slot.read(parameters[slot.parameter].detach()) for key, slot in slots(config).items()}


def save_weights(
    folder: Path,
    config: MolmoEConfig,
    parameters: Mapping[str, Tensor],
    max_shard_size: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Write published weights in shards of at most `max_shard_size` bytes (a larger tensor gets its own) and the index.

    One shard at a time is in memory in addition to the model. Weights from an earlier save are removed at the end.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    places = slots(config)
    for key, slot in places.items():
        parameter = parameters[slot.parameter]
        size = math.prod(slot.shape) * (dtype or parameter.dtype).itemsize
        if filled and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, keys in enumerate(shards, 1):
        name = WEIGHTS if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for key in keys:
            tensor = places[key].read(parameters[places[key].parameter].detach()).cpu()
            tensors[key] = tensor if dtype is None else tensor.to(dtype)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(keys, name))
    if not single:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    stale = {path for pattern in (WEIGHTS, _SHARDS) for path in folder.glob(pattern)}
    if single:
        stale.add(folder / INDEX)
    for path in stale - {folder / name for name in weight_map.values()}:
        path.unlink(missing_ok=True)
