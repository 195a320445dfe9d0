"""The grammar of `--task`, and several sets in one.

    tasks  = part { ("+" | ",") part }
    part   = [ weight "*" ] set
    set    = "scenes" | NAME | NAME "=" WHERE | WHERE
    WHERE  = PATH | HUB_ID [ "@" REVISION ]

NAME is a public set. PATH is a parquet file, a JSON Lines file, or a folder of parquet, JSON Lines or (with NAME) the
set's original JSON files and images. HUB_ID is owner/name. A path that exists is taken literally, whatever characters
are in it.

With weights, every part gives its share of the samples, as many as there are without repeating any; without, every
part gives all it has.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from envs.data.build import OnInvalidRow, Source, keep_apart, read_source, unique
from envs.data.catalog import DATA_SETS, OWN, data_set, data_set_on_hub, is_data_set
from envs.data.sample import Sample
from envs.errors import UserError
from envs.processing.images import excerpt

SCENES = "scenes"
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*\*\s*(.+)", re.DOTALL)
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


class Part(NamedTuple):
    """One set of a mix; `source` is None for the scenes, `weight` None if none was given."""

    source: Source | None
    weight: float | None


def parse_tasks(text: str) -> tuple[Part, ...]:
    """The parts of a task description; see the grammar above.

    Raises:
        UserError: an empty description, an unknown set, a path that does not exist.
    """
    if not text.strip():
        raise UserError("no task given: give scenes, a data set's name, a path or a mix of these")
    return tuple(_part(*piece) for piece in _pieces(text)[::2])


def absolute_task(text: str) -> str:
    """The task with its existing paths made absolute, so that processes in other folders find them."""
    pieces = _pieces(text)
    if len(pieces) > 1 and re.search(r"[+,]", str(Path.cwd())):
        return text.strip()  # in a mix, the signs in this folder's name would separate parts
    return "".join(
        f"{prefix}{Path(where.strip()).expanduser().absolute()}"
        if _exists(where.strip()) and (prefix.endswith("=") or _is_path(where.strip()))
        else prefix + where
        for prefix, where in pieces
    )


def _pieces(text: str) -> list[tuple[str, str]]:
    """(weight and name, set or path) of each part, and ("", separator) between two; a literal path is one piece."""
    text = text.strip()
    name, equals, path = text.partition("=")
    if _is_path(text):
        return [("", text)]
    if equals and _exists(path.strip()) and not _WEIGHT.fullmatch(name):
        return [(f"{name}=", path)]
    pieces = []
    for part in re.split(r"([+,])", text):
        weighted = _WEIGHT.fullmatch(part)
        start = weighted.start(2) if weighted else 0
        start += part[start:].find("=") + 1
        pieces.append((part[:start], part[start:]))
    return pieces


def _is_path(where: str) -> bool:
    return _exists(where) and where != SCENES and not is_data_set(where)


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False  # too long or too odd for a path


def _part(prefix: str, where: str) -> Part:
    weighted, where = re.fullmatch(r"\s*([\d.]+)\s*\*(.*)", prefix, re.DOTALL), where.strip()
    number, label = weighted.groups() if weighted else ("", prefix)
    weight = float(number) if number else None
    if weight is not None and weight <= 0:
        raise UserError(f"weight {number} of {label.strip() + where!r} is not above 0")
    if label.strip():
        return Part(_source(where, label.strip().removesuffix("=").strip()), weight)
    if where == SCENES:
        return Part(None, weight)
    return Part(Source(data_set(where)) if is_data_set(where) else _source(where, OWN.name), weight)


def _source(where: str, label: str) -> Source:
    """The source at a path or hub id."""
    entry = OWN if label == OWN.name else data_set(label)
    if _exists(where):
        return Source(entry, path=Path(where).expanduser())
    hub = _HUB_ID.fullmatch(where)
    if hub and not where.endswith((".parquet", ".jsonl", ".json")):
        known_entry = data_set_on_hub(hub[1]) if entry is OWN else None
        return Source(known_entry or entry, repo=hub[1], revision=hub[2])
    known = ", ".join((SCENES, *(e.name for e in DATA_SETS)))
    raise UserError(
        f"unknown task {excerpt(where)}: neither a file or folder, nor a hub id (owner/name), nor one of {known}"
    )


def load_mix(
    parts: Sequence[Part], split: str, limit: int | None, seed: int, on_invalid_row: OnInvalidRow
) -> tuple[Sample, ...]:
    """Samples of one split of a mix; no image of any part's test or validation is in its train."""
    from envs.data.scenes import load

    pools = [
        read_source(part.source, on_invalid_row)[split] if part.source else tuple(load(split, limit, seed))
        for part in parts
    ]
    if len(pools) == 1 and limit is None:
        return pools[0]
    if len(parts) > 1:
        # Scenes have their own rule and share no image with anything else.
        together: dict[str, list[Sample]] = defaultdict(list)
        for source in (part.source for part in parts if part.source):
            for name, samples in read_source(source, on_invalid_row).items():
                together[name] += samples
        allowed = {sample.id for sample in keep_apart(together)[split]} if together else set()
        pools = [
            tuple(sample for sample in pool if sample.id in allowed) if part.source else pool
            for part, pool in zip(parts, pools, strict=True)
        ]
    if not any(pools):
        raise UserError(f"the mix leaves no {split} samples: its parts have the same few images")
    counts = _counts([len(pool) for pool in pools], [part.weight for part in parts], limit)
    chosen = [sample for pool, count in zip(pools, counts, strict=True) for sample in _shuffled(pool, seed)[:count]]
    return unique(_shuffled(chosen, seed))


def _counts(sizes: list[int], weights: list[float | None], limit: int | None) -> list[int]:
    """How many samples each part gives, at most its size and together at most the limit."""
    shares = [float(size) for size in sizes]
    if any(weight is not None for weight in weights):
        shares = [1.0 if weight is None else weight for weight in weights]
    # A part without samples in this split has no share in it.
    shares = [share if size else 0.0 for size, share in zip(sizes, shares, strict=True)]
    scale = min(size / share for size, share in zip(sizes, shares, strict=True) if share)
    if limit is not None:
        scale = min(scale, limit / sum(shares))
    exact = [share * scale for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    target = round(sum(exact))
    # Samples lost by truncation go to the parts that lost most.
    for i in sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i]):
        if sum(counts) < target and counts[i] < sizes[i]:
            counts[i] += 1
    return counts


def _shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """An order that depends on the seed and each sample's content alone."""
    return sorted(samples, key=lambda s: hashlib.sha256(f"{seed}:{s.id}".encode()).digest())
