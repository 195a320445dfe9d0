"""Checkpoints of a run: complete or refused, and learners and runners that really contain what was restored.

They are RLlib's own (pickle): load only those of your own runs. To pass a controller on, use `Controller.save`.
"""

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
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
from envs.files import integrity_error
from policies.controller import Controller
from policies.grpo.config import ControllerSettings
from policies.grpo.rllib_adapter import each_learner

if TYPE_CHECKING:
    from policies.grpo.algorithm import GRPO

PREFIX: Final = "controller."


def restore_checkpoint(algorithm: "GRPO", folder: str | os.PathLike[str]) -> None:
    """Bring an algorithm built from the run's configuration to the state saved in `folder`.

    Raises:
        UserError: missing, incomplete, corrupt or foreign files.
    """
    algorithm.restore_from_path(Path(folder).absolute())


def verify(folder: Path) -> None:
    """Check every file against the manifest before anything is unpickled.

    Raises:
        UserError: no such checkpoint, an incomplete one, or a changed file.
    """
    problem = integrity_error(folder)
    if problem is not None:
        raise UserError(f"{folder} is not a usable checkpoint: {problem}; resume from an older one")


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
    """Prove that a checkpoint just written contains the learners' state: RLlib passes over remote ones that failed.

    Raises:
        OSError: it does not; with the cause, as far as a learner knows it.
        ray.exceptions.RayActorError: a learner died.
    """
    answers = each_learner(group, lambda learner: (learner.failed_write, learner.state_checksum()))
    causes = [failed for failed, _ in answers if failed is not None]
    if causes:
        raise OSError(f"a learner could not write its part: {_one_line(causes[0])}")
    try:
        found = written_by_learner(folder)
    except Exception as error:  # Unpickling half a file may raise anything.
        raise OSError(f"the learner's part cannot be read back ({type(error).__name__}: {_one_line(error)})") from error
    if found not in [checksum for _, checksum in answers]:
        raise OSError("the learner's part, read back, is not what the learner contains")


def check_learners(group: LearnerGroup, folder: Path) -> None:
    """After a restore, prove that every learner has the checkpoint's state: RLlib passes over those that failed.

    Raises:
        UserError: a learner that does not.
        ray.exceptions.RayActorError: a learner died.
    """
    wanted = written_by_learner(folder)
    found = each_learner(group, lambda learner: learner.state_checksum())
    wrong = [str(index) for index, checksum in enumerate(found) if checksum != wanted]
    if wrong:
        raise UserError(
            f"learners {', '.join(wrong)} do not contain what is in checkpoint {folder}: resume with the configuration "
            "and versions it was saved with, on nodes that see the folder"
        )


def written_by_learner(folder: Path) -> str:
    """Checksum of a checkpoint's weights, reference and optimizer state, as `GRPOLearner.state_checksum` makes it.

    Raises:
        Exception: a file that is missing or damaged.
    """
    place = folder / COMPONENT_LEARNER_GROUP / COMPONENT_LEARNER
    optimizer = pickle.loads((place / "state.pkl").read_bytes())[COMPONENT_OPTIMIZER]
    module = pickle.loads((place / COMPONENT_RL_MODULE / DEFAULT_MODULE_ID / "module_state.pkl").read_bytes())
    return state_checksum({COMPONENT_RL_MODULE: {DEFAULT_MODULE_ID: module}, COMPONENT_OPTIMIZER: optimizer})


def check_runners(algorithm: "GRPO") -> None:
    """After a restore, give every runner the learner's weights, and prove it.

    Raises:
        UserError: a runner that does not, or gives no answer within the timeout.
    """
    weights = algorithm.weights()
    state = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
    wanted, timeout_s = fingerprint(state), algorithm.config.timeouts.sample_timeout_s

    def load(runner: Any) -> tuple[int, str]:
        runner.load_weights(weights)
        return runner.worker_index, fingerprint(runner.module.get_state())

    for group in (algorithm.env_runner_group, algorithm.eval_env_runner_group):
        if group is None:
            continue
        answers = group.foreach_env_runner(load, timeout_seconds=timeout_s)
        wrong = [str(index) for index, found in answers if found != wanted]
        remote = sum(1 for index, _ in answers if index)
        if wrong or remote < group.num_healthy_remote_env_runners():
            raise UserError(
                f"env runners {', '.join(wrong) or 'without an answer'} do not have the restored weights after "
                f"{timeout_s:g} s: start the run again"
            )


def fingerprint(state: Mapping[str, Any]) -> str:
    """Checksum of a module's inference weights."""
    return state_checksum({name: value for name, value in state.items() if name.startswith(PREFIX)})


def controller_from(state: Mapping[str, Any], settings: ControllerSettings) -> Controller:
    """The plain controller inside an RLlib module's state."""
    tensors = {
        name.removeprefix(PREFIX): torch.as_tensor(np.array(value))
        for name, value in state.items()
        if name.startswith(PREFIX)
    }
    controller = Controller(tensors["stage1.trunk.norms.0.weight"].shape[0], settings.hidden, settings.without)
    controller.load_state_dict(tensors)
    return controller.eval()


def _one_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def state_checksum(tree: Any) -> str:
    """Checksum of all arrays and tensors in nested mappings and lists, with their places; the rest is left out.

    Processes and checkpoints compare what they contain by it, without sending it around.
    """
    found = hashlib.sha256()
    for place, array in _arrays(tree, ""):
        found.update(f"{place} {array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _arrays(tree: Any, place: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    if isinstance(tree, torch.Tensor):
        yield place, tree.detach().cpu().numpy()
    elif isinstance(tree, np.ndarray | np.generic):
        yield place, np.asarray(tree)
    elif isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from _arrays(tree[key], f"{place}/{key}")
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        for index, value in enumerate(tree):
            yield from _arrays(value, f"{place}/{index}")
