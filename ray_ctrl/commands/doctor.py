"""`ray-ctrl doctor`: checks everything that a run needs, and says how to fix what is wrong.

Checks are independent: one that fails or raises does not prevent the others.
"""

import json
import os
import platform
import shutil
import socket
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from envs.errors import UserError, first_line
from ray_ctrl.config import Config
from ray_ctrl.console import console
from ray_ctrl.load_config import load_config
from ray_ctrl.preflight import plan_layout
from ray_ctrl.provenance import installed_version

GIB = 2**30
MIN_DISK = GIB
LOW_DISK = 10 * GIB
RAY_DISK_SHARE = 0.95  # Ray stops writing to a disk that is fuller than this
OBJECT_STORE = 256 * 2**20
RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs", 10001: "Ray clients"}
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "fuse.sshfs", "9p", "glusterfs", "beegfs")
PYTHONS = ((3, 11), (3, 13))
ROOT = Path(__file__).resolve().parents[2]
STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` says what to do if it is not `ok`."""

    level: Literal["ok", "note", "wrong"]
    seen: str
    fix: str = ""
    check: str = ""


Findings = Iterator[Finding]


def run(
    preset: str, config_file: Path | None, overrides: Sequence[str], *, quick: bool = False, as_json: bool = False
) -> int:
    """Prints the findings; returns 1 if something is wrong, else 0.

    Args:
        quick: do not start or join Ray.

    Raises:
        UserError: an invalid configuration.
    """
    findings = []
    for finding in examine(load_config(preset, config_file, overrides), quick=quick):
        findings.append(finding)
        if not as_json:
            console.print(f"{finding.level:<6}", style=STYLES[finding.level], end="")
            console.print(f"{finding.check:<16}{finding.seen}")
            if finding.fix:
                console.print(f"{'':<22}-> {finding.fix}")
    wrong = sum(finding.level == "wrong" for finding in findings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(f"{wrong} problem(s) to fix" if wrong else "no problems found", style="bold")
    return int(wrong > 0)


def examine(config: Config, *, quick: bool = False) -> Findings:
    """All findings, one check after the other."""
    for name, check in CHECKS.items():
        if not (quick and name == "ray"):
            for finding in guarded(check, config):
                yield replace(finding, check=finding.check or name)


def guarded(check: Callable[[Config], Findings], config: Config) -> Findings:
    """The findings of a check, which are its error if it raises one."""
    try:
        yield from check(config)
    except UserError as error:
        seen, _, fix = error.message.rpartition(": ")
        yield Finding("wrong", seen or error.message, fix if seen else "see the message")
    except Exception as error:
        yield Finding("wrong", f"the check failed: {type(error).__name__}: {first_line(error)}", "report this output")


def python_version(config: Config) -> Findings:
    """Python is a tested version."""
    (low, high), version = PYTHONS, platform.python_version()
    if low <= tuple(map(int, platform.python_version_tuple()[:2])) <= high:
        yield Finding("ok", version)
    else:
        yield Finding("wrong", version, f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}")


def dependencies(config: Config) -> Findings:
    """Every dependency is installed in an allowed version."""
    from packaging.requirements import Requirement

    wrong, found = [], {}
    for requirement in map(Requirement, requirements()):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", "train")):
            continue
        version = installed_version(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} does not meet {requirement.specifier}")
        else:
            found[requirement.name] = version
    if wrong:
        yield Finding("wrong", "; ".join(wrong), "pip install -c constraints.txt -e '.[train]'")
    else:
        main = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "ray") if name in found)
        yield Finding("ok", f"{len(found)} as required; {main}")


def requirements() -> list[str]:
    """Dependencies and those of training in the checkout's pyproject.toml, else all of the installed package.

    Raises:
        UserError: neither is there.
    """
    project = ROOT / "pyproject.toml"
    if project.is_file():
        declared = tomllib.loads(project.read_text("utf-8"))["project"]
        return [*declared["dependencies"], *declared["optional-dependencies"]["train"]]
    try:
        return list(metadata.requires("ray-ctrl") or [])
    except metadata.PackageNotFoundError:
        raise UserError("ray-ctrl is neither installed nor run from its checkout: pip install it") from None


def origins(config: Config) -> Findings:
    """The four packages are this project's own, here and on Ray's workers."""
    from cluster.package_check import package_conflict, worker_conflict

    conflict = package_conflict() or worker_conflict()
    if conflict is not None:
        seen, _, fix = conflict.rpartition(": ")
        yield Finding("wrong", seen, fix)
    else:
        yield Finding("ok", f"envs, policies, cluster and ray_ctrl are those in {ROOT}")


def devices(config: Config) -> Findings:
    """The model's device exists and torch can use it; threads fit the CPUs."""
    import torch

    from cluster.resources import machine_cpus
    from envs.model.device import resolve_device

    cpus, threads = machine_cpus(), config.model.threads
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.mem_get_info(i)[0] / GIB:.0f} GiB free)" for i in range(gpus)
    ]
    device = resolve_device(config.model.device)
    yield Finding("ok", f"{cpus} CPUs usable, {', '.join(names) or 'no GPU'}; the model runs on {device}")
    if not gpus and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        seen = f"an NVIDIA driver is installed, but torch ({torch.version.cuda or 'a CPU build'}) sees no GPU"
        yield Finding("note", seen, "install PyTorch for this driver (pytorch.org), or correct CUDA_VISIBLE_DEVICES")
    if threads > cpus:
        yield Finding("wrong", f"model.threads = {threads} on {cpus} CPUs", f"model.threads={cpus} or less")
    # Nested levels of parallelism are a list, such as 4,2: the first is what torch uses.
    given = os.environ.get("OMP_NUM_THREADS", "")
    outer = given.partition(",")[0].strip()
    if config.runners.count > 1 and not (outer.isdigit() and 0 < int(outer) <= threads):
        seen = f"OMP_NUM_THREADS is {given or 'not set'}: {config.runners.count} runners may compete for the CPUs"
        yield Finding("note", seen, f"export OMP_NUM_THREADS={threads}")


def resources(config: Config) -> Findings:
    """The configuration is consistent and fits this machine's CPUs and GPUs."""
    plan = plan_layout(config).resources
    roles = ", ".join(f"{role.count} {role.name}" for role in plan.roles)
    yield Finding("ok", f"{roles}: {plan.cpus:g} CPUs and {plan.gpus:g} GPUs placed by Ray")


def network(config: Config) -> Findings:
    """Processes of this machine reach one another at the address that Ray uses."""
    from ray.util import get_node_ip_address

    address = get_node_ip_address()
    try:
        with (
            socket.create_server((address, 0)) as server,
            socket.create_connection(server.getsockname()[:2], timeout=5),
        ):
            yield Finding("ok", f"this machine answers at {address}")
    except OSError as error:
        fix = "allow connections of this machine to itself, or set RAY_NODE_IP_ADDRESS=127.0.0.1"
        yield Finding("wrong", f"this machine does not answer at {address}, the address Ray uses: {error}", fix)


def ports(config: Config) -> Findings:
    """Which of Ray's usual ports are in use; a run that starts its own Ray needs none of them."""
    taken = [f"{port} ({what})" for port, what in RAY_PORTS.items() if _listens(port)]
    if taken:
        fix = "nothing if that is your Ray cluster; else start it on other ports (ray start --port ...)"
        yield Finding("note", f"in use: {', '.join(taken)}", fix)
    else:
        yield Finding("ok", f"{', '.join(map(str, RAY_PORTS))} are free")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def authentication(config: Config) -> Findings:
    """Ray enables authentication if it finds a token, so that is reported."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    default = Path("~/.ray/auth_token").expanduser()
    sources = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    sources += [str(default)] if default.is_file() else []
    fix = "export RAY_AUTH_MODE=disabled, or RAY_AUTH_MODE=token with a token (ray get-auth-token --generate)"
    if mode not in ("", "token", "disabled"):
        yield Finding("wrong", f"RAY_AUTH_MODE={mode!r} is unknown", fix)
    elif mode == "token" and not sources:
        yield Finding("wrong", "RAY_AUTH_MODE=token, but there is no token", fix)
    elif not mode and sources:
        seen = f"RAY_AUTH_MODE is not set and there is a token in {sources[0]}: `ray start` uses it, ray-ctrl does not"
        yield Finding("note", seen, fix)
    else:
        yield Finding("ok", f"mode {mode or 'disabled, the default of ray-ctrl'}")


def disks(config: Config) -> Findings:
    """Free space and permissions of the run folder, Ray's files and Ray's shared memory."""
    yield _disk("run folder", Path(config.run.folder), "set run.folder to a folder on a larger disk")
    temporary, fix = Path(os.environ.get("RAY_TMPDIR", "/tmp")), "free space there, or set RAY_TMPDIR"
    yield _disk("ray files", temporary, fix)
    usage = shutil.disk_usage(_existing_parent(temporary))
    if (full := 1.0 - usage.free / usage.total) > RAY_DISK_SHARE:
        seen = f"the disk of {temporary} is {full:.0%} full: Ray refuses to write above {RAY_DISK_SHARE:.0%}"
        yield Finding("wrong", seen, fix, "ray files")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        seen = f"{free / GIB:.1f} GiB free in {shared}"
        if free < OBJECT_STORE:
            seen += f", Ray's object store needs {OBJECT_STORE / GIB:.2f}"
            yield Finding("note", seen, "start the container with --shm-size=2g", "shared memory")
        else:
            yield Finding("ok", seen, check="shared memory")


def _disk(name: str, folder: Path, fix: str) -> Finding:
    place = _existing_parent(folder)
    free = shutil.disk_usage(place).free
    seen = f"{free / GIB:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("wrong", f"{place} is not writable", fix, name)
    if free < LOW_DISK:
        return Finding("wrong" if free < MIN_DISK else "note", seen, fix, name)
    return Finding("ok", seen, check=name)


def _existing_parent(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def model(config: Config) -> Findings:
    """The checkpoint exists, its headers are consistent, and it fits the device's memory."""
    from envs.model.device import resolve_device, resolve_dtype
    from envs.model.inspect import inspect_model

    name, revision = config.model.name, config.model.revision
    summary = inspect_model(name, revision)
    if summary.problems:
        yield Finding("wrong", "; ".join(summary.problems[:3]), "download the checkpoint again, or choose another")
        return
    seen = f"{name}{f' at {revision}' if revision else ''}: {summary.parameters / 1e6:.1f} million parameters"
    device = resolve_device(config.model.device)
    dtype = str(resolve_dtype(config.model.dtype, device)).removeprefix("torch.")
    needs = [n for n in summary.needs if n.dtype == dtype and n.device.name.startswith(device.type)]
    if needs and not any(n.fits for n in needs):
        need = needs[0]
        seen += f" need {need.bytes / GIB:.1f} GiB as {need.dtype}; {need.device.name} has {need.device.free / GIB:.1f}"
        yield Finding("wrong", seen, "choose model.dtype=bfloat16, another device, or a smaller model")
    else:
        yield Finding("ok", seen)


def task(config: Config) -> Findings:
    """Each split has samples, and an image that opens."""
    task = config.task
    for split in ("train", "validation", "test"):
        samples = task.load(split, 1)
        if not samples:
            raise UserError(f"task {task.name!r} has no samples in split {split}: choose another task")
        if samples[0].image is not None:
            samples[0].image.load()
    yield Finding("ok", f"{task.name}: train, validation and test have samples")


def store(config: Config) -> Findings:
    """The outcome store opens, on a local disk with free space."""
    from envs.engine.store import open_existing

    if config.store.path is None:
        yield Finding("ok", "none: outcomes stay in each process's memory")
        return
    path = Path(config.store.path).expanduser().absolute()
    kind = _file_system(_existing_parent(path))
    if kind in NETWORK_FILE_SYSTEMS:
        seen = f"{path} is on a network file system ({kind}), where SQLite's write-ahead log is not safe"
        yield Finding("wrong", seen, "set store.path to a file on a local disk of each node")
    if path.is_file():
        opened = open_existing(path)
        found = opened.inspect()
        opened.close()
        yield Finding("ok", f"{path}: {found['outcomes']} outcomes, {found['bytes'] / 2**20:.1f} MiB")
    else:
        yield _disk("store", path.parent, "set store.path to a file on a larger disk")


def _file_system(path: Path) -> str:
    """File system type of `path` in the kernel's mounts; "" if unknown."""
    try:
        lines = Path("/proc/mounts").read_text("utf-8").splitlines()
    except OSError:
        return ""
    mounts = {Path(fields[1]): fields[2] for fields in (line.split() for line in lines) if len(fields) > 2}
    return next((mounts[place] for place in (path, *path.parents) if place in mounts), "")


def ray_cluster(config: Config) -> Findings:
    """Starts or joins Ray as a run would, and compares the versions and packages of a worker."""
    import ray

    from cluster.connect import ConnectError, connect

    runners = config.runners
    try:
        with connect(runners.address, plan_layout(config).resources, timeout_s=runners.connect_timeout_s) as total:
            worker = ray.remote(num_cpus=0)(_versions).remote()
            there = ray.get(worker, timeout=runners.connect_timeout_s)
            nodes = sum(node["Alive"] for node in ray.nodes())
    except ray.exceptions.GetTimeoutError as error:
        raise ConnectError("Ray's workers do not start: see the logs in /tmp/ray/session_latest/logs") from error
    yield Finding(
        "ok", f"{runners.address} answers: {nodes} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    )
    here = _versions()
    different = [f"{name} {there[name]} on the worker, {here[name]} here" for name in here if there[name] != here[name]]
    if different:
        yield Finding("wrong", "; ".join(different), "install the same versions on every node (constraints.txt)")


def _versions() -> dict[str, str | None]:
    from cluster.package_check import package_conflict

    versions = {name: installed_version(name) for name in ("ray", "torch", "gymnasium")}
    return {"python": platform.python_version(), **versions, "packages": package_conflict() or "of ray-ctrl"}


CHECKS: dict[str, Callable[[Config], Findings]] = {
    "python": python_version, "packages": dependencies, "origins": origins, "device": devices, "resources": resources,
    "network": network, "ports": ports, "authentication": authentication, "disk": disks, "model": model, "task": task,
    "store": store, "ray": ray_cluster,
}  # fmt: skip
