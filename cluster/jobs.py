"""Ray jobs through the job API: submit one, follow its log to the end, return its exit status."""

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from cluster.connect import ConnectError
from envs.errors import first_line

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"
LARGEST_UPLOAD: Final = 100 * 2**20
AUTH_MODES: Final = ("disabled", "token")
STOPPED_STATUS: Final = 143
INTERRUPTED_STATUS: Final = 130
STOP_WAIT_S: Final = 120
SERVER_TIMEOUT_S: Final = 180.0
"""How long a job server may be unreachable (a dashboard that restarts, a proxy that answers 502)."""
PENDING_NOTICE_S: Final = 10.0


@dataclass(frozen=True)
class Upload:
    """Files of a working directory that are uploaded and their bytes, largest first."""

    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class Job:
    """What the cluster is asked to run.

    Attributes:
        entrypoint: shell command, run in the working directory on the cluster.
        working_dir: local folder to upload; None runs what is installed there.
        sent: what is uploaded of it.
        env: environment variables of the driver and its workers.
        runtime_env: further keys of Ray's runtime environment, such as `pip`.
        cpus, gpus: of the driver; above 0 it is placed on a node that has them, else it runs on the head.
        submission_id: name of the job; None lets Ray choose.
    """

    entrypoint: str
    working_dir: Path | None
    sent: Upload = Upload(())
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


def upload(folder: Path, excludes: Sequence[str] = ()) -> Upload:
    """What Ray would send of `folder`.

    Args:
        excludes: patterns of the runtime environment, in addition to those of the ignore files.

    Raises:
        ConnectError: it is no folder, or larger than a job should carry.
    """
    from cluster.ray_adapter import sent_files

    if not folder.is_dir():
        raise ConnectError(f"working directory {folder} is not a folder: give the checkout with --working-dir")
    found = Upload(tuple(sorted(sent_files(folder, excludes), key=lambda file: (-file[1], file[0]))))
    if found.bytes > LARGEST_UPLOAD:
        largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in found.files[:3])
        raise ConnectError(
            f"working directory {folder} would send {found.bytes / 2**20:.0f} MiB, of which {largest}: name what is "
            f"not needed in {folder / '.rayignore'} (at most {LARGEST_UPLOAD / 2**20:.0f} MiB)"
        )
    return found


def http_address(address: str | None) -> str:
    """The job server's address: as given, else of the environment, else this machine's default.

    Raises:
        ConnectError: not a http(s) address.
    """
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        parts = urlsplit(found)
        understood = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port above 65535, a broken IPv6 address
        understood = False
    if not understood:
        raise ConnectError(
            f"job address {found!r} is not understood: give http://HOST:8265, the dashboard's address (a port is 1 to "
            "65535)"
        )
    return found


def is_here(address: str) -> bool:
    """Whether the address is this machine's own."""
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


def client(address: str, auth: str, timeout_s: float) -> Any:
    """A connection to the job server.

    Args:
        auth: "disabled" or "token"; Ray takes the token from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or its own file.

    Raises:
        ConnectError: no answer before the timeout, or the authentication is refused.
    """
    if auth not in AUTH_MODES:
        raise ConnectError(f"authentication {auth!r} is unknown: choose one of {', '.join(AUTH_MODES)}")
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
    # Ray prefers these over the address that it is given.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    try:
        found = JobSubmissionClient(address)
        found.list_jobs()
    except Exception as error:
        raise ConnectError(_explain(error, address, auth)) from error
    return found


def _explain(error: Exception, address: str, auth: str) -> str:
    reason = first_line(error)
    if "401" in reason or "403" in reason or "authentication" in reason.lower():
        return (
            f"the cluster at {address} refuses authentication {auth!r} ({reason}): use --auth token with its "
            "RAY_AUTH_TOKEN, or --auth disabled if it has none"
        )
    return f"the job server at {address} gives no valid answer ({reason}): check address and Ray version"


def submit(jobs: Any, job: Job) -> str:
    """Sends the working directory and starts the job; returns its id.

    Raises:
        ConnectError: refused by the server, with its reason.
    """
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
        raise ConnectError(f"the server refused the job: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of a server's traceback that says what was wrong, without the exception's name."""
    lines = [line.strip(" .\"'}") for line in str(error).replace("\\n", "\n").splitlines()]
    said = [line for line in lines if any(letter.isalpha() for letter in line)]
    return re.sub(r"^[\w.]*(Error|Exception): ", "", said[-1]) if said else type(error).__name__


def follow(
    jobs: Any,
    job_id: str,
    write: Callable[[str], object],
    notice: Callable[[str], object] = lambda line: None,
    *,
    poll_s: float = 0.5,
    server_timeout_s: float = SERVER_TIMEOUT_S,
    pending_notice_s: float = PENDING_NOTICE_S,
) -> int:
    """Writes the job's log as it grows; returns the driver's exit status (143 if the job was stopped).

    The log comes over a web socket, which proxies and a restarting dashboard close: it is then opened again, without
    repeating what was written. Whether the job has ended is asked separately, so a lost log does not matter.

    Args:
        notice: is called with lines about the job: that it is pending, that the server does not answer.
        server_timeout_s: seconds without any answer of the server before this gives up.

    Raises:
        ConnectError: the server does not answer, or the job never started.
    """
    log = _Log(jobs, job_id, write)
    begun = answered = time.monotonic()
    noticed_pending = noticed_away = False
    while True:
        lost = log.follow()
        try:
            info = jobs.get_job_info(job_id)
        except Exception as error:
            away = time.monotonic() - answered
            if away > server_timeout_s:
                raise ConnectError(
                    f"no answer of the job server about {job_id} for {away:.0f} s ({first_line(error)}); the job may "
                    f"still run: ray job status {job_id}"
                ) from error
            if not noticed_away:
                notice(f"the job server does not answer ({first_line(error)}); trying for {server_timeout_s:g} s")
            noticed_away = True
            time.sleep(min(2.0, 4 * poll_s))
            continue
        answered, noticed_away = time.monotonic(), False
        if info.status.is_terminal():
            if lost is not None:
                log.follow()  # what came after the connection was lost, if the server still has it
            return exit_status(info)
        pending = str(info.status.value) == "PENDING"
        if pending and not noticed_pending and answered - begun > pending_notice_s:
            notice(f"job {job_id} is pending: {' '.join(str(info.message or 'no reason given').split())}")
            noticed_pending = True
        time.sleep(poll_s)


@dataclass
class _Log:
    """A job's log, written once even if the connection is lost and opened again."""

    jobs: Any
    job_id: str
    write: Callable[[str], object]
    written: int = 0

    def follow(self) -> Exception | None:
        """Follows until the connection ends; returns its error, None after a regular end."""
        try:
            asyncio.run(self._tail())
        except (RuntimeError, OSError, ValueError, aiohttp.ClientError, TimeoutError) as error:
            return error
        return None

    async def _tail(self) -> None:
        seen = 0
        async for text in self.jobs.tail_job_logs(self.job_id):
            # Every connection begins with the first line.
            fresh = text[max(0, self.written - seen) :]
            seen += len(text)
            if fresh:
                self.write(fresh)
                self.written += len(fresh)


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
