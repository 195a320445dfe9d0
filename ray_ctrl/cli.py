"""The command line. Each command imports what it needs, so that `--help` and mistakes answer immediately.

A user's mistake is one line on stderr and exit status 2; `RAY_CTRL_DEBUG=1` shows where it came from.
"""

import errno
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from envs.errors import UserError
from ray_ctrl.signals import Interrupted, Stopper

# What a file system refuses for reasons outside the program.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)


class Commands(TyperGroup):
    """All commands: each is interrupted by SIGINT and SIGTERM alike, with the status of the signal."""

    def invoke(self, ctx: Any) -> Any:
        with Stopper():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
store_app = typer.Typer(no_args_is_help=True, help="Look into and tidy an outcome store.")
app.add_typer(store_app, name="store")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Settings on top of preset and file, such as `grpo.lr=3e-4`. Values are YAML; all keys "
        "are in docs/config.md.",
        show_default=False,
    ),
]
Preset = Annotated[str, typer.Option("--preset", "-p", help="Shipped settings: laptop, smoke, molmoe-1b.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file laid over the preset.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random; sets `run.seed`.", show_default=False)]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        "--tasks",
        help="Questions and images; sets `task.name`: `scenes`, `textvqa=FOLDER`, a file of your own, or a mix.",
        show_default=False,
    ),
]


@app.callback()
def about() -> None:
    """Train and use a latency controller for MolmoE: given an image, a question and a budget in
    milliseconds, it picks the model setting that answers best in time.

    Start with `ray-ctrl train`, then `ray-ctrl evaluate`, then `ray-ctrl answer IMAGE QUESTION
    --budget-ms 100`.
    """


@app.command()
def train(
    overrides: Overrides = None,
    preset: Preset = "laptop",
    config: ConfigFile = None,
    seed: Seed = None,
    task: Task = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run folder; by default a new one by time.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run: --run-dir, or the newest one.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print resolved settings and resources; write nothing."),
    ] = False,
) -> None:
    """Train a controller with GRPO; ends with the learning curve and the held-out table.

    Everything goes into one run folder. Ctrl-C finishes the iteration, writes a checkpoint and
    leaves; a second one, or one before the first iteration or in the evaluation, leaves at once.
    `--resume` goes on from there.
    """
    from ray_ctrl.commands import train as room

    given = _given(overrides, seed, task)
    room.run(preset, config, given, run_dir=run_dir, resume=resume, dry_run=dry_run)


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="Run folder, or folder of an exported controller.")],
    overrides: Overrides = None,
    task: Task = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of tables and pictures; by default a new one in the run folder, or beside an export.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Put a controller to every test sample under every held-out budget, beside the baselines.

    Prints the table and saves it as CSV, Markdown and JSON, with two pictures. Settings are those
    of the run; overrides change them for this evaluation.
    """
    from ray_ctrl.commands import evaluate as room

    room.run(path, _given(overrides, None, task), out)


@app.command()
def profile(
    overrides: Overrides = None,
    preset: Preset = "laptop",
    config: ConfigFile = None,
    seed: Seed = None,
    task: Task = None,
    out: Annotated[Path, typer.Option(help="File of the profile table.")] = Path("profile.json"),
) -> None:
    """Measure this device with real requests, for the profiled clock.

    `ray-ctrl train` does this by itself where it has no table; use the file with `latency.profile=FILE`.
    """
    from ray_ctrl.commands import profile as room

    room.run(preset, config, _given(overrides, seed, task), out)


@app.command()
def importance(
    overrides: Overrides = None,
    preset: Preset = "laptop",
    config: ConfigFile = None,
    task: Task = None,
    samples: Annotated[int, typer.Option(help="Samples asked; all where there are fewer.", min=2)] = 256,
    split: Annotated[str, typer.Option(help="train or validation.")] = "validation",
    by: Annotated[
        str, typer.Option(help="cross_entropy (of the reference answers) or accuracy (of greedy answers).")
    ] = "cross_entropy",
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; by default importance.json beside the weights.", show_default=False),
    ] = None,
) -> None:
    """Measure how much each block matters on a data set, by leaving one out at a time.

    The least important blocks are the first that a controller leaves out. Prints the scores beside those in use
    and, for MolmoE-1B, the published ones; an existing file is never overwritten.
    """
    from ray_ctrl.commands import importance as room

    given = _given(overrides, None, task)
    room.run(preset, config, given, samples=samples, split=split, by=by, out=out)


@app.command()
def answer(
    image: Annotated[str, typer.Argument(help="Image file; `-` for a question without an image.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    budget_ms: Annotated[float, typer.Option("--budget-ms", "-b", help="Latency allowed, ms, above 0.")],
    controller: Annotated[
        Path | None,
        typer.Option(
            help="Run folder or exported controller; by default the newest run that has one.", show_default=False
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of the request; the last one is shown.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Answer one question within a budget; shows the setting chosen, the answer and stage times."""
    from ray_ctrl.commands import answer as room

    room.run(image, question, budget_ms, controller, repeats=repeats, as_json=as_json)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="Run folder, controller, profile table, importance file, or model: a folder, a hub id, `embedded`."
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="Commit, branch or tag of a model on the hub.", show_default=False)
    ] = None,
) -> None:
    """Say what a run folder, a controller, a profile table, block importance or a model holds."""
    from ray_ctrl.commands import inspect as room

    room.run(path, revision)


@app.command()
def doctor(
    overrides: Overrides = None,
    preset: Preset = "laptop",
    config: ConfigFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out starting or joining Ray.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Check everything a run with these settings needs, and say what mends what is wrong.

    Exit status 1 where something is wrong.
    """
    from ray_ctrl.commands import doctor as room

    raise typer.Exit(room.run(preset, config, overrides or [], quick=quick, as_json=as_json))


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGUMENTS]...", help="Arguments of the command, after `--`.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Job server (dashboard); by default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."),
    ] = None,
    command: Annotated[str, typer.Option(help="train, tune, evaluate, profile or doctor.")] = "train",
    working_dir: Annotated[Path, typer.Option(help="Folder that travels: the checkout.")] = Path(),
    python: Annotated[str | None, typer.Option(help="Interpreter on the cluster.", show_default=False)] = None,
    auth: Annotated[
        str | None, typer.Option(help="disabled or token; by default RAY_AUTH_MODE, else disabled.")
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML with more of Ray's runtime environment, such as `pip:`.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for driver and workers.")] = None,
    cpus: Annotated[float, typer.Option(help="CPUs the driver holds; 0 runs it on the head.", min=0)] = 0.0,
    gpus: Annotated[float, typer.Option(help="GPUs the driver holds.", min=0)] = 0.0,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job.", show_default=False)] = None,
    timeout_s: Annotated[float, typer.Option(help="Wait for the job server, s.", min=0.1)] = 30.0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave once the job is submitted.")] = False,
    stop_on_interrupt: Annotated[bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent; send nothing.")] = False,
) -> None:
    """Run a command as a job on a Ray cluster: send this folder, follow the log, return the job's exit status.

    `ray-ctrl submit -- --preset smoke` does what `ray job submit --working-dir . -- python train.py --preset smoke`
    does, with authentication, interpreter and run folder set.
    """
    from ray_ctrl.commands import submit as room

    request = room.Request(
        arguments or [], command, address, working_dir, python, auth, runtime_env, env or [], cpus, gpus,
        submission_id, timeout_s,
    )  # fmt: skip
    status = room.run(request, follow=not no_wait, stop_on_interrupt=stop_on_interrupt, dry_run=dry_run)
    raise typer.Exit(status)


@app.command()
def tune(
    sweep: Annotated[Path | None, typer.Argument(help="YAML file of the sweep.", show_default=False)] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; by default a new one by time.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in --run-dir.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print trials and resources; write nothing.")] = False,
) -> None:
    """Search settings with many runs, ranked by validation; exports the best controller, a table and a plot.

    Shipped sweeps are in `ray_ctrl/presets/sweeps`. Ctrl-C stops; `--resume --run-dir FOLDER` goes on.
    """
    from ray_ctrl import tune as room

    room.run(sweep, overrides or [], run_dir=run_dir, resume=resume, dry_run=dry_run)


StorePath = Annotated[Path, typer.Argument(help="File of the store.")]


@store_app.command("inspect")
def store_inspect(path: StorePath) -> None:
    """Say how much a store holds, and under which settings it was computed."""
    from ray_ctrl.commands import store as room

    room.inspect(path)


@store_app.command("prune")
def store_prune(
    path: StorePath,
    max_gb: Annotated[float | None, typer.Option(help="Largest size, GB.", min=0)] = None,
    unused_days: Annotated[float | None, typer.Option(help="Delete what was unused for so many days.", min=0)] = None,
) -> None:
    """Delete entries unused for long, then the longest unused until the store is small enough."""
    from ray_ctrl.commands import store as room

    room.prune(path, max_gb, unused_days)


@store_app.command("export")
def store_export(
    path: StorePath,
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    table: Annotated[str, typer.Option(help="outcomes or latency_tokens.")] = "outcomes",
) -> None:
    """Write a table of the store as Parquet."""
    from ray_ctrl.commands import store as room

    room.export(path, out, table)


def _given(overrides: list[str] | None, seed: int | None, task: str | None) -> list[str]:
    """Overrides with what short options set; a task's name may hold signs of YAML, so it goes in quotes."""
    seeds = [] if seed is None else [f"run.seed={seed}"]
    tasks = [] if task is None else [f"task.name={json.dumps(task, ensure_ascii=False)}"]
    return [*(overrides or []), *seeds, *tasks]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    from cluster.origin import wrong_origin

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± costs no result
    problem = wrong_origin()
    if problem is not None:
        return _complain(problem)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _guard(lambda: app(args=arguments, prog_name="ray-ctrl", standalone_mode=False))


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as one line, without the place in the code that Python would add."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _guard(command: Callable[[], Any]) -> int:
    """Runs `command` and turns a user's mistake into one line and exit status 2."""
    try:
        status = command()
    except UserError as error:
        return _complain(error.message, error)
    except Interrupted as error:
        print("interrupted", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # `| head`: the reader has all it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        status = _known(error)
        if status is None:
            raise
        return status
    return status if isinstance(status, int) else 0


def _known(error: Exception) -> int | None:
    """Exit status of an exception that is no fault of the program; None for all others."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of typer
        return _complain(error.format_message())
    if type(error).__name__ in ("Abort", "Exit"):
        return int(getattr(error, "exit_code", 130))
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return _complain(f"{error.filename or 'the disk'}: {error.strerror}; give another place, or free space", error)
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):  # raised on a Ray worker, wrapped on the way here
        return _complain(cause.message, error)
    return None


def _complain(message: str, error: Exception | None = None) -> int:
    if error is not None and os.environ.get("RAY_CTRL_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
