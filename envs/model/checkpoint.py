"""Finding a checkpoint and reading the headers of its files, to say what is wrong with it before memory is taken."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from envs.errors import UserError, first_line
from envs.files import size_text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LOADABLE_DTYPES = ("F64", "F32", "F16", "BF16")
"""Number formats of weights; quantized ones mean nothing without their scales."""
_LARGE_DOWNLOAD = 10**8
# What is fetched for a hub id: weights and the JSON and text files next to them, never code.
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
_log = logging.getLogger(__name__)


class TensorHeader(NamedTuple):
    """A stored tensor as its file's header describes it; `dtype` in the notation of safetensors."""

    file: str
    dtype: str
    shape: tuple[int, ...]


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


def resolve_folder(
    path_or_id: str | Path,
    revision: str | None = None,
    files: Sequence[str] = _HUB_FILES,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """A local folder for a folder, "embedded", or a hub id (of which `files` are fetched at `revision`).

    `options` may have transformers' `token`, `cache_dir`, `local_files_only` and `force_download`; others are ignored.

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

    hub = {key: value for key, value in (options or {}).items() if key in _HUB_OPTIONS and value}
    fetch: Any = partial(snapshot_download, str(path_or_id), revision=revision, allow_patterns=list(files), **hub)
    with suppress(Exception):  # the size is only a courtesy; fetching says what is wrong
        planned = fetch(dry_run=True)
        size = sum(file.file_size or 0 for file in planned if file.will_download)
        if size > _LARGE_DOWNLOAD:
            _log.warning("%s: fetching %s from the hub", path_or_id, size_text(size))
    try:
        return Path(fetch())
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
            pickled = next(folder.glob("*.bin"), None)
            hint = f" (it has {pickled.name}: save it again as safetensors)" if pickled else ""
            raise UserError(f"no {WEIGHTS} or {INDEX} in {folder}: weights in safetensors format are needed{hint}")
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


def mismatches(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorHeader]) -> list[str]:
    """Keys that are missing, unexpected, of another shape or of a dtype that is not read; one line per kind.

    Args:
        wanted: shapes of the published keys, `envs.model.molmoe.published_shapes`.
    """
    known = {key: tensor for key, tensor in tensors.items() if key in wanted}
    kinds = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [key for key in tensors if key not in wanted and 0 not in tensors[key].shape],
        "of another shape": [
            f"{key} is {tensor.shape} instead of {wanted[key]}"
            for key, tensor in known.items()
            if tensor.shape != wanted[key]
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


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read weights {path}: {error}; the file is corrupt or incomplete") from None
