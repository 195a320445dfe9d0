"""Starting a local Ray or joining a running one, with a timeout and without noise."""

import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.resources import ResourcePlan, machine_cpus, shortfall
from envs.errors import UserError

# Read by Ray when its processes start; set before ray.init, and only where the user has not.
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


class ConnectError(UserError):
    """Ray cannot be reached or cannot hold the run; the message is one line."""


def hush() -> None:
    """Turns off the warnings of Ray and RLlib that a user can do nothing about."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    warnings.filterwarnings("ignore", message=".*Overriding environment")
    for name in ("ray", "ray.rllib", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Logs a dead runner with a traceback of its own; our loop names the cause of death in one line.
    logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)


def is_local(address: str) -> bool:
    """True when `address` means a Ray of our own: "local", or "auto" outside a Ray job and without
    RAY_ADDRESS.
    """
    return address == "local" or (address == "auto" and not os.environ.get("RAY_ADDRESS"))


@contextmanager
def connect(address: str, plan: ResourcePlan, *, timeout_s: float) -> Iterator[dict[str, float]]:
    """Holds a connection to Ray that can place `plan`; yields the cluster's total resources.

    Args:
        address: "local" starts a Ray for this run, "auto" joins the cluster of RAY_ADDRESS (set
            inside a Ray job)
            or else starts a local one; anything else is the address of a running cluster.
        timeout_s: seconds to wait for the cluster to answer and to offer the resources.

    Raises:
        ConnectError: no answer, or resources missing after the timeout.

    A Ray started here is stopped on the way out; a cluster that was there before is only left.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    hush()
    local = is_local(address)
    target = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if not local:
        # Before the look at what is connected already: an address that cannot be right is never passed over.
        _check_reachable(target, timeout_s)
    if ray.is_initialized():
        yield dict(ray.cluster_resources())
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    options |= _local_options(plan) if local else {"address": target}
    try:
        with _sigterm_kept():
            ray.init(**options)
    except Exception as error:
        what = "a local Ray" if local else f"the Ray cluster at {options['address']}"
        raise ConnectError(f"cannot start or reach {what}: {_first_line(error)}") from error
    try:
        yield wait_for(plan, 5.0 if local else timeout_s, "the local Ray" if local else "the cluster")
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Gives SIGTERM back to whoever had it: ray.init makes it an immediate exit, and a checkpoint would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before not in (None, signal.SIG_DFL):
            signal.signal(signal.SIGTERM, before)


def _local_options(plan: ResourcePlan) -> dict[str, Any]:
    """Explicit resources: what the machine has of CPUs, what the plan asks for of GPUs (checked
    before).
    """
    return {
        "address": "local",
        "num_cpus": max(1, machine_cpus(), int(plan.cpus + 0.999)),
        "num_gpus": int(plan.gpus + 0.999),
        "include_dashboard": False,
        "object_store_memory": 256 * 1024**2,
    }


def _check_reachable(address: str, timeout_s: float) -> None:
    """Fails early with the address in the message: ray.init alone retries for long before it says
    anything.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        if address == "auto":
            return
        raise ConnectError(
            f"Ray address {address!r} is not understood: give host:port, ray://host:port, 'local' or 'auto'"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return
    except OSError as error:
        raise ConnectError(
            f"no Ray cluster answers at {address} ({error}): check the address, or start one with 'ray start --head'"
        ) from error


def wait_for(plan: ResourcePlan, timeout_s: float, where: str) -> dict[str, float]:
    """Total resources once they hold the plan; nodes of an autoscaling cluster may still be joining.

    Raises:
        ConnectError: they do not within `timeout_s`; it names what is wanted and what is there.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        there = dict(ray.cluster_resources())
        missing = shortfall(plan, there, where)
        if missing is None:
            return there
        if time.monotonic() > deadline:
            raise ConnectError(f"{missing} (waited {timeout_s:g} s)")
        time.sleep(0.5)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
