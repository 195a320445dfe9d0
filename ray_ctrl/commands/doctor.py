"""`ray-ctrl doctor`: looks at everything a run needs, and says for each thing that is wrong what mends it.

Every check stands alone: one that fails, or even breaks, keeps none of the others from being made.
"""

import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from envs.errors import UserError, first_line
from ray_ctrl.config import Config
from ray_ctrl.console import console
from ray_ctrl.load_config import load_config
from ray_ctrl.preflight import plan_layout

GIB = 2**30
LEAST_DISK = GIB
ENOUGH_DISK = 10 * GIB
# Ray stops writing to a disk that is fuller than this (its own default).
RAY_DISK_SHARE = 0.95
OBJECT_STORE = 256 * 2**20
RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs", 10001: "Ray clients"}
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "fuse.sshfs", "9p", "glusterfs", "beegfs")
PYTHONS = ((3, 11), (3, 13))

Level = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What one check saw; `fix` says what to do where it is not `ok`."""

    check: str
    level: Level
    seen: str
    fix: str = ""


def run(
    preset: str, config_file: Path | None, overrides: Sequence[str], *, quick: bool = False, as_json: bool = False
) -> int:
    """Prints the findings; returns 1 where something is wrong, else 0.

    Args:
        quick: leave out starting or joining Ray.

    Raises:
        UserError: settings that do not do.
    """
    config = load_config(preset, config_file, overrides)
    findings = []
    for finding in examine(config, quick=quick):
        findings.append(finding)
        if not as_json:
            _show(finding)
    wrong = sum(finding.level == "wrong" for finding in findings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(f"{wrong} thing(s) to mend" if wrong else "all is well", style="bold")
    return 1 if wrong else 0


def examine(config: Config, *, quick: bool = False) -> Iterator[Finding]:
    """All findings, one check after the other."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": python_version,
        "packages": packages,
        "origins": origins,
        "device": lambda: devices(config),
        "resources": lambda: resources(config),
        "network": network,
        "ports": ports,
        "authentication": authentication,
        "disk": lambda: disks(config),
        "model": lambda: model(config),
        "task": lambda: task(config),
        "store": lambda: store(config),
    }
    if not quick:
        checks["ray"] = lambda: ray_itself(config)
    for name, check in checks.items():
        yield from _guarded(name, check)


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except UserError as error:
        seen, _, fix = error.message.rpartition(": ")
        yield Finding(name, "wrong", seen or error.message, fix if seen else "see the message")
    except Exception as error:
        seen = f"the check broke: {type(error).__name__}: {first_line(error)}"
        yield Finding(name, "wrong", seen, "report this with its output")


def _show(finding: Finding) -> None:
    style = {"ok": "green", "note": "yellow", "wrong": "bold red"}[finding.level]
    console.print(f"[{style}]{finding.level:<6}[/]", end="")
    console.print(f"{finding.check:<16}{finding.seen}", markup=False)
    if finding.fix:
        console.print(f"{'':<22}-> {finding.fix}", markup=False)


# -- software ---------------------------------------------------------------------------------------------


def python_version() -> Iterator[Finding]:
    """Python between the lowest and the highest version tested."""
    lowest, highest = PYTHONS
    here = platform.python_version()
    if lowest <= tuple(map(int, platform.python_version_tuple()[:2])) <= highest:
        yield Finding("python", "ok", here)
    else:
        allowed = f"{lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}"
        yield Finding("python", "wrong", here, f"make the environment with Python {allowed}")


def packages() -> Iterator[Finding]:
    """Every dependency installed in a version that is allowed."""
    from packaging.requirements import Requirement

    wrong, found = [], {}
    for text in requirements():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        found[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} does not meet {requirement.specifier}")
    if wrong:
        yield Finding("packages", "wrong", "; ".join(wrong), "pip install -c constraints.txt -e .")
    else:
        shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "ray") if name in found)
        yield Finding("packages", "ok", f"{len(found)} as required; {shown}")


def requirements() -> list[str]:
    """Dependencies as the checkout names them, else as the installed package does.

    Raises:
        UserError: neither is there.
    """
    import tomllib

    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"])
    try:
        return list(metadata.requires("ray-ctrl") or [])
    except metadata.PackageNotFoundError:
        raise UserError("ray-ctrl is neither installed nor run from its checkout: pip install it") from None


def origins() -> Iterator[Finding]:
    """The four packages are this project's own; their names exist elsewhere, too."""
    from cluster.package_check import wrong_origin

    problem = wrong_origin()
    root = Path(__file__).resolve().parents[2]
    if problem is None:
        yield Finding("origins", "ok", f"envs, policies, cluster and ray_ctrl come from {root}")
    else:
        seen, _, fix = problem.rpartition(": ")
        yield Finding("origins", "wrong", seen, fix)


# -- machine ----------------------------------------------------------------------------------------------


def devices(config: Config) -> Iterator[Finding]:
    """The device the model is to run on is there and usable from torch."""
    import torch

    from cluster.resources import machine_cpus
    from envs.model.device import resolve_device

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cpus = machine_cpus()
    names = [
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.mem_get_info(i)[0] / GIB:.0f} GiB free)" for i in range(gpus)
    ]
    seen = (
        f"{cpus} CPUs usable, {', '.join(names) or 'no GPU'}; the model runs on {resolve_device(config.model.device)}"
    )
    yield Finding("device", "ok", seen)
    if not gpus and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        build = torch.version.cuda or "a CPU build"
        fix = "install PyTorch for this driver (see pytorch.org), or set CUDA_VISIBLE_DEVICES right"
        yield Finding("device", "note", f"there is an NVIDIA driver, but torch ({build}) sees no GPU", fix)
    if config.model.threads > cpus:
        yield Finding(
            "device", "wrong", f"model.threads = {config.model.threads} on {cpus} CPUs", f"model.threads={cpus} or less"
        )
    threads = os.environ.get("OMP_NUM_THREADS")
    if config.runners.count > 1 and (threads is None or int(threads) > config.model.threads):
        seen = f"OMP_NUM_THREADS is {threads or 'not set'}: {config.runners.count} runners may crowd one another"
        yield Finding("device", "note", seen, f"export OMP_NUM_THREADS={config.model.threads}")


def resources(config: Config) -> Iterator[Finding]:
    """The settings fit together and, on this machine, its CPUs and GPUs."""
    layout = plan_layout(config)
    plan = layout.resources
    roles = ", ".join(f"{role.count} {role.name}" for role in plan.roles)
    yield Finding("resources", "ok", f"{roles}: {plan.cpus:g} CPUs and {plan.gpus:g} GPUs to be placed by Ray")


def network() -> Iterator[Finding]:
    """Processes of this machine reach one another under the address that Ray gives out."""
    from ray.util import get_node_ip_address

    address = get_node_ip_address()
    try:
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection((address, port), timeout=5):
                yield Finding("network", "ok", f"this machine answers at {address}")
    except OSError as error:
        fix = "let the firewall pass connections of this machine to itself, or set RAY_NODE_IP_ADDRESS=127.0.0.1"
        yield Finding("network", "wrong", f"this machine does not answer at {address}, where Ray looks: {error}", fix)


def ports() -> Iterator[Finding]:
    """What listens on Ray's usual ports; a run with its own local Ray needs none of them."""
    taken = [f"{port} ({what})" for port, what in RAY_PORTS.items() if _listens(port)]
    if taken:
        fix = "nothing to do if that is your Ray cluster; else start it with other ports (ray start --port ...)"
        yield Finding("ports", "note", f"in use: {', '.join(taken)}", fix)
    else:
        yield Finding("ports", "ok", f"{', '.join(map(str, RAY_PORTS))} are free")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def authentication() -> Iterator[Finding]:
    """Ray switches authentication on by itself where it finds a token: better to say it."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    kept = Path("~/.ray/auth_token").expanduser()
    source = next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), None)
    source = source or (str(kept) if kept.is_file() else None)
    fix = "export RAY_AUTH_MODE=disabled, or RAY_AUTH_MODE=token with a token (ray get-auth-token --generate)"
    if mode == "token" and source is None:
        yield Finding("authentication", "wrong", "RAY_AUTH_MODE=token, but there is no token", fix)
    elif mode not in ("", "token", "disabled"):
        yield Finding("authentication", "wrong", f"RAY_AUTH_MODE={mode!r} is not known", fix)
    elif not mode and source is not None:
        seen = f"RAY_AUTH_MODE is not set and a token lies at {source}: `ray start` uses it, ray-ctrl does not"
        yield Finding("authentication", "note", seen, fix)
    else:
        yield Finding("authentication", "ok", f"mode {mode or 'disabled, as ray-ctrl sets it'}")


def disks(config: Config) -> Iterator[Finding]:
    """Room and rights where runs, Ray's files and Ray's shared memory go."""
    runs = Path(config.run.folder)
    yield from _disk("run folder", runs, "set run.folder to a folder on a larger disk")
    temporary = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    yield from _disk("ray files", temporary, "free space there, or set RAY_TMPDIR")
    usage = shutil.disk_usage(_existing_parent(temporary))
    full = 1.0 - usage.free / usage.total
    if full > RAY_DISK_SHARE:
        seen = f"the disk of {temporary} is {full:.0%} full: Ray refuses to write above {RAY_DISK_SHARE:.0%}"
        yield Finding("ray files", "wrong", seen, "free space there, or set RAY_TMPDIR")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        if free < OBJECT_STORE:
            seen = f"/dev/shm has {free / 2**20:.0f} MiB free, Ray's object store wants {OBJECT_STORE / 2**20:.0f}"
            yield Finding("shared memory", "note", seen, "start the container with --shm-size=2g")
        else:
            yield Finding("shared memory", "ok", f"{free / GIB:.1f} GiB free in {shared}")


def _disk(name: str, folder: Path, fix: str) -> Iterator[Finding]:
    place = _existing_parent(folder)
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        yield Finding(name, "wrong", f"{place} cannot be written", fix)
    elif free < LEAST_DISK:
        yield Finding(name, "wrong", f"{free / GIB:.2f} GiB free at {place}", fix)
    elif free < ENOUGH_DISK:
        yield Finding(name, "note", f"{free / GIB:.1f} GiB free at {place}", fix)
    else:
        yield Finding(name, "ok", f"{free / GIB:.0f} GiB free at {place}")


def _existing_parent(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


# -- model, data, store -----------------------------------------------------------------------------------


def model(config: Config) -> Iterator[Finding]:
    """The checkpoint can be found, its headers fit, and it fits the memory of the device."""
    from envs.model.device import resolve_device, resolve_dtype
    from envs.model.inspect import inspect_model

    summary = inspect_model(config.model.name)
    if summary.problems:
        yield Finding(
            "model", "wrong", "; ".join(summary.problems[:3]), "fetch the checkpoint again, or choose another"
        )
        return
    seen = f"{config.model.name}: {summary.parameters / 1e6:.1f} million parameters"
    device = resolve_device(config.model.device)
    kind, dtype = device.type, str(resolve_dtype(config.model.dtype, device)).removeprefix("torch.")
    needs = [n for n in summary.needs if n.dtype == dtype and n.device.name.startswith(kind)]
    short = [n for n in needs if not n.fits]
    if needs and len(short) == len(needs):
        need = short[0]
        seen += f" need {need.bytes / GIB:.1f} GiB as {need.dtype}; {need.device.name} has {need.device.free / GIB:.1f}"
        yield Finding("model", "wrong", seen, "choose model.dtype=bfloat16, another device, or a smaller model")
    else:
        yield Finding("model", "ok", seen)


def task(config: Config) -> Iterator[Finding]:
    """Each split has samples, and an image that opens."""
    from envs.data import load_task

    for split in ("train", "validation", "test"):
        samples = load_task(config.task.name, split, 1, config.task.seed, on_broken=config.task.on_invalid_row)
        if not samples:
            raise UserError(f"task {config.task.name!r} has no samples in split {split}: choose another task")
        if samples[0].image is not None:
            samples[0].image.load()
    yield Finding("task", "ok", f"{config.task.name}: train, validation and test have samples")


def store(config: Config) -> Iterator[Finding]:
    """The outcome store opens, on a disk of this machine, with room to grow."""
    from envs.engine.store import open_existing

    if config.store.path is None:
        yield Finding("store", "ok", "none: outcomes stay in each process's memory")
        return
    path = Path(config.store.path).expanduser().absolute()
    kind = _file_system(_existing_parent(path))
    if kind in NETWORK_FILE_SYSTEMS:
        seen = f"{path} lies on a network file system ({kind}); SQLite's write-ahead mode is not safe there"
        yield Finding("store", "wrong", seen, "set store.path to a file on a disk of each node")
    if path.is_file():
        opened = open_existing(path)
        found = opened.inspect()
        opened.close()
        yield Finding("store", "ok", f"{path}: {found['outcomes']} outcomes, {found['bytes'] / 2**20:.1f} MiB")
    else:
        yield from _disk("store", path.parent, "set store.path to a file on a larger disk")


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`, by the kernel's table of mounts; "" where there is none."""
    try:
        lines = Path("/proc/mounts").read_text("utf-8").splitlines()
    except OSError:
        return ""
    mounts = {Path(fields[1]): fields[2] for fields in (line.split() for line in lines) if len(fields) > 2}
    return next((mounts[place] for place in (path, *path.parents) if place in mounts), "")


# -- Ray --------------------------------------------------------------------------------------------------


def ray_itself(config: Config) -> Iterator[Finding]:
    """Starts or joins Ray as a run would, and has a worker tell its versions."""
    import ray

    from cluster.connect import ConnectError, connect, is_local

    plan = plan_layout(config).resources
    address = config.runners.address
    started = time.monotonic()
    try:
        with connect(address, plan, timeout_s=config.runners.connect_timeout_s) as total:
            worker = ray.remote(num_cpus=0)(_versions).remote()
            there = ray.get(worker, timeout=config.runners.connect_timeout_s)
            nodes = sum(node["Alive"] for node in ray.nodes())
            spent = time.monotonic() - started
    except (ConnectError, ray.exceptions.GetTimeoutError) as error:
        first, _, fix = str(error).strip().partition(": ")
        yield Finding(
            "ray", "wrong", first or type(error).__name__, fix or "see the logs under /tmp/ray/session_latest/logs"
        )
        return
    where = "a local Ray" if is_local(address) else f"the cluster at {address}"
    held = f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    seen = f"{where} answers after {spent:.0f} s: {nodes} node(s), {held}"
    yield Finding("ray", "ok", seen)
    here = _versions()
    different = [
        f"{name} {there.get(name)} there, {version} here"
        for name, version in here.items()
        if there.get(name) != version
    ]
    if different:
        yield Finding("ray", "wrong", "; ".join(different), "install the same versions on every node (constraints.txt)")


def _versions() -> dict[str, Any]:
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("ray", "torch", "gymnasium"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
