"""What a remote learner writes of a checkpoint is read back: RLlib itself never looks at what came of it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from envs.errors import UserError
from policies.grpo import checkpoint
from policies.grpo.checkpoint import state_checksum
from policies.grpo.learner import GRPOLearner

WEIGHTS = {"controller.weight": np.arange(6, dtype=np.float32), "reference.weight": np.ones(3, np.float32)}
OPTIMIZER = {"adam": {"state": {0: {"step": np.float32(2), "exp_avg": np.zeros(3, np.float32)}}, "param_groups": []}}


class Group:
    """Learners as a learner group has them; an answer that is an exception is one that never came."""

    def __init__(self, *learners: Any) -> None:
        self.learners = learners

    def foreach_learner(self, ask: Callable[[Any], Any], **how: Any) -> list[Any]:
        # Those that failed before must be asked as well.
        assert how == {"healthy_only": False, "mark_healthy": True}
        return [self._answer(learner, ask) for learner in self.learners]

    def _answer(self, learner: Any, ask: Callable[[Any], Any]) -> Any:
        if isinstance(learner, Exception):
            return SimpleNamespace(ok=False, get=lambda: learner)
        return SimpleNamespace(ok=True, get=lambda: ask(learner))


def learner(failed_write: str | None = None, **changes: Any) -> Any:
    held = state_checksum({"rl_module": {"default_policy": WEIGHTS | changes}, "optimizer": OPTIMIZER})
    return SimpleNamespace(failed_write=failed_write, state_checksum=lambda: held)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "learner_group" / "learner"
    module = place / "rl_module" / "default_policy"
    module.mkdir(parents=True)
    (place / "state.pkl").write_bytes(pickle.dumps({"optimizer": OPTIMIZER, "weights_seq_no": 3}))
    (module / "module_state.pkl").write_bytes(pickle.dumps(WEIGHTS))
    return tmp_path


def test_what_was_written_and_read_completely_passes(folder: Path) -> None:
    checkpoint.check_written(Group(learner(), learner()), folder)
    checkpoint.check_learners(Group(learner(), learner()), folder)


def test_a_learners_own_reason_is_named(folder: Path) -> None:
    failed = learner("OSError: [Errno 28] No space left on device")
    with pytest.raises(OSError, match=r"could not write its part: OSError: .*No space left on device"):
        checkpoint.check_written(Group(failed), folder)


@pytest.mark.parametrize("name", ["state.pkl", "rl_module/default_policy/module_state.pkl"])
@pytest.mark.parametrize("left", [None, 0, 50])
def test_missing_and_half_files_are_noticed(folder: Path, name: str, left: int | None) -> None:
    path = folder / "learner_group" / "learner" / name
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(content[:left])
    with pytest.raises(OSError, match=r"cannot be read back \(\w+: .+\)$"):
        checkpoint.check_written(Group(learner()), folder)


def test_other_numbers_than_the_learners_are_noticed(folder: Path) -> None:
    other = learner(**{"reference.weight": np.zeros(3, np.float32)})
    with pytest.raises(OSError, match="is not what the learner contains"):
        checkpoint.check_written(Group(other), folder)
    with pytest.raises(UserError, match="learners 1 do not contain what is in checkpoint"):
        checkpoint.check_learners(Group(learner(), other), folder)


def test_a_learner_that_died_is_not_taken_for_a_failed_write(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        checkpoint.check_written(Group(ZeroDivisionError()), folder)


def test_a_learner_remembers_why_it_could_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    one = GRPOLearner.__new__(GRPOLearner)
    with monkeypatch.context() as patch:
        patch.setattr("ray.rllib.core.learner.torch.torch_learner.TorchLearner.save_to_path", full)
        with pytest.raises(OSError, match="No space left"):
            one.save_to_path("somewhere")
    assert one.failed_write == "OSError: [Errno 28] No space left on device"
    monkeypatch.setattr("ray.rllib.core.learner.torch.torch_learner.TorchLearner.save_to_path", lambda *_: "there")
    assert one.save_to_path("somewhere") == "there"
    assert one.failed_write is None


def test_checksums_see_every_array_and_where_it_is() -> None:
    complete = {"a": np.zeros(2), "b": [np.ones(1)]}
    assert state_checksum(complete) == state_checksum({"b": [np.ones(1)], "a": np.zeros(2)})
    others = ({"a": np.zeros(2)}, {"b": np.zeros(2), "a": [np.ones(1)]}, {"a": np.zeros((2, 1)), "b": [np.ones(1)]})
    assert len({state_checksum(other) for other in (complete, *others)}) == 4
