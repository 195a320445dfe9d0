"""Jobs: what is sent, under which interpreter and authentication, and what is said when it cannot be."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from cluster import jobs
from cluster.connect import ConnectError
from envs.errors import UserError
from ray_ctrl.commands.submit import Request, make_job, run

ROOT = Path(__file__).resolve().parents[3]
HERE = "http://127.0.0.1:8265"
THERE = "http://head.example.com:8265"


def test_the_checkout_travels_light() -> None:
    sent = jobs.upload(ROOT)
    names = {name for name, _ in sent.files}
    assert {"train.py", "pyproject.toml", "ray_ctrl/presets/smoke.yaml", "envs/knobs.py"} <= names
    assert not [
        name for name in names if name.startswith((".git/", ".venv", "tests/", "docs/", "runs/", "benchmarks/"))
    ]
    # Mostly the embedded model's weights, 16 MiB at most.
    assert sent.bytes < 20 * 2**20


def test_a_heavy_folder_is_refused_and_its_largest_files_named(tmp_path: Path) -> None:
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(jobs.LARGEST_UPLOAD + 1)
    with pytest.raises(ConnectError, match=r"weights.bin \(100 MiB\).*\.rayignore"):
        jobs.upload(tmp_path)
    (tmp_path / ".rayignore").write_text("*.bin\n", encoding="utf-8")
    assert jobs.upload(tmp_path).bytes < 100
    with pytest.raises(ConnectError, match="is no folder"):
        jobs.upload(tmp_path / "nowhere")


def test_interpreter_run_folder_and_authentication_are_set() -> None:
    job = make_job(Request(["--preset", "smoke"], working_dir=ROOT, env=["A=b c"]), HERE, "token")
    assert job.entrypoint == f"{sys.executable} train.py --preset smoke run.folder={ROOT / 'runs'}"
    environment = job.environment()
    assert environment["env_vars"]["RAY_AUTH_MODE"] == "token"
    assert environment["env_vars"]["A"] == "b c"
    assert environment["working_dir"] == str(ROOT)
    far = make_job(Request(["--run-dir", "/shared/runs/a b"]), THERE, "disabled")
    assert far.entrypoint == "python train.py --run-dir '/shared/runs/a b'"
    other = make_job(Request(["runs/x"], command="evaluate", python="/opt/py"), THERE, "disabled")
    assert other.entrypoint == "/opt/py -m ray_ctrl.cli evaluate runs/x"


def test_output_that_would_be_lost_is_refused() -> None:
    with pytest.raises(UserError, match="name a folder that outlives it"):
        make_job(Request(["--preset", "smoke"]), THERE, "disabled")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], command="answer"), "cannot be a job"),
        (Request([], env=["A"]), "write NAME=VALUE"),
        (Request([], runtime_env=Path("nowhere.yaml")), "cannot be read"),
    ],
)
def test_bad_requests(request_: Request, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_job(request_, HERE, "disabled")


def test_runtime_environment_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("pip: [tinyarray]\nenv_vars: {X: '1'}\n", encoding="utf-8")
    environment = make_job(Request([], runtime_env=path), HERE, "disabled").environment()
    assert environment["pip"] == ["tinyarray"]
    assert environment["env_vars"]["X"] == "1"
    path.write_text("working_dir: .\n", encoding="utf-8")
    with pytest.raises(UserError, match="--working-dir"):
        make_job(Request([], runtime_env=path), HERE, "disabled")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://"])
def test_addresses_that_are_no_dashboard(address: str) -> None:
    with pytest.raises(ConnectError, match="not understood"):
        jobs.http_address(address)


def test_nobody_there_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ray_ctrl.cli", "submit", "--address", "http://127.0.0.1:9", "--", "--preset", "smoke"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Ray job server answers at http://127.0.0.1:9")
    assert done.stderr.count("\n") == 1


def test_dry_run_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    request = Request(["--preset", "smoke"], address="http://127.0.0.1:9", working_dir=ROOT)
    assert run(request, dry_run=True) == 0
    assert "RAY_AUTH_MODE" in capsys.readouterr().out


class Server:
    """A job server whose connection is lost once in the middle of the log."""

    def __init__(self, info: Any) -> None:
        self.info, self.calls = info, 0

    async def tail_job_logs(self, job_id: str) -> Any:
        self.calls += 1
        yield "one\ntw"
        if self.calls == 1:
            raise RuntimeError("connection lost")
        yield "o\nthree\n"

    def get_job_info(self, job_id: str) -> Any:
        return self.info


def ended(status: JobStatus, code: int | None = 0, message: str = "") -> Any:
    return SimpleNamespace(status=status, driver_exit_code=code, message=message, submission_id="job")


def test_a_lost_connection_repeats_no_line() -> None:
    written: list[str] = []
    assert jobs.follow(Server(ended(JobStatus.SUCCEEDED)), "job", written.append, poll_s=0.01) == 0
    assert "".join(written) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("info", "status"),
    [
        (ended(JobStatus.SUCCEEDED), 0),
        (ended(JobStatus.FAILED, 2), 2),
        (ended(JobStatus.FAILED, -9), 137),
        (ended(JobStatus.STOPPED, None), 143),
    ],
)
def test_exit_statuses(info: Any, status: int) -> None:
    assert jobs.exit_status(info) == status


def test_a_job_that_never_ran_says_why() -> None:
    with pytest.raises(ConnectError, match="before its command ran: no such pip package"):
        jobs.exit_status(ended(JobStatus.FAILED, None, "no such\npip package"))
