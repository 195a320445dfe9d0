"""The run folder: configuration, origin, metrics, checkpoints, exported controller.

    config.yaml  run.json  metrics.jsonl  tensorboard/  checkpoints/iteration_000010/  controller/

Nothing in it is overwritten silently. Checkpoints are complete or absent, with a
manifest of checksums: a damaged one is recognised and the one before it is used.
"""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.files import atomic_folder, atomic_write, integrity_error, remove_partial, write_json, write_manifest
from ray_ctrl.config import Config
from ray_ctrl.load_config import load_config, to_yaml
from ray_ctrl.provenance import provenance

FORMAT_VERSION = 1
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One good checkpoint: its folder, the iterations done, and its validation score and its standard error where it
    has one.
    """

    path: Path
    iteration: int
    score: float | None
    score_error: float = 0.0


@dataclass(frozen=True)
class RunFolder:
    """A run on disk; make one with `create`, find one with `open`."""

    root: Path

    @classmethod
    def create(cls, root: Path, config: Config) -> "RunFolder":
        """A new run folder.

        Raises:
            UserError: the folder exists and is not empty, or cannot be made; a file of block importance that cannot
                be read.
        """
        from envs.model.block_importance import read_importance

        cls.refuse(root)
        importance = read_importance(config.model.name, config.model.block_importance)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make run folder {root}: {error.strerror}") from None
        atomic_write(root / "config.yaml", to_yaml(config))
        started = {"format_version": FORMAT_VERSION, "seed": config.run.seed, **provenance()}
        started |= {"importance": importance, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(root / "run.json", started)
        return cls(root)

    @staticmethod
    def refuse(root: Path) -> None:
        """Raises a UserError where `root` exists and is not an empty folder."""
        if root.is_file() or (root.is_dir() and any(root.iterdir())):
            raise UserError(
                f"run folder {root} exists already: continue it with --resume, or choose another with --run-dir"
            )

    @classmethod
    def open(cls, root: Path) -> "RunFolder":
        """An existing run folder.

        Raises:
            UserError: there is none at `root`.
        """
        if not (root / "config.yaml").is_file() or not (root / "run.json").is_file():
            raise UserError(f"{root} is not a run folder: it has no config.yaml and run.json")
        return cls(root)

    @property
    def config(self) -> Config:
        return load_config(None, self.root / "config.yaml")

    def check_importance(self) -> None:
        """Refuses to go on where files of block importance changed since: settings would mean other blocks than before.

        Raises:
            UserError: the scores in use are not those with which the run began.
        """
        from envs.model.block_importance import importance_path, read_importance

        model = self.config.model
        began = json.loads((self.root / "run.json").read_text("utf-8")).get("importance")
        now = read_importance(model.name, model.block_importance)
        if began is None or tuple(began) == now:
            return
        block = next(block for block, (old, new) in enumerate(zip(began, now, strict=True)) if old != new)
        beside = importance_path(model.name)
        source = model.block_importance or (beside if beside.is_file() else "the published scores")
        raise UserError(
            f"block importance cannot change when a run is resumed: in {source} the score of block {block} is "
            f"{now[block]}, and {self.root} began with {began[block]}; put the scores back that its run.json "
            "holds, or start a new run"
        )

    @property
    def controller(self) -> Path:
        """Where the chosen controller is exported."""
        return self.root / "controller"

    # -- metrics ------------------------------------------------------------------------------

    def append_metrics(self, metrics: Metrics) -> None:
        """Adds one iteration as a line of JSON, in one write.

        Raises:
            UserError: the disk refuses; a half-written line is left out by every reader.
        """
        path = self.root / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; free space there and continue with --resume"
            ) from error

    def metrics(self) -> list[Metrics]:
        """All whole lines; a torn last line (the process died in writing it) is left out."""
        path = self.root / "metrics.jsonl"
        if not path.is_file():
            return []
        return list(_whole_lines(path))

    def cut_metrics(self, iteration: int) -> None:
        """Drops lines after `iteration`, so that the iterations to come are written once."""
        kept = [line for line in self.metrics() if line["iteration"] <= iteration]
        atomic_write(self.root / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))

    # -- checkpoints --------------------------------------------------------------------------

    def save_checkpoint(
        self, iteration: int, score: float | None, write: Callable[[Path], None], *, score_error: float = 0.0
    ) -> Checkpoint:
        """Has `write` fill a temporary folder, records its checksums, and renames it into place.

        Raises:
            UserError: the disk refuses (full, read-only); the checkpoints before stay as they were.
        """
        folder = self.root / "checkpoints"
        final = folder / f"iteration_{iteration:06d}"
        state = {"format_version": FORMAT_VERSION, "iteration": iteration, "score": score, "score_error": score_error}
        try:
            remove_partial(folder)
            with atomic_folder(final) as temporary:
                write(temporary)
                write_json(temporary / "state.json", state)
                write_manifest(temporary)
        except OSError as error:
            raise UserError(
                f"cannot write checkpoint {final}: {error.strerror or error}; free space there and "
                "continue with --resume"
            ) from error
        return Checkpoint(final, iteration, score, score_error)

    def checkpoints(self) -> list[Checkpoint]:
        """Good checkpoints, oldest first; damaged ones are warned of and left out."""
        good = []
        for path in sorted((self.root / "checkpoints").glob("iteration_*")):
            problem = integrity_error(path)
            if problem is None:
                state = json.loads((path / "state.json").read_text("utf-8"))
                good.append(Checkpoint(path, state["iteration"], state["score"], state.get("score_error", 0.0)))
            else:
                warnings.warn(f"checkpoint {path} is left out: {problem}", stacklevel=2)
        return good

    def latest(self) -> Checkpoint | None:
        """The newest good checkpoint; None when none was written yet.

        Raises:
            UserError: there are checkpoints, and every one is damaged.
        """
        good = self.checkpoints()
        if good:
            return good[-1]
        if any((self.root / "checkpoints").glob("iteration_*")):
            raise UserError(
                f"every checkpoint in {self.root / 'checkpoints'} is damaged: start again in a new "
                "run folder with --run-dir"
            )
        return None

    def set_aside_after(self, iteration: int) -> None:
        """Renames checkpoints after `iteration` (damaged ones) to `.damaged_*`, out of the way."""
        folder = self.root / "checkpoints"
        for path in folder.glob("iteration_*"):
            if int(path.name.removeprefix("iteration_")) > iteration:
                target = folder / f".damaged_{path.name}_{time.time_ns()}"
                path.rename(target)

    def prune(self, keep: int) -> None:
        """Removes all good checkpoints but the newest `keep`, the chosen, and the one of the highest score."""
        good = self.checkpoints()
        kept = {c.path for c in (*good[-keep:], choose(good), _highest(good)) if c is not None}
        for checkpoint in good:
            if checkpoint.path not in kept:
                shutil.rmtree(checkpoint.path, ignore_errors=True)


def choose(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The last checkpoint whose validation score lies within one standard error of the highest; the last one where none
    has a score.

    Which of many checkpoints of equal worth scores highest is chance (the one-standard-error rule, Breiman et al. 1984,
    3.4.3). The later ones have been trained for longer, and with less exploration.
    """
    top = _highest(checkpoints)
    if top is None or top.score is None:
        return checkpoints[-1] if checkpoints else None
    return [c for c in checkpoints if c.score is not None and c.score >= top.score - top.score_error][-1]


def _highest(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the highest score, the latest on a tie; None where none has a score."""
    scored = [c for c in checkpoints if c.score is not None]
    return max(scored, key=lambda c: (c.score, c.iteration)) if scored else None


def newest_run(folder: Path) -> RunFolder:
    """The run folder under `folder` that was begun last.

    Raises:
        UserError: there is none.
    """
    runs = newest_runs(folder)
    if not runs:
        raise UserError(f"no run folder under {folder}: train first with 'ray-ctrl train'")
    return runs[0]


def newest_runs(folder: Path) -> list[RunFolder]:
    """Run folders under `folder`, the one begun last first."""
    found = [path for path in folder.glob("*/run.json") if (path.parent / "config.yaml").is_file()]
    return [RunFolder(path.parent) for path in sorted(found, key=lambda path: -path.stat().st_mtime_ns)]


@contextmanager
def removed_if_vain(folder: Path, errors: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Removes a folder made for what runs inside where that ends by one of `errors`."""
    try:
        yield
    except errors:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def free_folder(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _whole_lines(path: Path) -> Iterator[Metrics]:
    text = path.read_text("utf-8", errors="replace")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "iteration" in entry:
            yield entry
