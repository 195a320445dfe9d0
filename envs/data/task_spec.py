"""What `--task` accepts, and several sets in one.

    tasks  = part { ("+" | ",") part }
    part   = [ weight "*" ] set
    set    = "scenes" | NAME | NAME "=" WHERE | WHERE
    WHERE  = PATH | HUB_ID [ "@" REVISION ]

NAME is an entry of the table of public sets. PATH is a parquet file, a JSON Lines file, or a folder
of parquet, JSON Lines or (with NAME) the set's original JSON files and images. HUB_ID is
owner/name. A path that exists is taken as it stands, whatever signs are in it.

With weights, every part gives its share of the samples, as many as there are without repeating any;
without, every part gives all it has.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.data.build import OnBroken, Source, keep_apart, read_source
from envs.data.catalog import DATA_SETS, OWN, data_set, data_set_on_hub, is_data_set
from envs.data.sample import Sample
from envs.errors import UserError
from envs.processing.images import shown

SCENES = "scenes"
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*\*\s*(.+)", re.DOTALL)
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Part:
    """One set of a mix; `source` is None for the scenes, `weight` None where none was given."""

    source: Source | None
    weight: float | None


def parse_tasks(text: str) -> tuple[Part, ...]:
    """The parts of a task description; see the grammar above.

    Raises:
        UserError: an empty description, an unknown set, a path that does not exist.
    """
    whole = text.strip()
    if not whole:
        raise UserError("no task given: give scenes, a data set's name, a path or a mix of these")
    if _names_path(whole):
        return (Part(_where(whole, OWN.name), None),)
    name, equals, path = whole.partition("=")
    if equals and _exists(path.strip()) and not _WEIGHT.fullmatch(name):
        return (_part(whole),)
    return tuple(_part(part) for part in re.split(r"[+,]", whole))


def absolute_task(text: str) -> str:
    """The task with the paths in it that exist as absolute ones, so that processes in other folders find them."""
    whole = text.strip()
    if _names_path(whole):
        return _absolute(whole)
    name, equals, path = whole.partition("=")
    if equals and _exists(path.strip()) and not _WEIGHT.fullmatch(name):
        return f"{name}={_absolute(path)}"
    if re.search(r"[+,]", str(Path.cwd())):  # in a mix they would separate parts
        return whole
    return "".join(_absolute_part(piece) for piece in re.split(r"([+,])", whole))


def _absolute_part(text: str) -> str:
    weighted = _WEIGHT.fullmatch(text)
    start = weighted.start(2) if weighted else 0
    label, equals, where = text[start:].rpartition("=")
    if (equals and _exists(where.strip())) or (not equals and _names_path(where.strip())):
        return f"{text[:start]}{label}{equals}{_absolute(where)}"
    return text


def _names_path(where: str) -> bool:
    return _exists(where) and where != SCENES and not is_data_set(where)


def _absolute(where: str) -> str:
    return str(Path(where.strip()).expanduser().absolute())


def _part(text: str) -> Part:
    weighted = _WEIGHT.fullmatch(text)
    weight = float(weighted[1]) if weighted else None
    name = (weighted[2] if weighted else text).strip()
    if weight is not None and weight <= 0:
        raise UserError(f"weight {weighted[1] if weighted else ''} of {name!r} is not above 0")
    if name == SCENES:
        return Part(None, weight)
    label, equals, where = name.partition("=")
    if equals:
        return Part(_where(where.strip(), label.strip()), weight)
    if is_data_set(name):
        return Part(Source(data_set(name)), weight)
    return Part(_where(name, OWN.name), weight)


def _where(where: str, label: str) -> Source:
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
        f"unknown task {shown(where)}: neither a file or folder, nor a hub id (owner/name), nor one of {known}"
    )


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False  # too long or too odd for a path


def load_mix(
    parts: Sequence[Part], split: str, limit: int | None, seed: int, on_broken: OnBroken
) -> tuple[Sample, ...]:
    """Samples of one split of a mix; no image of any part's test or validation is in its train."""
    pools = [_pool(part, split, limit, seed, on_broken) for part in parts]
    if len(parts) > 1:
        pools = _keep_parts_apart(parts, pools, split, on_broken)
    if len(pools) == 1 and limit is None:
        return pools[0]
    if not any(pools):
        raise UserError(f"the mix leaves no {split} samples: its parts hold the same few images")
    counts = _counts([len(pool) for pool in pools], [part.weight for part in parts], limit)
    chosen = [sample for pool, count in zip(pools, counts, strict=True) for sample in _shuffled(pool, seed)[:count]]
    samples = _shuffled(chosen, seed)
    return tuple({sample.id: sample for sample in samples}.values())


def _pool(part: Part, split: str, limit: int | None, seed: int, on_broken: OnBroken) -> tuple[Sample, ...]:
    if part.source is not None:
        return read_source(part.source, on_broken)[split]
    from envs.data.scenes import load

    return tuple(load(split, limit, seed))


def _keep_parts_apart(
    parts: Sequence[Part], pools: list[tuple[Sample, ...]], split: str, on_broken: OnBroken
) -> list[tuple[Sample, ...]]:
    """Each pool without images that another part holds in a split of higher rank.

    Scenes are drawn apart by their own rule and share no image with anything else.
    """
    together: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    for part in parts:
        if part.source is not None:
            for name, samples in read_source(part.source, on_broken).items():
                together[name].extend(samples)
    allowed = {sample.id for sample in keep_apart(together)[split]}
    return [
        pool if part.source is None else tuple(s for s in pool if s.id in allowed)
        for part, pool in zip(parts, pools, strict=True)
    ]


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
    # What truncation took goes to the parts that lost most.
    for i in sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i]):
        if sum(counts) < target and counts[i] < sizes[i]:
            counts[i] += 1
    return counts


def _shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """An order that depends on the seed and each sample's content alone."""
    return sorted(samples, key=lambda s: hashlib.sha256(f"{seed}:{s.id}".encode()).digest())
