"""The doctor finds what is wrong, says how to fix it, and returns an exit status."""

import json
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from envs.errors import UserError
from ray_ctrl.commands import doctor
from ray_ctrl.commands.doctor import Finding
from ray_ctrl.load_config import load_config

ROOT = Path(__file__).resolve().parents[3]
SMOKE = load_config("smoke")


def findings(check: str, *overrides: str, quick: bool = True) -> list[Finding]:
    return [f for f in doctor.examine(load_config("smoke", overrides=overrides), quick=quick) if f.check == check]


def test_the_command_tells_by_its_exit_status(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ray_ctrl", "doctor", "--quick", "--json", "model.name=" + str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    names = {f["check"] for f in found}
    assert {"python", "packages", "origins", "device", "network", "ports", "run folder", "model", "task"} <= names
    wrong = [f for f in found if f["level"] == "wrong"]
    assert [f["check"] for f in wrong] == ["model"]
    assert all(f["fix"] for f in wrong)


def test_packages_of_a_wrong_version_and_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: ["numpy<1", "surely-not-installed>=2", "pyyaml>=6"])
    (found,) = list(doctor.dependencies(SMOKE))
    assert found.level == "wrong"
    assert "surely-not-installed is missing" in found.seen
    assert "does not meet <1" in found.seen
    assert "pip install" in found.fix


def test_this_environment_has_what_is_required() -> None:
    (found,) = list(doctor.dependencies(SMOKE))
    assert found.level == "ok", found
    assert len(doctor.requirements()) > 10


def test_ports_in_use_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "RAY_PORTS", {port: "a test"})
        (found,) = list(doctor.ports(SMOKE))
    assert found.level == "note"
    assert f"{port} (a test)" in found.seen
    (found,) = list(doctor.ports(SMOKE))
    assert found.level == "ok"


@pytest.mark.parametrize(
    ("mode", "token", "level"),
    [("disabled", None, "ok"), ("token", "secret", "ok"), ("token", None, "wrong"), ("maybe", None, "wrong")],
)
def test_authentication(
    mode: str, token: str | None, level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    (found,) = list(doctor.authentication(SMOKE))
    assert found.level == level
    assert token is None or token not in found.seen


def test_a_token_that_ray_would_pick_up_by_itself_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (found,) = list(doctor.authentication(SMOKE))
    assert found.level == "note"
    assert "secret" not in found.seen


def test_threads_may_be_a_list_of_nested_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("smoke", overrides=["runners.count=2", "model.threads=1"])
    for value, levels in (("1", ["ok"]), ("4,2", ["ok", "note"]), ("1,2", ["ok"]), ("many", ["ok", "note"])):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert [f.level for f in doctor.devices(config) if "NVIDIA" not in f.seen] == levels, value


def test_invalid_rows_are_treated_as_the_run_treats_them(tmp_path: Path) -> None:
    rows = [json.dumps({"question": f"q{i}?", "answer": str(i)}) for i in range(40)] + ["{broken"]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows), encoding="utf-8")
    name = f"task.name={tmp_path / 'mine.jsonl'}"
    assert [f.level for f in findings("task", name, "task.on_invalid_row=refuse")] == ["wrong"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [f.level for f in findings("task", name, "task.on_invalid_row=skip")] == ["ok"]


def test_the_configured_revision_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def inspect_model(*given: object) -> object:
        asked.extend(given)
        raise UserError("stop: here")

    monkeypatch.setattr("envs.model.inspect.inspect_model", inspect_model)
    findings("model", "model.name=some/model", "model.revision=0123456")
    assert asked == ["some/model", "0123456"]


def test_a_folder_of_the_users_that_hides_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (found,) = findings("origins")
    assert found.level == "wrong"
    assert str(tmp_path / "envs") in found.seen
    assert "rename envs" in found.fix


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": 10**8, "total": 10**13})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    found = list(doctor.disks(load_config("smoke", overrides=[f"run.folder={tmp_path}/runs/deep"])))
    assert ("run folder", "wrong") in {(f.check, f.level) for f in found}
    assert any("Ray refuses to write" in f.seen for f in found)


def test_settings_that_do_not_fit_this_machine() -> None:
    (found,) = findings("resources", "runners.count=4000", "grpo.groups_per_iteration=4000")
    assert found.level == "wrong"
    assert "is too small for this run" in found.seen
    assert found.fix


def test_a_store_on_a_network_file_system_or_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config("smoke", overrides=[f"store.path={tmp_path / 'outcomes.sqlite'}"])
    assert [f.level for f in doctor.store(config)] == ["ok"]
    monkeypatch.setattr(doctor, "_file_system", lambda _: "nfs4")
    assert "network file system (nfs4)" in next(iter(doctor.store(config))).seen
    monkeypatch.undo()
    (tmp_path / "outcomes.sqlite").write_bytes(b"no store at all" * 100)
    (found,) = findings("store", f"store.path={tmp_path / 'outcomes.sqlite'}")
    assert found.level == "wrong"


def test_a_check_that_raises_is_a_finding() -> None:
    def broken(config: object) -> None:
        raise ValueError("oh\nno")

    (found,) = list(doctor.guarded(broken, SMOKE))  # type: ignore[arg-type]
    assert (found.level, found.seen) == ("wrong", "the check failed: ValueError: oh")


def test_a_cluster_that_does_not_answer() -> None:
    found = findings("ray", "runners.address=127.0.0.1:9", "runners.connect_timeout_s=2", quick=False)
    assert [f.level for f in found] == ["wrong"]
    assert "no Ray cluster answers" in found[0].seen
