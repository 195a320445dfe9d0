"""Package origins and addresses, without starting Ray."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.connect import ConnectError, connect, is_local
from cluster.package_check import MARKERS, package_conflict, worker_conflict
from cluster.resources import ResourcePlan, assigned_device, resource_plan
from envs.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def test_all_packages_come_from_here() -> None:
    assert package_conflict() is None
    for package, marker in MARKERS.items():
        assert (ROOT / package / marker).is_file()


def test_a_stranger_of_the_same_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = tmp_path / "stranger_envs"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = package_conflict({"stranger_envs": "knobs.py"})
    assert message is not None
    assert str(stranger) in message
    assert "uninstall" in message
    assert "rename stranger_envs" in message
    assert "is not installed" in (package_conflict({"no_such_package_here": "x.py"}) or "")
    assert "stranger_envs" not in sys.modules


def test_a_users_folder_that_hides_a_package_on_workers_is_named_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker_conflict() is None
    (tmp_path / "policies.py").write_text("", encoding="utf-8")
    assert f"rename policies.py in {tmp_path}" in (worker_conflict([tmp_path]) or "")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConnectError, match=r"package 'policies' is imported from .*rename policies.py"),
        connect("local", plan(), timeout_s=5),
    ):
        pass


def test_the_command_names_a_package_that_hides_its_own(tmp_path: Path) -> None:
    """Instead of `No module named 'envs.errors'`."""
    for name in ("envs", "cluster"):
        folder = tmp_path / name / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("", encoding="utf-8")
        path = os.pathsep.join((str(folder.parent), str(ROOT)))
        done = subprocess.run(
            [sys.executable, "-m", "ray_ctrl", "--version"], cwd=folder.parent, capture_output=True, text=True,
            timeout=60, check=False, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 2
        assert f"package '{name}' is imported from {folder}" in done.stderr
        assert "rename" in done.stderr
        assert done.stderr.count("\n") == 1


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert is_local("auto")
    assert is_local("local")
    assert not is_local("10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not is_local("auto")
    assert is_local("local")
    for ours in ("local", ""):
        monkeypatch.setenv("RAY_ADDRESS", ours)
        assert is_local("auto")


def plan(**changed: float) -> ResourcePlan:
    roles = {"runners": 0, "runner_cpus": 1, "runner_gpus": 0, "learners": 0, "learner_cpus": 1, "learner_gpus": 0}
    return resource_plan(**{**roles, "evaluation_runners": 0, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at"),
        ("ray://[::1]:9", "no Ray cluster answers at"),
        ("nonsense", "not understood"),
        ("127.0.0.1:99999", "not understood"),
        ("ray://h:x", "not understood"),
        ("[::1", "not understood"),
    ],
)
def test_unreachable_cluster_is_one_line_within_the_timeout(address: str, words: str) -> None:
    with pytest.raises(ConnectError, match=words), connect(address, plan(), timeout_s=2.0):
        pass


def test_an_address_is_looked_at_even_where_ray_runs_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    test_unreachable_cluster_is_one_line_within_the_timeout("127.0.0.1:9", "no Ray cluster answers at")


def test_resources_are_waited_for_where_ray_runs_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    shut: list[bool] = []
    monkeypatch.setattr("ray.shutdown", lambda: shut.append(True))
    missing = pytest.raises(ConnectError, match="2 CPUs needed, 1 available")
    with missing, connect("auto", plan(runners=2), timeout_s=0.1):
        pass
    with connect("auto", plan(runners=1), timeout_s=0.1) as there:
        assert there == {"CPU": 1.0}
    assert not shut, "a connection that was there before is left"


def test_a_start_that_hangs_ends_within_the_timeout_and_hears_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cluster.connect.MIN_INIT_S", 0.2)
    never = threading.Event()
    monkeypatch.setattr("ray.init", lambda **_: never.wait(30))
    with pytest.raises(ConnectError, match=r"a local Ray gave no answer within 0.2 s"):
        connect("local", plan(), timeout_s=0.1).__enter__()
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    monkeypatch.setattr("cluster.connect.MIN_INIT_S", 30.0)
    with pytest.raises(KeyboardInterrupt):
        connect("local", plan(), timeout_s=0.1).__enter__()
    never.set()


@pytest.mark.parametrize(
    ("assigned", "visible", "device"),
    [
        ([], None, "cpu"),  # Ray leaves an actor without GPUs all of the node's
        ([], "0,1,2,3", "cpu"),
        (["2"], "2", "cuda:0"),  # Ray narrowed the view
        (["2", "3"], "2,3", "cuda:0"),
        (["2"], "0,1,2,3", "cuda:2"),  # the user forbade Ray to narrow it: runners must not pile up on the first
        (["5"], "4,5", "cuda:1"),
        (["3"], None, "cuda:3"),
        (["GPU-a"], "GPU-b,GPU-a", "cuda:1"),
        (["GPU-a"], None, "cuda"),
        (["7"], "GPU-b", "cuda:0"),
    ],
)
def test_a_process_uses_the_gpu_that_ray_gave_it(assigned: list[str], visible: str | None, device: str) -> None:
    assert assigned_device(assigned, visible) == device


def test_learners_that_share_a_gpu_are_refused() -> None:
    with pytest.raises(UserError, match=r"runners.learner_gpus = 0.5 with runners.learners = 2 is not allowed"):
        plan(learners=2, learner_gpus=0.5)
    assert plan(learners=1, learner_gpus=0.5).gpus == 0.5
    assert plan(learners=2, learner_gpus=0).gpus == 0
