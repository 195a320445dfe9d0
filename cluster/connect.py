"""Starting a local Ray or joining a running one, with a timeout and without needless messages."""

import logging
import math
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray

from cluster.package_check import worker_conflict
from cluster.resources import ResourcePlan, assigned_device, machine_cpus, shortfall
from envs.errors import UserError, first_line

# Read by Ray when its processes start; set before ray.init. The user's own values are kept.
QUIET_ENVIRONMENT = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_V2_ENABLED": "1",
    "PYTHONWARNINGS": "ignore",
    "GLOG_minloglevel": "3",
}


# A local Ray takes seconds to start on a busy machine, even if the configured timeout of a cluster is shorter.
MIN_INIT_S = 60.0


class ConnectError(UserError):
    """Ray cannot be reached or is too small for the run; the message is one line."""


def silence_ray_warnings() -> None:
    """Turns off warnings of Ray and RLlib that require no action of the user."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    warnings.filterwarnings("ignore", message=".*Overriding environment")
    for name in ("ray", "ray.rllib", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Logs a dead runner with a traceback; the training loop names the cause in one line.
    logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)


def is_local(address: str) -> bool:
    """Whether `address` starts a new Ray: "local", or "auto" without a cluster in RAY_ADDRESS."""
    return _target(address) == "local"


def _target(address: str) -> str:
    """`address` with "auto" resolved: RAY_ADDRESS (set inside a Ray job), else "local"."""
    return os.environ.get("RAY_ADDRESS") or "local" if address == "auto" else address


@contextmanager
def connect(address: str, plan: ResourcePlan, *, timeout_s: float) -> Iterator[dict[str, float]]:
    """A connection to Ray that can place `plan`; yields the cluster's total resources.

    On exit a Ray started here is stopped and a running cluster is disconnected from. An existing connection is used
    and kept.

    Args:
        address: "local" starts a Ray for this run, "auto" joins the cluster of RAY_ADDRESS or else starts a local one;
            anything else is the address of a running cluster.
        timeout_s: seconds to wait for the cluster to answer, and then for it to offer the resources.

    Raises:
        ConnectError: no answer, or resources missing after the timeout.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    silence_ray_warnings()
    conflict = worker_conflict()
    if conflict is not None:
        raise ConnectError(conflict)
    target, local = _target(address), is_local(address)
    if not local:
        # Checked even if Ray is connected already: a wrong address is always an error.
        _check_reachable(target, timeout_s)
    connected_before, released = ray.is_initialized(), threading.Event()
    if not connected_before:
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        options |= _local_options(plan) if local else {"address": target}
        released = _init(options, timeout_s, "a local Ray" if local else f"the Ray cluster at {target}")
    try:
        # A local Ray has all its resources from the start.
        started_here = local and not connected_before
        yield wait_for(plan, 5.0 if started_here else timeout_s, "the local Ray" if local else "the cluster")
    finally:
        if not connected_before:
            ray.shutdown()
            released.set()


def _init(options: dict[str, Any], timeout_s: float, what: str) -> threading.Event:
    """`ray.init` with a timeout that Ctrl-C interrupts; the caller sets the returned event after shutdown.

    If its node dies, ray.init blocks indefinitely in native code, which ignores signals. In a separate thread it also
    does not replace the handler of SIGTERM, which would exit without a checkpoint. The thread must outlive Ray: Linux
    sends the parent-death signal of Ray's processes when the thread that started them ends.

    Raises:
        ConnectError: it failed, or did not return before the timeout.
    """
    failures: list[Exception] = []
    returned, released = threading.Event(), threading.Event()

    def call() -> None:
        try:
            ray.init(**options)
        except Exception as error:
            failures.append(error)
        returned.set()
        released.wait()

    threading.Thread(target=call, name="ray-init", daemon=True).start()
    limit_s = max(timeout_s, MIN_INIT_S)
    if not returned.wait(limit_s):
        raise ConnectError(
            f"{what} gave no answer within {limit_s:g} s: check the machine's free memory and the logs in the newest "
            "folder below /tmp/ray, or raise runners.connect_timeout_s"
        )
    if threading.current_thread() is threading.main_thread():
        # Ray's native code takes SIGTERM over for the process and prints a stack; give it back to who had it.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    if failures:
        released.set()
        raise ConnectError(f"cannot start or reach {what}: {first_line(failures[0])}") from failures[0]
    return released


def _local_options(plan: ResourcePlan) -> dict[str, Any]:
    """Explicit resources: the machine's CPUs, the plan's GPUs (checked before)."""
    return {
        "address": "local",
        "num_cpus": max(1, machine_cpus(), math.ceil(plan.cpus)),
        "num_gpus": math.ceil(plan.gpus),
        "include_dashboard": False,
        "object_store_memory": 256 * 1024**2,
    }


def _check_reachable(address: str, timeout_s: float) -> None:
    """Fails early with the address in the message: ray.init alone retries for minutes first."""
    if address == "auto":
        return
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConnectError(
            f"Ray address {address!r} is not understood: give HOST:PORT or ray://HOST:PORT with a port of 1 to 65535, "
            "'local' or 'auto'"
        )
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        raise ConnectError(
            f"no Ray cluster answers at {address} ({error}): check the address, or start one with 'ray start --head'"
        ) from error


def wait_for(plan: ResourcePlan, timeout_s: float, what: str) -> dict[str, float]:
    """Total resources once they suffice for the plan; nodes of an autoscaling cluster may still be joining.

    Raises:
        ConnectError: they do not before the timeout; names needed and available resources.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        there = dict(ray.cluster_resources())
        missing = shortfall(plan, there, what)
        if missing is None:
            return there
        if time.monotonic() > deadline:
            raise ConnectError(f"{missing} (waited {timeout_s:g} s)")
        time.sleep(0.5)


def worker_device() -> str | None:
    """The torch device of this process by what Ray gave it (`assigned_device`); None outside Ray's workers.

    The driver counts as outside: Ray does not account for the resources it uses.
    """
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return assigned_device(context.get_accelerator_ids().get("GPU", []), os.environ.get("CUDA_VISIBLE_DEVICES"))
