"""A trial that PBT sends on from a better one: it takes that one's checkpoint, and remembers what was its own.

`adopted.json` in the trial's folder names the last origin, and under which settings the trial did its own iterations
before. Those stay candidates for its best; iterations that came from the origin are the origin's.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.files import atomic_folder, atomic_write, write_json
from ray_ctrl.run_folder import Checkpoint, RunFolder

ORIGIN = "origin.json"
ADOPTED = "adopted.json"


@dataclass(frozen=True)
class Stretch:
    """Iterations (after, until] that a trial did itself, under one configuration (section to key to value)."""

    after: int
    until: float
    settings: Mapping[str, Any]

    def holds(self, iteration: int) -> bool:
        return self.after < iteration <= self.until


def stretches(folder: RunFolder) -> list[Stretch]:
    """What a trial did itself, oldest first; all of it where it adopted nothing."""
    marker = _marker(folder)
    now = Stretch(marker.get("iteration", 0), math.inf, folder.config.model_dump(mode="json"))
    return [*(Stretch(**entry) for entry in marker.get("before", [])), now]


def pack(checkpoint: Checkpoint, trial: str, place: Path) -> None:
    """Fills the empty folder `place` with a checkpoint that another trial may go on from."""
    shutil.copytree(checkpoint.path, place / checkpoint.path.name)
    origin = {"trial": trial, "iteration": checkpoint.iteration, "folder": checkpoint.path.name}
    write_json(place / ORIGIN, origin)


def adopt(folder: RunFolder, trial: str, place: Path) -> int:
    """Makes another trial's packed checkpoint this trial's newest; nothing where it is its own, or was adopted before.

    Returns the iterations behind that checkpoint.

    Args:
        folder: the trial's own, beside those of the other trials; its configuration is still the old one.
        place: what `pack` filled.
    """
    origin = json.loads((place / ORIGIN).read_text("utf-8"))
    marker, new = _marker(folder), int(origin["iteration"])
    # A second start with the same checkpoint goes on from what was reached since.
    if origin["trial"] == trial or all(marker.get(key) == value for key, value in origin.items()):
        return new
    own = [row for row in folder.metrics() if row["iteration"] < new]
    reached = own[-1]["iteration"] if own else 0
    before = [
        {"after": part.after, "until": int(min(part.until, reached)), "settings": part.settings}
        for part in stretches(folder)
        if part.after < min(part.until, reached)
    ]
    checkpoints = folder.root / "checkpoints"
    for path in checkpoints.glob("iteration_*"):
        if int(path.name.removeprefix("iteration_")) >= new:
            shutil.rmtree(path)
    with atomic_folder(checkpoints / origin["folder"]) as temporary:
        shutil.copytree(place / origin["folder"], temporary, dirs_exist_ok=True)
    theirs = RunFolder(folder.root.parent / origin["trial"]).metrics()
    rows = [*own, *(row for row in theirs if reached < row["iteration"] <= new)]
    atomic_write(folder.root / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder.root / ADOPTED, origin | {"before": before})
    return new


def _marker(folder: RunFolder) -> dict[str, Any]:
    path = folder.root / ADOPTED
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
