"""Kills `ray-ctrl train` at random moments and resumes it; each run must end as one that was left alone.

    kills.py COUNT FOLDER

Commands are forked from this process, which has imported everything, and share one cluster: a kill costs seconds.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from conftest import stable_metrics

import ray_ctrl.commands.evaluate
import ray_ctrl.rllib_setup  # noqa: F401 (imported before the fork)
from ray_ctrl.cli import main

RESULTS = ("controller/controller.safetensors", "evaluation/rollouts.csv")


class EndedBefore(Exception):
    """A run ended before it was killed."""


def begin(log: Path, *arguments: str | Path) -> int:
    """Starts `ray-ctrl ARGUMENTS` in a process of its own, a fork of this one; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        status = main([str(argument) for argument in arguments])
    finally:
        os._exit(status)


def ended(pid: int, timeout_s: float) -> int | None:
    """Exit status of a process; None if it still runs after the timeout."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def check(status: int | None, log: Path) -> None:
    assert status == 0, f"exit status {status}\n{log.read_text('utf-8')}"


def kill_and_resume(run: Path, arguments: tuple[str, ...], seconds: float) -> int:
    """Kills a run after `seconds` and lets it end; returns the iterations that were written down when it died.

    Raises:
        EndedBefore: with its duration.
    """
    log, started = run.with_suffix(".log"), time.monotonic()
    pid = begin(log, *arguments, "--run-dir", run)
    if (status := ended(pid, seconds)) is not None:
        check(status, log)
        raise EndedBefore(time.monotonic() - started)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    done = len(stable_metrics(run)) if (run / "metrics.jsonl").is_file() else 0
    if not (run / "evaluation" / "summary.json").is_file():
        shutil.rmtree(run / "evaluation", ignore_errors=True)
        again = ("train", "--resume") if (run / "run.json").is_file() else arguments
        check(ended(begin(log, *again, "--run-dir", run), 600), log)
    return done


def run_all(count: int, folder: Path, address: str) -> None:
    arguments = ("train", "-p", "smoke", f"runners.address={address}")
    alone, log, started = folder / "alone", folder / "alone.log", time.monotonic()
    check(ended(begin(log, *arguments, "--run-dir", alone), 600), log)
    length, draw, index = time.monotonic() - started, random.Random(1), 0
    while index < count:
        run, seconds = folder / f"run-{index}", draw.uniform(0.05, 1.0) * length
        try:
            done = kill_and_resume(run, arguments, seconds)
        except EndedBefore as error:  # the machine was busier when the first run was timed
            length = error.args[0]
            shutil.rmtree(run)
            continue
        index += 1
        assert stable_metrics(run) == stable_metrics(alone), run
        for name in RESULTS:
            assert (run / name).read_bytes() == (alone / name).read_bytes(), run / name
        print(f"kill {index} of {count} after {seconds:.1f} of {length:.1f} s, {done} iterations done", flush=True)


def hold_cluster(address: int) -> None:
    """Starts a cluster, writes its address to a file descriptor, and ends it on SIGTERM."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False},
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.write(address, cluster.address.encode())
    os.close(address)
    signal.sigwait({signal.SIGTERM})
    cluster.shutdown()


if __name__ == "__main__":
    reader, writer = os.pipe()
    holder = os.fork()  # the clients of a cluster do not survive a fork, so it is no business of this process
    if not holder:
        hold_cluster(writer)
        os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader) as file:
            run_all(int(sys.argv[1]), Path(sys.argv[2]), file.read())
    finally:
        os.kill(holder, signal.SIGTERM)
        os.waitpid(holder, 0)
