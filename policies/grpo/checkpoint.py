"""Checkpoints of a run: written aside and renamed, complete or refused, and runners that really hold the weights.

They are RLlib's own (pickle): load only those of your own runs. To pass a controller on, use `Controller.save`.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import ray
import torch
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_OPTIMIZER,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.learner.learner_group import LearnerGroup

from envs.errors import UserError
from policies.controller import Controller
from policies.grpo.digests import digest
from policies.grpo.learner import each_learner

if TYPE_CHECKING:
    from policies.grpo.algorithm import GRPO

MANIFEST: Final = "manifest.json"
CHECK_TIMEOUT_S: Final = 120.0
PREFIX: Final = "controller."


def save_checkpoint(algorithm: "GRPO", folder: str | os.PathLike[str]) -> Path:
    """Save a run's state to a new folder; a reader sees all of it or none.

    Raises:
        UserError: the folder exists, or cannot be written (nothing is left behind then).
    """
    target = Path(folder).absolute()
    if target.exists():
        raise UserError(f"checkpoint folder {target} exists already: choose another or remove it first")
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        algorithm.save_to_path(aside)
        os.replace(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"checkpoint could not be written to {target}: {error.strerror or error}") from error
    return target


def restore_checkpoint(algorithm: "GRPO", folder: str | os.PathLike[str]) -> None:
    """Bring an algorithm built from the run's configuration to the state saved in `folder`.

    Raises:
        UserError: missing, incomplete, corrupt or foreign files.
    """
    algorithm.restore_from_path(Path(folder).absolute())


def write_manifest(folder: Path) -> None:
    """Record the checksum of every file; the last file written, so a checkpoint without it is incomplete."""
    digests = {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(digests, indent=2) + "\n")
    os.replace(partial, folder / MANIFEST)


def verify(folder: Path) -> None:
    """Check every file against the manifest before anything is unpickled.

    Raises:
        UserError: no such checkpoint, an incomplete one, or a changed file.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        items = dict(digests).items()
    except OSError as error:
        raise UserError(
            f"{folder} is not a complete checkpoint ({MANIFEST}: {error.strerror}): give a folder that a run saved"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is corrupt: resume from an older checkpoint") from error
    for name, expected in items:
        path = folder / name
        if not path.is_file() or _digest(path) != expected:
            state = "corrupt" if path.is_file() else "missing"
            raise UserError(f"checkpoint file {path} is {state}: resume from an older checkpoint")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is loaded into one line."""
    try:
        yield
    except (UserError, ray.exceptions.RayActorError):
        raise
    except Exception as error:
        raise UserError(
            f"checkpoint {folder} does not fit this run ({type(error).__name__}: {_one_line(error)}): "
            "resume with the configuration and versions it was saved with"
        ) from error


def check_written(group: LearnerGroup, folder: Path) -> None:
    """Prove that a checkpoint just written holds what the learners hold: RLlib passes over remote ones that failed.

    Raises:
        OSError: it does not; with the cause, as far as a learner knows it.
        ray.exceptions.RayActorError: a learner died.
    """
    answers = each_learner(group, lambda learner: (learner.failed_write, learner.held()))
    causes = [failed for failed, _ in answers if failed is not None]
    if causes:
        raise OSError(f"a learner could not write its part: {_one_line(causes[0])}")
    try:
        found = written_by_learner(folder)
    except Exception as error:  # Unpickling half a file may raise anything.
        raise OSError(f"the learner's part cannot be read back ({type(error).__name__}: {_one_line(error)})") from error
    if found not in [held for _, held in answers]:
        raise OSError("the learner's part, read back, is not what the learner holds")


def check_learners(group: LearnerGroup, folder: Path) -> None:
    """After a restore, prove that every learner holds what the checkpoint does: RLlib passes over those that failed.

    Raises:
        UserError: a learner that does not.
        ray.exceptions.RayActorError: a learner died.
    """
    wanted = written_by_learner(folder)
    wrong = [str(index) for index, held in enumerate(each_learner(group, lambda one: one.held())) if held != wanted]
    if wrong:
        raise UserError(
            f"learners {', '.join(wrong)} do not hold what is in checkpoint {folder}: resume with the configuration "
            "and versions it was saved with, on nodes that see the folder"
        )


def written_by_learner(folder: Path) -> str:
    """Checksum of a checkpoint's weights, reference and optimizer state, as `GRPOLearner.held` makes it.

    Raises:
        Exception: a file that is missing or damaged.
    """
    place = folder / COMPONENT_LEARNER_GROUP / COMPONENT_LEARNER
    optimizer = pickle.loads((place / "state.pkl").read_bytes())[COMPONENT_OPTIMIZER]
    module = pickle.loads((place / COMPONENT_RL_MODULE / DEFAULT_MODULE_ID / "module_state.pkl").read_bytes())
    return digest({COMPONENT_RL_MODULE: {DEFAULT_MODULE_ID: module}, COMPONENT_OPTIMIZER: optimizer})


def check_runners(algorithm: "GRPO") -> None:
    """After a restore, make every runner hold the learner's weights, and prove it.

    Raises:
        UserError: a runner that does not, or gives no answer in time.
    """
    weights = algorithm.weights()
    state = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
    wanted = fingerprint(state)

    def load(runner: Any) -> tuple[int, str]:
        runner.load_weights(weights)
        return runner.worker_index, fingerprint(runner.module.get_state())

    for group in (algorithm.env_runner_group, algorithm.eval_env_runner_group):
        if group is None:
            continue
        answers = group.foreach_env_runner(load, timeout_seconds=CHECK_TIMEOUT_S)
        wrong = [str(index) for index, found in answers if found != wanted]
        remote = sum(1 for index, _ in answers if index)
        if wrong or remote < group.num_healthy_remote_env_runners():
            raise UserError(
                f"env runners {', '.join(wrong) or 'without an answer'} do not hold the restored weights after "
                f"{CHECK_TIMEOUT_S:g} s: start the run again"
            )


def fingerprint(state: Mapping[str, Any]) -> str:
    """Checksum of a module's inference weights."""
    return digest({name: value for name, value in state.items() if name.startswith(PREFIX)})


def controller_from(state: Mapping[str, Any], hidden: int) -> Controller:
    """The plain controller inside an RLlib module's state."""
    tensors = {
        name.removeprefix(PREFIX): torch.as_tensor(np.array(value))
        for name, value in state.items()
        if name.startswith(PREFIX)
    }
    controller = Controller(tensors["stage1.trunk.norms.0.weight"].shape[0], hidden)
    controller.load_state_dict(tensors)
    return controller.eval()


def _one_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
