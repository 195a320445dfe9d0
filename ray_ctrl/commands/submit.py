"""`ray-ctrl submit -- ARGUMENTS`: runs `ray-ctrl train ARGUMENTS` as a Ray job, follows it, returns its exit status."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import jobs
from envs.errors import UserError
from ray_ctrl.console import console
from ray_ctrl.load_config import load_config, read_yaml

COMMANDS = ("train", "tune", "evaluate", "profile", "doctor")
WRITING = ("train", "tune")
"""Commands that write below `run.folder` unless an option says otherwise."""
OUTPUT_OPTIONS = ("run_dir", "out")
OUTPUT_KEYS = ("run.folder", "store.path", "latency.profile_dir")
INPUT_KEYS = ("latency.profile", "model.name", "model.block_importance", "task.name")


@dataclass(frozen=True)
class Request:
    """A job as the command line describes it.

    Attributes:
        arguments: of the ray-ctrl command.
        python: interpreter on the cluster; None is this one on a cluster of this machine, else `python`.
        runtime_env: YAML file with further keys of Ray's runtime environment.
        env: NAME=VALUE each.
    """

    arguments: Sequence[str] = ()
    command: str = "train"
    address: str | None = None
    working_dir: Path = Path()
    python: str | None = None
    auth: str | None = None
    runtime_env: Path | None = None
    env: Sequence[str] = ()
    cpus: float = 0.0
    gpus: float = 0.0
    submission_id: str | None = None
    timeout_s: float = 30.0


def run(*, no_wait: bool = False, stop_on_interrupt: bool = False, dry_run: bool = False, **options: Any) -> int:
    """Submits the job that `options`, those of `Request`, describe; returns its exit status, 0 if it is not followed.

    Raises:
        UserError, ConnectError: invalid arguments, or a cluster that does not answer or refuses the job.
    """
    request = Request(**options)
    address = jobs.http_address(request.address)
    auth = request.auth or os.environ.get("RAY_AUTH_MODE") or "disabled"
    job = make_job(request, address, auth)
    console.print(f"job at {address}: {job.entrypoint}")
    console.print(
        f"working directory: {len(job.sent.files)} files, {job.sent.bytes / 2**20:.1f} MiB; authentication {auth}"
    )
    if dry_run:
        for name, size in job.sent.files[:5]:
            console.print(f"  {size / 2**10:>8.0f} KiB  {name}")
        console.print(yaml.safe_dump({"runtime_env": job.environment()}, sort_keys=False))
        return 0
    server = jobs.client(address, auth, request.timeout_s)
    job_id = jobs.submit(server, job)
    console.print(f"job {job_id} submitted; stop it with: ray job stop --address {address} {job_id}")
    if no_wait:
        return 0
    try:
        status = jobs.follow(server, job_id, _write, lambda line: console.print(line))
    except KeyboardInterrupt:
        status = jobs.INTERRUPTED_STATUS
        if stop_on_interrupt:
            console.print(f"asking job to stop: {job_id}")
            console.print(f"job {job_id} is {jobs.stop(server, job_id)}")
        else:
            console.print(f"job {job_id} is still running; follow: ray job logs --follow {job_id}")
    else:
        console.print(f"job {job_id} ended with exit status {status}")
    return status


def make_job(request: Request, address: str, auth: str) -> jobs.Job:
    """The job behind a request.

    Raises:
        UserError: a command, option, value or path that would fail on the cluster, or output that would be lost.
    """
    if request.command not in COMMANDS:
        raise UserError(f"command {request.command!r} cannot be a job: choose one of {', '.join(COMMANDS)}")
    here = jobs.is_here(address)
    python = request.python or (sys.executable if here else "python")
    checkout = request.command == "train" and (request.working_dir / "train.py").is_file()
    program = ["train.py"] if checkout else ["-m", "ray_ctrl", request.command]
    env = {
        "RAY_AUTH_MODE": auth,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Time to finish the iteration and write a checkpoint before the driver is killed.
        "RAY_JOB_STOP_WAIT_TIME_S": str(jobs.STOP_WAIT_S),
    }
    runtime_env = _runtime_env(request.runtime_env)
    sent = jobs.upload(request.working_dir, runtime_env.get("excludes", ()))
    return jobs.Job(
        entrypoint=shlex.join([python, *program, *_arguments(request, here, sent)]),
        working_dir=request.working_dir,
        sent=sent,
        env=env | _variables(request.env),
        runtime_env=runtime_env,
        cpus=request.cpus,
        gpus=request.gpus,
        submission_id=request.submission_id,
    )


def _arguments(request: Request, here: bool, sent: jobs.Upload) -> list[str]:
    """The command's arguments for the cluster: checked, with paths that are valid there.

    A job starts in a copy of the working directory, which is removed after it: relative paths name other files there.

    Args:
        here: whether the cluster is this machine, so that its absolute paths are valid.
    """
    options = _parsed(request)
    places = _Places(request.working_dir.absolute(), here, frozenset(name for name, _ in sent.files))
    words = list(request.arguments)
    for name, value in options.items():
        if isinstance(value, Path) or (name in ("task", "sweep") and value):
            place = places.output if name in OUTPUT_OPTIONS else places.input
            words = [_replaced(word, str(value), place(str(value))) for word in words]
    for word in options.get("overrides") or []:
        key, _, value = word.partition("=")
        if key in (*OUTPUT_KEYS, *INPUT_KEYS) and value != "null":
            place = places.output if key in OUTPUT_KEYS else places.input
            words[words.index(word)] = f"{key}={place(value)}"
    if request.command in WRITING and not options.get("resume"):
        words += _output_settings(options, places)
    return words


def _output_settings(options: Mapping[str, Any], places: "_Places") -> Iterator[str]:
    """Overrides for a run folder and outcome store that outlive the job, unless the arguments have them."""
    given = dict(word.partition("=")[::2] for word in options.get("overrides") or [])
    run_dir = options.get("run_dir")
    folder = given.get("run.folder") or (run_dir and str(run_dir.parent))
    if not folder:
        if not places.here:
            raise UserError(
                "a job's working directory is removed after it: name a folder that outlives it and that you can "
                "reach, such as run.folder=/shared/runs"
            )
        folder = str(places.root / "runs")
        yield f"run.folder={folder}"
    if "preset" not in options or "store.path" in given:
        return
    store = load_config(options["preset"], options.get("config_file")).store.path
    if store is not None and Path(store).is_relative_to(Path.cwd()):  # a relative one: it would be lost with the job
        yield f"store.path={Path(places.output(folder)) / Path(store).name}"


def _parsed(request: Request) -> dict[str, Any]:
    """The command's options by name, parsed as on the cluster; the configuration is checked, too.

    Raises:
        UserError: an option, preset, key or value that the command would refuse.
    """
    import typer

    from ray_ctrl.cli import app

    group: Any = typer.main.get_command(app)
    try:
        context = group.commands[request.command].make_context(request.command, list(request.arguments))
    except typer.Exit:
        raise UserError("--help is not a job: leave it out, or run the command here") from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # of click's errors, whichever click typer brings
            raise
        raise UserError(f"{request.command} would refuse these arguments: {error.format_message()}") from None
    options = dict(context.params)
    if "preset" in options and not options.get("resume"):
        load_config(options["preset"], options.get("config_file"), options.get("overrides") or [])
    return options


def _replaced(word: str, value: str, moved: str) -> str:
    """`word` with `value`, alone or behind an option's `=`, replaced."""
    option, sign, given = word.partition("=")
    if word == value:
        return moved
    return f"{option}={moved}" if sign and given == value and option.startswith("-") else word


@dataclass(frozen=True)
class _Places:
    """What paths of the command line are for a job.

    Attributes:
        root: the working directory, absolute.
        here: whether the cluster is this machine.
        files: uploaded files, relative to the working directory.
    """

    root: Path
    here: bool
    files: frozenset[str]

    def output(self, path: str) -> str:
        """A path that is written: absolute, so that it outlives the job."""
        given = Path(path).expanduser()
        if given.is_absolute() or self.here:
            return str(given.absolute())
        raise UserError(
            f"{path} is relative, and a job's working directory is removed after it: give an absolute path that all "
            "nodes and you can reach, such as /shared/runs"
        )

    def input(self, text: str) -> str:
        """A path that is read, such as `data.jsonl` or `textvqa=FOLDER`; names of tasks and hub ids are unchanged."""
        name, sign, path = text.rpartition("=")
        given = Path(path).expanduser()
        if given.is_absolute() or not given.exists():
            return text
        if self.here:
            return f"{name}{sign}{given.absolute()}"
        resolved, root = given.resolve(), self.root.resolve()
        relative = resolved.relative_to(root).as_posix() if resolved.is_relative_to(root) else None
        if relative and any(file == relative or file.startswith(f"{relative}/") for file in self.files):
            return f"{name}{sign}{relative}"
        raise UserError(
            f"{path} is not uploaded with the job: it is outside {self.root} or in its ignore files; give a path that "
            "the cluster's nodes can read"
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
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"runtime environment {path} cannot be read: {' '.join(str(error).split())}") from None
    tree = read_yaml(text, f"runtime environment {path}", "keys such as 'pip:'")
    if "working_dir" in tree:
        raise UserError(f"runtime environment {path} names a working_dir: give it with --working-dir")
    return tree


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
