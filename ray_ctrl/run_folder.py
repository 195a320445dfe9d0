"""The run folder: configuration, origin, metrics, checkpoints, exported controller.

    config.yaml  run.json  inputs.json  metrics.jsonl  tensorboard/  checkpoints/iteration_000010/  controller/

Nothing in it is overwritten silently, and one process writes to it at a time. Checkpoints are complete or absent, with
a manifest of checksums: a damaged one is recognized and the one before it is used.
"""

import fcntl
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.resources import check_outlives_job
from envs.errors import UserError
from envs.files import (
    atomic_folder,
    atomic_write,
    integrity_error,
    remove_partial,
    short_path,
    write_json,
    write_manifest,
)
from ray_ctrl.config import Config
from ray_ctrl.load_config import load_config, to_yaml
from ray_ctrl.provenance import provenance

FORMAT_VERSION = 1
LOCK = ".lock"
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One good checkpoint: its folder, the iterations done, validation score (if any) and its standard error."""

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
            UserError: the folder exists and is not empty, or cannot be written; an unreadable file of block importance.
        """
        from envs.model.block_importance import read_importance

        cls.refuse(root)
        importance = read_importance(config.model.name, config.model.block_importance)
        started = {"format_version": FORMAT_VERSION, "seed": config.run.seed, **provenance()}
        started |= {"importance": importance, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with explained(root):
            root.mkdir(parents=True, exist_ok=True)
            atomic_write(root / "config.yaml", to_yaml(config))
            write_json(root / "run.json", started)
        return cls(root)

    @staticmethod
    def refuse(root: Path) -> None:
        """Raises a UserError if `root` exists and is not an empty folder, or will be removed with a Ray job."""
        check_outlives_job(root)
        with explained(root):
            taken = root.is_file() or (root.is_dir() and any(path.name != LOCK for path in root.iterdir()))
        if taken:
            raise UserError(
                f"run folder {root} exists already: continue it with --resume, or choose another with --run-dir"
            )

    @classmethod
    def open(cls, root: Path) -> "RunFolder":
        """An existing run folder.

        Raises:
            UserError: there is none at `root`.
        """
        with explained(root, "give a run folder", verb="read"):
            found = (root / "config.yaml").is_file() and (root / "run.json").is_file()
        if not found:
            raise UserError(f"{root} is not a run folder: it has no config.yaml and run.json")
        return cls(root)

    @property
    def config(self) -> Config:
        return load_config(None, self.root / "config.yaml")

    def check_importance(self) -> None:
        """Refuses to continue with other block importance: the same knobs would mean other blocks than before.

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
        own = importance_path(model.name)
        source = model.block_importance or (own if own.is_file() else "the published scores")
        raise UserError(
            f"block importance cannot change when a run is resumed: in {source} the score of block {block} is "
            f"{now[block]}, and {self.root} began with {began[block]}; restore the scores in its run.json, or start a "
            "new run"
        )

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Records checksums of weights and data in a new run; a resumed run must find the same.

        Raises:
            UserError: naming what changed.
        """
        path = self.root / "inputs.json"
        if not path.is_file():
            write_json(path, dict(inputs))
            return
        began = json.loads(path.read_text("utf-8"))
        changed = [name for name, digest in inputs.items() if began.get(name, digest) != digest]
        if changed:
            raise UserError(
                f"{', '.join(changed)} cannot change when a run is resumed: the content is not what {self.root} began "
                "with; restore it, or start a new run"
            )

    def finished(self, iterations: int) -> bool:
        """Whether nothing is left to do: all iterations done, the controller exported and evaluated."""
        latest = self.latest()
        evaluated = self.controller.is_dir() and any(self.root.glob("evaluation*/summary.json"))
        return latest is not None and latest.iteration >= iterations and evaluated

    @property
    def controller(self) -> Path:
        """Where the chosen controller is exported."""
        return self.root / "controller"

    # -- metrics ------------------------------------------------------------------------------

    def append_metrics(self, metrics: Metrics) -> None:
        """Adds one iteration as a line of JSON, in one write.

        Raises:
            UserError: the disk refuses; every reader skips a half-written line.
        """
        path = self.root / "metrics.jsonl"
        with explained(path, "free space there and continue with --resume"), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[Metrics]:
        """All complete lines; a torn last line (the process died while writing it) is left out."""
        path = self.root / "metrics.jsonl"
        rows = []
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "iteration" in row:
                    rows.append(row)
        return rows

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
        with explained(final, "free space there and continue with --resume", "checkpoint "):
            remove_partial(folder)
            with atomic_folder(final) as temporary:
                write(temporary)
                write_json(temporary / "state.json", state)
                write_manifest(temporary)
        return Checkpoint(final, iteration, score, score_error)

    def checkpoints(self) -> list[Checkpoint]:
        """Good checkpoints, oldest first; a damaged one is left out with a warning."""
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
                f"every checkpoint in {self.root / 'checkpoints'} is damaged: start again in a new run folder with "
                "--run-dir"
            )
        return None

    def discard_after(self, iteration: int) -> None:
        """Renames checkpoints after `iteration` (damaged ones) to `.damaged_*`, out of the way."""
        folder = self.root / "checkpoints"
        for path in folder.glob("iteration_*"):
            if int(path.name.removeprefix("iteration_")) > iteration:
                target = folder / f".damaged_{path.name}_{time.time_ns()}"
                path.rename(target)

    def prune(self, keep: int) -> None:
        """Removes all good checkpoints but the newest `keep`, the chosen, and the one of the highest score."""
        good = self.checkpoints()
        kept = {c.path for c in (*good[-keep:], select_checkpoint(good), _highest(good)) if c is not None}
        for checkpoint in good:
            if checkpoint.path not in kept:
                shutil.rmtree(checkpoint.path, ignore_errors=True)


def select_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The last checkpoint whose validation score is within one standard error of the highest; the last one without
    scores.

    Which of many equally good checkpoints scores highest is chance (the one-standard-error rule, Breiman et al. 1984,
    3.4.3). Later ones were trained for longer, and with less exploration.
    """
    top = _highest(checkpoints)
    if top is None or top.score is None:
        return checkpoints[-1] if checkpoints else None
    return [c for c in checkpoints if c.score is not None and c.score >= top.score - top.score_error][-1]


def _highest(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the highest score, the latest on a tie; None without scores."""
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
def remove_on_error(folder: Path, *errors: type[BaseException]) -> Iterator[None]:
    """Removes a new folder if the block, for which it was made, raises one of `errors`."""
    try:
        yield
    except errors:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def locked(root: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Takes the folder's lock, which the kernel releases when the process ends, however it ends.

    Raises:
        UserError: another process has it for longer than `wait_s` seconds, or the folder cannot be written.
    """
    with explained(root):
        file = (root / LOCK).open("w")
    with file:
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise UserError(
                        f"run folder {root} is in use by another process: wait until it ends, or choose another with "
                        "--run-dir"
                    ) from None
                time.sleep(0.1)
        yield


@contextmanager
def explained(
    path: Path, advice: str = "give a folder that can be written", what: str = "", verb: str = "write"
) -> Iterator[None]:
    """Turns what the file system refuses inside (full, read-only, a name too long) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {verb} {what}{short_path(path)}: {error.strerror or error}; {advice}") from error


def check_writable(folder: Path) -> None:
    """Finds out before the work whether its result can be saved in `folder`, which is made if missing.

    Raises:
        UserError: it cannot.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writable-", dir=folder)
        os.close(handle)
        os.unlink(name)


def claim_folder(path: Path) -> Path:
    """Makes `path`, or the first of `path-2`, `path-3`, ... that does not exist: two processes never get the same."""
    while True:
        free = free_folder(path)
        with explained(free), suppress(FileExistsError):
            free.mkdir(parents=True)
            return free


def free_folder(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
