"""`ray-ctrl importance`: how much each block matters on a data set, stored next to the weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.config import StoreSettings
from envs.engine.measure_block_importance import measure_importance
from envs.errors import UserError
from envs.model.block_importance import (
    PUBLISHED_IMPORTANCE,
    Importance,
    dropped_first,
    importance_path,
    is_published_shape,
    rank_correlation,
    read_importance,
    write_importance,
)
from ray_ctrl.config import Config
from ray_ctrl.console import console, counted, table
from ray_ctrl.load_config import load_config
from ray_ctrl.provenance import provenance
from ray_ctrl.run_context import env_config
from ray_ctrl.run_folder import check_writable

SPLITS = ("train", "validation")


def run(
    preset: str,
    config_file: Path | None,
    overrides: Sequence[str],
    *,
    samples: int,
    split: str,
    by: str,
    out: Path | None,
) -> None:
    """Measures, writes a new file, and prints the scores next to the known ones.

    Raises:
        UserError: nowhere to write, a model or task that cannot be read, or the test split.
    """
    config = load_config(preset, config_file, overrides)
    if split not in SPLITS:
        raise UserError(
            f"split {split!r} is not allowed: choose {' or '.join(SPLITS)}; test samples must choose nothing"
        )
    file = _target(config, out)
    found, engine = measure(config, samples, split, by)
    compared = {
        name: (scores, rank_correlation(found.scores, scores)) for name, scores in _known(config, engine).items()
    }
    origin = {
        "task": config.task.name,
        "split": split,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "fingerprint": engine.model.fingerprint,
        "compared_with": {
            name: {"rank_correlation": None if math.isnan(correlation) else correlation, "importance": list(scores)}
            for name, (scores, correlation) in compared.items()
        },
        "origin": provenance(),
    }
    write_importance(file, found.to_dict(origin))
    _show(found, compared)
    default = file.absolute() == importance_path(config.model.name).absolute()
    used = "next to the weights, and used from now on" if default else f"use it with model.block_importance={file}"
    console.print(f"importance in {file}: {used}")


def measure(config: Config, samples: int, split: str, by: str) -> tuple[Importance, Any]:
    """The measured scores, and the engine they were measured with."""
    import torch

    torch.set_num_threads(config.model.threads)
    chosen = config.task.load(split, samples)
    with console.status("loading model"):
        # Its outcomes are no run's, so they need not be stored.
        engine = env_config(config, split).model_copy(update={"store": StoreSettings(path=None)}).build_engine()
    with counted(f"leaving out one block at a time on {len(chosen)} samples") as progress:
        return measure_importance(engine, chosen, by, progress=progress), engine


def _target(config: Config, out: Path | None) -> Path:
    """The file to write: the one given, else the model's own; neither may exist."""
    file = out if out is not None else importance_path(config.model.name)
    if file.exists():
        raise UserError(f"{file} exists already: choose another file with --out, or remove it first")
    if not file.absolute().parent.is_dir():
        where = f"there is no folder {file.parent}" if out is not None else f"{config.model.name} is no local folder"
        raise UserError(f"nowhere to store the importance: {where}; give a file in an existing folder with --out")
    check_writable(file.absolute().parent)
    return file


def _known(config: Config, engine: Any) -> dict[str, tuple[float, ...]]:
    """Scores to compare with: those in use, and the published ones if the model has their shape."""
    model = config.model
    found: dict[str, tuple[float, ...]] = {}
    if model.block_importance is not None or importance_path(model.name).is_file():
        found["in use"] = read_importance(model.name, model.block_importance)
    if is_published_shape(engine.model.config):
        found["published"] = PUBLISHED_IMPORTANCE
    return found


def _show(found: Importance, others: dict[str, tuple[tuple[float, ...], float]]) -> None:
    rows = [
        (str(block), f"{score:.4f}", f"{error:.4f}", *(f"{scores[block]:.4f}" for scores, _ in others.values()))
        for block, (score, error) in enumerate(zip(found.scores, found.errors, strict=True))
    ]
    title = f"block importance by {found.by.replace('_', ' ')}, {found.samples} samples"
    console.print(table(("block", "measured", "± s.e.", *others), rows, title))
    console.print(f"{found.by.replace('_', ' ')} of the full plan: {found.full:.4f}")
    console.print(f"left out first: blocks {dropped_first(found.scores)}")
    for name, (scores, correlation) in others.items():
        text = "none, as one of them is constant" if math.isnan(correlation) else f"{correlation:.3f}"
        console.print(f"{name}: blocks {dropped_first(scores)} first; rank correlation over blocks 1 to 15 {text}")
