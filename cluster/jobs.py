"""Ray jobs through the job API: submit one, follow its log to the end, tell its exit status."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cluster.connect import ConnectError

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"
LARGEST_UPLOAD: Final = 100 * 2**20
AUTH_MODES: Final = ("disabled", "token")
STOPPED_STATUS: Final = 143
INTERRUPTED_STATUS: Final = 130
STOP_WAIT_S: Final = 120
_RETRIES: Final = 5


@dataclass(frozen=True)
class Job:
    """What the cluster is asked to run.

    Attributes:
        entrypoint: shell command, run in the working directory on the cluster.
        working_dir: local folder that travels; None runs what is installed there.
        env: environment variables of the driver and its workers.
        runtime_env: further keys of Ray's runtime environment, such as `pip`.
        cpus, gpus: what the driver holds; above 0 it is placed on a node that has them, else it runs on the head.
        submission_id: name of the job; None lets Ray choose.
    """

    entrypoint: str
    working_dir: Path | None
    env: Mapping[str, str] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    cpus: float = 0.0
    gpus: float = 0.0
    submission_id: str | None = None

    def environment(self) -> dict[str, Any]:
        """Ray's runtime environment of this job."""
        env_vars = {**self.runtime_env.get("env_vars", {}), **self.env}
        found: dict[str, Any] = {**self.runtime_env, "env_vars": env_vars}
        if self.working_dir is not None:
            found["working_dir"] = str(self.working_dir)
        return found


@dataclass(frozen=True)
class Upload:
    """What travels of a working directory: files and their bytes, largest first."""

    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


def upload(folder: Path) -> Upload:
    """What Ray would send of `folder`, ignore files heeded.

    Raises:
        ConnectError: it is no folder, or larger than a job should carry.
    """
    from ray._private.runtime_env.packaging import _dir_travel

    if not folder.is_dir():
        raise ConnectError(f"working directory {folder} is no folder: give the checkout with --working-dir")
    root = folder.absolute()
    files: list[tuple[str, int]] = []

    def note(path: Path) -> None:
        if path.is_file() and not path.is_symlink():
            files.append((path.relative_to(root).as_posix(), path.stat().st_size))

    quiet = logging.getLogger("ray_ctrl.upload")
    quiet.setLevel(logging.WARNING)
    _dir_travel(root, [], note, include_gitignore=True, logger=quiet)
    found = Upload(tuple(sorted(files, key=lambda file: (-file[1], file[0]))))
    if found.bytes > LARGEST_UPLOAD:
        largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in found.files[:3])
        raise ConnectError(
            f"working directory {folder} would send {found.bytes / 2**20:.0f} MiB, of which {largest}: name what is "
            f"not wanted in {folder / '.rayignore'} (at most {LARGEST_UPLOAD / 2**20:.0f} MiB)"
        )
    return found


def http_address(address: str | None) -> str:
    """The job server's address: as given, else of the environment, else this machine's usual one.

    Raises:
        ConnectError: not a http(s) address.
    """
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    parts = urlsplit(found)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConnectError(f"job address {found!r} is not understood: give http://HOST:8265, the dashboard's address")
    return found


def is_here(address: str) -> bool:
    """True where the address is this machine's own."""
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


def client(address: str, auth: str, timeout_s: float) -> Any:
    """A connection to the job server.

    Args:
        auth: "disabled" or "token"; Ray takes the token from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or its own file.

    Raises:
        ConnectError: nobody answers in time, or the authentication is refused.
    """
    if auth not in AUTH_MODES:
        raise ConnectError(f"authentication {auth!r} is not known: choose one of {', '.join(AUTH_MODES)}")
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=timeout_s).close()
    except OSError as error:
        raise ConnectError(
            f"no Ray job server answers at {address} ({error}): check --address, or start one with "
            "'ray start --head' (it needs ray[default])"
        ) from error
    os.environ["RAY_AUTH_MODE"] = auth
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray lets these overrule the address it is given.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    try:
        found = JobSubmissionClient(address)
        found.list_jobs()
    except Exception as error:
        raise ConnectError(_explain(error, address, auth)) from error
    return found


def _explain(error: Exception, address: str, auth: str) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "401" in reason or "403" in reason or "authentication" in reason.lower():
        return (
            f"the cluster at {address} refuses authentication {auth!r} ({reason}): use --auth token with its "
            "RAY_AUTH_TOKEN, or --auth disabled where it has none"
        )
    return f"the job server at {address} gives no proper answer ({reason}): check address and Ray version"


def submit(jobs: Any, job: Job) -> str:
    """Sends the working directory and starts the job; returns its id.

    Raises:
        ConnectError: refused by the server, with its reason.
    """
    if job.working_dir is not None:
        upload(job.working_dir)
    try:
        return str(
            jobs.submit_job(
                entrypoint=job.entrypoint,
                runtime_env=job.environment(),
                submission_id=job.submission_id,
                entrypoint_num_cpus=job.cpus or None,
                entrypoint_num_gpus=job.gpus or None,
            )
        )
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        raise ConnectError(f"the job was not taken: {reason}") from error


def follow(jobs: Any, job_id: str, write: Callable[[str], object], poll_s: float = 0.5) -> int:
    """Writes the job's log as it grows; returns the driver's exit status (143 where the job was stopped).

    Raises:
        ConnectError: the server stays away, or the job never started.
    """
    written, failures = 0, 0

    async def tail() -> None:
        nonlocal written
        seen = 0
        async for chunk in jobs.tail_job_logs(job_id):
            # After a lost connection the log comes again from its beginning.
            fresh = chunk[max(0, written - seen) :]
            seen += len(chunk)
            if fresh:
                write(fresh)
                written += len(fresh)

    while True:
        try:
            asyncio.run(tail())
            info = jobs.get_job_info(job_id)
            failures = 0
        except (RuntimeError, OSError) as error:
            failures += 1
            if failures > _RETRIES:
                raise ConnectError(f"lost the job server while following {job_id}: {error}") from error
            time.sleep(poll_s * 2**failures)
            continue
        if info.status.is_terminal():
            return exit_status(info)
        time.sleep(poll_s)


def exit_status(info: Any) -> int:
    """Exit status of an ended job.

    Raises:
        ConnectError: it failed before its command ran.
    """
    status = str(info.status.value)
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return STOPPED_STATUS
    if info.driver_exit_code is None:
        reason = " ".join(str(info.message or "no reason given").split())
        raise ConnectError(f"job {info.submission_id} failed before its command ran: {reason}")
    code = int(info.driver_exit_code)
    return 128 - code if code < 0 else code or 1


def stop(jobs: Any, job_id: str, timeout_s: float = STOP_WAIT_S + 10) -> str:
    """Asks the job to stop and waits until it has; returns its last status."""
    jobs.stop_job(job_id)
    deadline = time.monotonic() + timeout_s
    while True:
        status = jobs.get_job_status(job_id)
        if status.is_terminal() or time.monotonic() > deadline:
            return str(status.value)
        time.sleep(0.5)


def shell(words: Sequence[str]) -> str:
    """One shell command from its words."""
    import shlex

    return shlex.join(words)
