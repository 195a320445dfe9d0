"""`ray-ctrl submit -- ARGUMENTS`: runs `ray-ctrl train ARGUMENTS` as a Ray job, follows it, returns its exit status."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster import jobs
from envs.errors import UserError
from ray_ctrl.console import console

COMMANDS = ("train", "tune", "evaluate", "profile", "doctor")
# Commands that write below `run.folder`, and what names another place.
WRITING = ("train", "tune")
PLACES = ("run.folder=", "--run-dir", "--out")


@dataclass(frozen=True)
class Request:
    """A job as the command line describes it.

    Attributes:
        arguments: of the ray-ctrl command.
        command: which command.
        python: interpreter on the cluster; None takes this one on this machine's own cluster, else `python`.
        runtime_env: YAML file with further keys of Ray's runtime environment.
        env: NAME=VALUE each.
    """

    arguments: Sequence[str]
    command: str = "train"
    address: str | None = None
    working_dir: Path = Path()
    python: str | None = None
    auth: str | None = None
    runtime_env: Path | None = None
    env: Sequence[str] = field(default_factory=tuple)
    cpus: float = 0.0
    gpus: float = 0.0
    submission_id: str | None = None
    timeout_s: float = 30.0


def run(request: Request, *, follow: bool = True, stop_on_interrupt: bool = False, dry_run: bool = False) -> int:
    """Submits the job; returns its exit status, or 0 at once where it is not followed.

    Raises:
        UserError, ConnectError: arguments that do not do, or a cluster that does not answer or refuses.
    """
    address = jobs.http_address(request.address)
    auth = request.auth or os.environ.get("RAY_AUTH_MODE") or "disabled"
    job = make_job(request, address, auth)
    sent = jobs.upload(request.working_dir)
    console.print(f"job at {address}: {job.entrypoint}", markup=False)
    console.print(f"working directory: {len(sent.files)} files, {sent.bytes / 2**20:.1f} MiB; authentication {auth}")
    if dry_run:
        for name, size in sent.files[:5]:
            console.print(f"  {size / 2**10:>8.0f} KiB  {name}", markup=False)
        console.print(yaml.safe_dump({"runtime_env": job.environment()}, sort_keys=False), markup=False)
        return 0
    server = jobs.client(address, auth, request.timeout_s)
    job_id = jobs.submit(server, job)
    console.print(f"job {job_id} submitted; stop it with: ray job stop --address {address} {job_id}", markup=False)
    if not follow:
        return 0
    try:
        status = jobs.follow(server, job_id, _write)
    except KeyboardInterrupt:
        return _interrupted(server, job_id, stop_on_interrupt)
    console.print(f"job {job_id} ended with exit status {status}", markup=False)
    return status


def make_job(request: Request, address: str, auth: str) -> jobs.Job:
    """The job behind a request.

    Raises:
        UserError: an unknown command, output that would be lost, or a bad environment.
    """
    if request.command not in COMMANDS:
        raise UserError(f"command {request.command!r} cannot be a job: choose one of {', '.join(COMMANDS)}")
    arguments = list(request.arguments)
    if request.command in WRITING and not any(word.startswith(PLACES) for word in arguments):
        if not jobs.is_here(address):
            raise UserError(
                "a job's working directory is removed after it: name a folder that outlives it and that you can "
                "reach, such as run.folder=/shared/runs"
            )
        arguments.append(f"run.folder={request.working_dir.absolute() / 'runs'}")
    python = request.python or (sys.executable if jobs.is_here(address) else "python")
    program = ["train.py"] if request.command == "train" else ["-m", "ray_ctrl.cli", request.command]
    env = {
        "RAY_AUTH_MODE": auth,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Time to finish the iteration and write a checkpoint before the driver is killed.
        "RAY_JOB_STOP_WAIT_TIME_S": str(jobs.STOP_WAIT_S),
    }
    return jobs.Job(
        entrypoint=jobs.shell([python, *program, *arguments]),
        working_dir=request.working_dir,
        env=env | _variables(request.env),
        runtime_env=_runtime_env(request.runtime_env),
        cpus=request.cpus,
        gpus=request.gpus,
        submission_id=request.submission_id,
    )


def _variables(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(f"environment variable {pair!r} is not understood: write NAME=VALUE")
        found[name] = value
    return found


def _runtime_env(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"runtime environment {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"runtime environment {path} holds a {type(tree).__name__}: give keys such as 'pip:'")
    if "working_dir" in tree:
        raise UserError(f"runtime environment {path} names a working_dir: give it with --working-dir")
    return tree


def _interrupted(server: Any, job_id: str, stop_it: bool) -> int:
    if stop_it:
        console.print(f"stopping job {job_id}", markup=False)
        console.print(f"job {job_id} is {jobs.stop(server, job_id)}", markup=False)
    else:
        console.print(f"job {job_id} goes on; follow it with: ray job logs --follow {job_id}", markup=False)
    return jobs.INTERRUPTED_STATUS


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
