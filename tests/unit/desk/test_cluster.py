"""Package origins and addresses, without starting Ray."""

import sys
from pathlib import Path

import pytest

from cluster.connect import ConnectError, connect, is_local
from cluster.origin import MARKERS, wrong_origin
from cluster.resources import resource_plan

ROOT = Path(__file__).resolve().parents[3]


def test_all_packages_come_from_here() -> None:
    assert wrong_origin() is None
    for package, marker in MARKERS.items():
        assert (ROOT / package / marker).is_file()


def test_a_stranger_of_the_same_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = tmp_path / "stranger_envs"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = wrong_origin({"stranger_envs": "knobs.py"})
    assert message is not None
    assert str(stranger) in message
    assert "uninstall" in message
    assert "cannot be found" in (wrong_origin({"no_such_package_here": "x.py"}) or "")
    assert "stranger_envs" not in sys.modules


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert is_local("auto")
    assert is_local("local")
    assert not is_local("10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not is_local("auto")


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:9", "no Ray cluster answers at"), ("nonsense", "not understood")],
)
def test_unreachable_cluster_is_one_line_within_the_timeout(address: str, words: str) -> None:
    plan = resource_plan(
        runners=0,
        runner_cpus=1,
        runner_gpus=0,
        learners=0,
        learner_cpus=1,
        learner_gpus=0,
        evaluation_runners=0,
    )
    with pytest.raises(ConnectError, match=words), connect(address, plan, timeout_s=2.0):
        pass


def test_an_address_is_looked_at_even_where_ray_runs_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    test_unreachable_cluster_is_one_line_within_the_timeout("127.0.0.1:9", "no Ray cluster answers at")
