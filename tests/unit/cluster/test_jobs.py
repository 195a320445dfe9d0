"""Jobs: what is sent, under which interpreter and authentication, and what is said when it cannot be."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
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
    with pytest.raises(ConnectError, match="is not a folder"):
        jobs.upload(tmp_path / "nowhere")


def test_interpreter_run_folder_and_authentication_are_set() -> None:
    job = make_job(Request(["--preset", "smoke"], working_dir=ROOT, env=["A=b c"]), HERE, "token")
    assert job.entrypoint == f"{sys.executable} train.py --preset smoke run.folder={ROOT / 'runs'}"  # no store in it
    environment = job.environment()
    assert environment["env_vars"]["RAY_AUTH_MODE"] == "token"
    assert environment["env_vars"]["A"] == "b c"
    assert environment["working_dir"] == str(ROOT)
    far = make_job(Request(["--run-dir", "/shared/runs/a b"]), THERE, "disabled")
    assert far.entrypoint == "python train.py --run-dir '/shared/runs/a b' store.path=/shared/runs/outcomes.sqlite"
    other = make_job(Request(["runs/x"], command="evaluate", python="/opt/py"), THERE, "disabled")
    assert other.entrypoint == "/opt/py -m ray_ctrl evaluate runs/x"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "smoke"], "name a folder that outlives it"),
        (["run.folder=runs"], "runs is relative"),
        (["--run-dir", "runs/a"], "runs/a is relative"),
        (["--run-dir=runs/a"], "runs/a is relative"),
        (["run.folder=/shared", "store.path=store/x.sqlite"], "store/x.sqlite is relative"),
        (["run.folder=/shared", "latency.profile_dir=profiles"], "profiles is relative"),
    ],
)
def test_output_that_would_be_lost_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_job(Request(arguments, working_dir=ROOT), THERE, "disabled")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "smok"], "unknown preset 'smok'"),
        (["grpo.lrr=1"], "unknown config key 'grpo.lrr'"),
        (["grpo.lr=fast"], "grpo.lr = 'fast' is not allowed"),
        (["--presett", "smoke"], "No such option"),
        (["--config", "nowhere.yaml"], "cannot read config file nowhere.yaml"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_job(Request(arguments, working_dir=ROOT), HERE, "disabled")


def test_the_store_stays_with_the_runs() -> None:
    near = make_job(Request([], working_dir=ROOT), HERE, "disabled")
    assert near.entrypoint.endswith(f"run.folder={ROOT / 'runs'} store.path={ROOT / 'runs' / 'outcomes.sqlite'}")
    kept = make_job(Request(["run.folder=/s", "store.path=/d/o.sqlite"], working_dir=ROOT), THERE, "disabled")
    assert kept.entrypoint == "python train.py run.folder=/s store.path=/d/o.sqlite"
    none = make_job(Request(["run.folder=/s", "store.path=null"], working_dir=ROOT), THERE, "disabled")
    assert none.entrypoint == "python train.py run.folder=/s store.path=null"


def test_outside_a_checkout_the_installed_package_trains(tmp_path: Path) -> None:
    job = make_job(Request(["run.folder=/s", "store.path=null"], working_dir=tmp_path), THERE, "disabled")
    assert job.entrypoint == "python -m ray_ctrl train run.folder=/s store.path=null"


def test_files_that_are_read_travel_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "x.jsonl"
    (checkout / "data").mkdir(parents=True)
    for path in (checkout / "data" / "mine.jsonl", checkout / "ignored.jsonl", elsewhere):
        path.write_text("{}", encoding="utf-8")
    (checkout / ".rayignore").write_text("ignored.jsonl\n", encoding="utf-8")
    monkeypatch.chdir(checkout)

    def entrypoint(address: str, *arguments: str) -> str:
        return make_job(Request(["run.folder=/s", "store.path=null", *arguments]), address, "disabled").entrypoint

    assert "--task data/mine.jsonl" in entrypoint(THERE, "--task", "data/mine.jsonl")
    assert f"task.name={checkout / 'data' / 'mine.jsonl'}" in entrypoint(HERE, "task.name=data/mine.jsonl")
    assert f"--task=textvqa={checkout / 'data'}" in entrypoint(HERE, "--task=textvqa=data")
    assert "--task scenes" in entrypoint(THERE, "--task", "scenes")
    assert "model.name=allenai/MolmoE-1B-0924" in entrypoint(THERE, "model.name=allenai/MolmoE-1B-0924")
    for left_behind in ("../x.jsonl", "ignored.jsonl"):
        with pytest.raises(UserError, match="is not uploaded with the job"):
            entrypoint(THERE, "--task", left_behind)
    assert f"--task {elsewhere}" in entrypoint(HERE, "--task", "../x.jsonl").replace("checkout/../", "")


def test_an_upload_leaves_out_what_the_runtime_environment_excludes(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(b"0" * 1000)
    (tmp_path / "a.py").write_text("", encoding="utf-8")
    assert {name for name, _ in jobs.upload(tmp_path).files} == {"a.py", "big.bin"}
    assert {name for name, _ in jobs.upload(tmp_path, ["*.bin"]).files} == {"a.py"}


def test_a_run_folder_that_is_removed_with_its_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray job submit --working-dir . -- python train.py` without run.folder would make it."""
    from ray_ctrl import tune
    from ray_ctrl.commands import train

    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    for command in (lambda: train.run("smoke", None, []), lambda: tune.run("smoke", [])):
        with pytest.raises(UserError, match=r"removed with the job's working directory.*run.folder=/shared/runs"):
            command()
    train.run("smoke", None, [f"run.folder={tmp_path}"], dry_run=True)


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


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", "http://h:99999", "http://h:-1", "http://[::1"]
)
def test_addresses_that_are_no_dashboard(address: str) -> None:
    with pytest.raises(ConnectError, match="not understood"):
        jobs.http_address(address)


def test_nobody_there_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ray_ctrl", "submit", "--address", "http://127.0.0.1:9", "--", "--preset", "smoke"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Ray job server answers at http://127.0.0.1:9")
    assert done.stderr.count("\n") == 1


def test_dry_run_sends_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"arguments": ["--preset", "smoke"], "address": "http://127.0.0.1:9", "working_dir": ROOT}
    walk, walked = jobs.upload, []
    monkeypatch.setattr(jobs, "upload", lambda *folder: walked.append(folder) or walk(*folder))
    assert run(**given, dry_run=True) == 0
    assert len(walked) == 1
    assert "RAY_AUTH_MODE" in capsys.readouterr().out


class Server:
    """A job server that fails in the ways of proxies and restarting dashboards, then answers.

    Args:
        infos: what it says of the job, one answer after the other, the last one for good; errors are raised.
        tails: errors that cut the first connections to the log, after its first half.
    """

    def __init__(self, *infos: Any, tails: Sequence[Exception] = ()) -> None:
        self.infos, self.tails = list(infos), list(tails)

    async def tail_job_logs(self, job_id: str) -> Any:
        yield "one\ntw"
        if self.tails:
            raise self.tails.pop(0)
        yield "o\nthree\n"

    def get_job_info(self, job_id: str) -> Any:
        info = self.infos.pop(0) if len(self.infos) > 1 else self.infos[0]
        if isinstance(info, Exception):
            raise info
        return info


def ended(status: JobStatus, code: int | None = 0, message: str = "") -> Any:
    return SimpleNamespace(status=status, driver_exit_code=code, message=message, submission_id="job")


DROPPED = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
BAD_GATEWAY = RuntimeError("Request failed with status code 502: <html>Bad Gateway</html>.")


@pytest.mark.parametrize(
    "server",
    [
        Server(ended(JobStatus.SUCCEEDED), tails=[DROPPED]),
        Server(ended(JobStatus.RUNNING), ended(JobStatus.SUCCEEDED), tails=[DROPPED, DROPPED]),
        Server(BAD_GATEWAY, BAD_GATEWAY, ended(JobStatus.SUCCEEDED), tails=[aiohttp.ClientError("502")] * 2),
        Server(ConnectionRefusedError("restarting"), ended(JobStatus.SUCCEEDED), tails=[OSError("refused")]),
        Server(TimeoutError(), ended(JobStatus.SUCCEEDED)),
    ],
)
def test_a_lost_connection_loses_and_repeats_no_line(server: Server) -> None:
    written: list[str] = []
    assert jobs.follow(server, "job", written.append, poll_s=0.001) == 0
    assert "".join(written) == "one\ntwo\nthree\n"


def test_the_status_is_the_servers_though_the_log_never_comes() -> None:
    server = Server(ended(JobStatus.RUNNING), ended(JobStatus.FAILED, 2), tails=[DROPPED] * 10)
    assert jobs.follow(server, "job", lambda text: None, poll_s=0.001) == 2


def test_a_server_that_stays_away_is_given_up_after_the_timeout() -> None:
    notices: list[str] = []
    with pytest.raises(ConnectError, match=r"no answer of the job server about job.*ray job status job"):
        jobs.follow(Server(BAD_GATEWAY), "job", lambda text: None, notices.append, poll_s=0.001, server_timeout_s=0.05)
    assert len(notices) == 1


def test_waiting_for_a_stop_is_bounded() -> None:
    pending = SimpleNamespace(stop_job=lambda job: None, get_job_status=lambda job: JobStatus.PENDING)
    assert jobs.stop(pending, "job", timeout_s=0.0) == "PENDING"


def test_a_job_that_waits_for_resources_says_so_once() -> None:
    pending = [ended(JobStatus.PENDING, None, "waiting for resources:\n1 GPU")] * 3
    notices: list[str] = []
    server = Server(*pending, ended(JobStatus.SUCCEEDED))
    assert jobs.follow(server, "job", lambda text: None, notices.append, poll_s=0.001, pending_notice_s=0.0) == 0
    assert notices == ["job job is pending: waiting for resources: 1 GPU"]


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        ("Request failed with status code 500: Traceback...\nValueError: Job with submission_id a already exists. "
         "Please use a different submission_id.\n.", "Job with submission_id a already exists. Please use a different "
         "submission_id"),
        ("no CPU", "no CPU"),
        ("", "RuntimeError"),
    ],
)  # fmt: skip
def test_a_refused_job_gives_the_servers_reason(raised: str, reason: str) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError(raised)

    with pytest.raises(ConnectError) as caught:
        jobs.submit(SimpleNamespace(submit_job=refuse), jobs.Job("true", None))
    assert caught.value.message == f"the server refused the job: {reason}"


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
