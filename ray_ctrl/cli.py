"""The command line: one declaration per command, carried out by `run` of the module with the command's name.

Modules are imported when their command runs, so that `--help` and mistakes are answered immediately. A user's mistake
is one line on stderr and exit status 2; `RAY_CTRL_DEBUG=1` shows its traceback.
"""

import functools
import io
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import ray_ctrl
from envs.errors import UserError
from ray_ctrl.exits import guard, warn
from ray_ctrl.signals import Stopper


class Commands(TyperGroup):
    """All commands: SIGINT and SIGTERM interrupt each, with the exit status of the signal."""

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
store_app = typer.Typer(no_args_is_help=True, help="Inspect, prune or export an outcome store.")
app.add_typer(store_app, name="store")


def _option(*names: str, **more: Any) -> Any:
    return typer.Option(*names, show_default=False, **more)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Overrides of preset and file, such as `grpo.lr=3e-4`; all keys are in docs/config.md.",
        show_default=False,
    ),
]
Preset = Annotated[str, typer.Option("--preset", "-p", help="Shipped configuration: laptop, smoke, molmoe-1b.")]
ConfigFile = Annotated[Path | None, _option("--config", "-c", help="YAML file that overrides the preset.")]
Seed = Annotated[int | None, _option(help="Random seed; sets `run.seed`.")]
Task = Annotated[
    str | None,
    _option(
        "--task", "--tasks", help="Sets `task.name`: `scenes`, `textvqa=FOLDER`, a file of your own, or a mix of them."
    ),
]
Fresh = Annotated[int | None, _option(help="Draw new test scenes from this seed; sets `task.fresh_seed`.", min=0)]
TestSamples = Annotated[int | None, _option("--samples", help="Test samples; sets `task.test_samples`.", min=1)]
OPTIONS = {"seed": "run.seed", "task": "task.name", "fresh": "task.fresh_seed", "test_samples": "task.test_samples"}
RunDir = Annotated[Path | None, _option(help="Its folder; by default a new one named by time.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run and its resources; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
StorePath = Annotated[Path, typer.Argument(help="File of the store.")]


def command(group: typer.Typer = app, module: str = "", name: str = "run", **more: Any) -> Callable[[Any], Any]:
    """Registers a declaration, whose parameters are those of function `name` in `module`, by default the command's."""

    def register(declaration: Callable[..., None]) -> Callable[..., None]:
        home = module or f"ray_ctrl.commands.{declaration.__name__}"

        @functools.wraps(declaration)
        def call(**options: Any) -> None:
            try:
                status = getattr(import_module(home), name)(**_with_overrides(options))
            except ModuleNotFoundError as error:
                _raise_if_extra(error, "serve" if declaration.__name__ == "serve" else "train")
                raise
            if status:
                raise typer.Exit(status)

        group.command(name if group is store_app else declaration.__name__, **more)(call)
        return declaration

    return register


def _raise_if_extra(error: ModuleNotFoundError, extra: str) -> None:
    """A UserError that names the extra to install, unless a module of this project is missing: that is a bug."""
    package = (error.name or "").partition(".")[0]
    if package not in ("envs", "policies", "cluster", "ray_ctrl"):
        raise UserError(f"this command needs {package}: pip install 'ray-ctrl[{extra}]'") from error


def _with_overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Options with lists for None and `~` of paths expanded; those that set a configuration key as overrides."""
    found = {key: _expanded(value) for key, value in options.items() if key not in OPTIONS}
    for name in ("overrides", "arguments", "env"):
        if name in found:
            found[name] = list(found[name] or [])
    given = {OPTIONS[name]: value for name, value in options.items() if name in OPTIONS}
    if given:  # quoted, as a task's name may look like YAML
        quoted = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
        found["overrides"] = [*found.get("overrides", []), *quoted]
    return found


def _expanded(value: Any) -> Any:
    """A path with the home of `~`, which shells leave as it is in `--out=~/x`; anything else unchanged."""
    try:
        return value.expanduser() if isinstance(value, Path) else value
    except RuntimeError:
        raise UserError(f"{value.parts[0]} is no home on this machine: write the path in full") from None


def _print_version(asked: bool) -> None:
    if asked:
        print(f"ray-ctrl {ray_ctrl.__version__}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train and use a latency controller for MolmoE: given an image, a question and a budget in
    milliseconds, it picks the execution plan that answers best within the budget.

    Start with `ray-ctrl train`, then `ray-ctrl evaluate`, then `ray-ctrl answer IMAGE QUESTION
    --budget-ms 100`.
    """


@command()
def train(
    overrides: Overrides = None, preset: Preset = "laptop", config_file: ConfigFile = None, seed: Seed = None,
    task: Task = None, run_dir: RunDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run: --run-dir, or the newest one.")] = False,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Train a controller with GRPO; ends with the learning curve and the held-out table.

    Everything is written to one run folder. The first Ctrl-C finishes the iteration and writes a checkpoint; a second
    one, or one before the first iteration or during the evaluation, exits immediately. `--resume` continues.
    """


@command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="Run folder, or folder of an exported controller.")],
    overrides: Overrides = None,
    task: Task = None,
    fresh: Fresh = None,
    test_samples: TestSamples = None,
    out: Annotated[
        Path | None,
        _option(help="Folder of tables and plots; by default a new one in the run folder, or next to an export."),
    ] = None,
) -> None:
    """Evaluate a controller on every test sample under every held-out budget, and compare it with the baselines.

    Prints the table and saves it as CSV, Markdown and JSON, with two plots. The run's own configuration is used;
    overrides change it for this evaluation.
    """


@command()
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[LABEL=]RUN]... [SECTION.KEY=VALUE]...",
            help="Run folders or exported controllers, those of one label as its seeds; by default the newest run.",
            show_default=False,
        ),
    ] = None,
    fresh: Fresh = None,
    test_samples: TestSamples = None,
    out: Annotated[Path | None, _option(help="Folder of the report; by default a new one in the first run.")] = None,
) -> None:
    """Compare controllers with every rule and the oracle, on outcomes of all plans: tables and one HTML report.

    Rules are fitted on the controller's training samples; every method is calibrated to the same violation rate on
    validation samples. What the store does not know is run: about 200 plans of each sample.
    """


@command()
def profile(
    overrides: Overrides = None, preset: Preset = "laptop", config_file: ConfigFile = None, seed: Seed = None,
    task: Task = None, out: Annotated[Path, typer.Option(help="File to write.")] = Path("profile.json"),
) -> None:  # fmt: skip
    """Measure this device with real requests, for `latency.source=profiled`.

    `ray-ctrl train` does this by itself if it finds no profile; use the file with `latency.profile=FILE`.
    """


@command()
def importance(
    overrides: Overrides = None, preset: Preset = "laptop", config_file: ConfigFile = None, task: Task = None,
    samples: Annotated[int, typer.Option(help="Samples used, or all if there are fewer.", min=2)] = 256,
    split: Annotated[str, typer.Option(help="train or validation.")] = "validation",
    by: Annotated[
        str, typer.Option(help="cross_entropy (of the reference answers) or accuracy (of greedy answers).")
    ] = "cross_entropy",
    out: Annotated[Path | None, _option(help="File to write; by default importance.json next to the weights.")] = None,
) -> None:  # fmt: skip
    """Measure how much each block matters on a data set, by leaving one out at a time.

    The least important blocks are the first that a controller leaves out. Prints the scores next to those in use
    and, for MolmoE-1B, the published ones; an existing file is never overwritten.
    """


@command()
def answer(
    budget_ms: Annotated[float, typer.Option("--budget-ms", "-b", help="Latency budget, ms, above 0.")],
    image: Annotated[
        str | None, typer.Argument(help="Image file; `-` for a question without an image.", show_default=False)
    ] = None,
    question: Annotated[str | None, typer.Argument(help="The question.", show_default=False)] = None,
    overrides: Overrides = None,
    controller: Annotated[
        Path | None, _option(help="Run folder or exported controller; by default that of the newest run in run.folder.")
    ] = None,
    sample: Annotated[
        int | None, _option(help="Ask test sample N of the task instead; prints the reference answers too.", min=0)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of the request; the last one is reported.", min=1)] = 2,
    as_json: Json = False,
) -> None:
    """Answer one question within a latency budget; prints the plan chosen, the answer and stage latencies."""


@command()
def serve(
    path: Annotated[Path, typer.Argument(help="Run folder, or folder of an exported controller.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings such as `late=cheapest`; all are in docs/serving.md.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    address: Annotated[str, typer.Option(help="Ray cluster; `auto` is RAY_ADDRESS, else a local Ray.")] = "auto",
) -> None:  # fmt: skip
    """Serve a controller over HTTP on Ray Serve, with a page at `/`; a budget counts from the request's arrival.

    A controller that is written anew is loaded without losing a request. Ctrl-C stops.
    """


@command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="Run folder, controller, profile, importance file, or model: folder, hub id, `embedded`."),
    ],
    revision: Annotated[str | None, _option(help="Commit, branch or tag of a model on the hub.")] = None,
) -> None:
    """Describe a run folder, a controller, a profile, block importance or a model."""


@command()
def doctor(
    overrides: Overrides = None, preset: Preset = "laptop", config_file: ConfigFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not start or join Ray.")] = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Check everything that a run with this configuration needs, and say how to fix what is wrong.

    Exit status 1 if something is wrong.
    """


@command(context_settings={"ignore_unknown_options": True})
def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGUMENTS]...", help="Arguments of the command, after `--`.", show_default=False),
    ] = None,
    address: Annotated[
        str | None, _option(help="Job server (dashboard); by default RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265.")
    ] = None,
    command: Annotated[str, typer.Option(help="train, tune, evaluate, profile or doctor.")] = "train",
    working_dir: Annotated[Path, typer.Option(help="Folder to upload: the checkout.")] = Path(),
    python: Annotated[str | None, _option(help="Interpreter on the cluster.")] = None,
    auth: Annotated[str | None, _option(help="disabled or token; by default RAY_AUTH_MODE, else disabled.")] = None,
    runtime_env: Annotated[Path | None, _option(help="YAML file of Ray's runtime environment, such as `pip:`.")] = None,
    env: Annotated[list[str] | None, _option(help="NAME=VALUE for driver and workers.")] = None,
    cpus: Annotated[float, typer.Option(help="CPUs of the driver; 0 runs it on the head.", min=0)] = 0.0,
    gpus: Annotated[float, typer.Option(help="GPUs of the driver.", min=0)] = 0.0,
    submission_id: Annotated[str | None, _option(help="Name of the job.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Timeout of the job server, s.", min=0.1)] = 30.0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Exit after submission.")] = False,
    stop_on_interrupt: Annotated[bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job; send nothing.")] = False,
) -> None:
    """Run a command as a job on a Ray cluster: upload this folder, follow the log, return the job's exit status.

    `ray-ctrl submit -- --preset smoke` does what `ray job submit --working-dir . -- python train.py --preset smoke`
    does, with authentication, interpreter and run folder set.
    """


@command(module="ray_ctrl.tune")
def tune(
    sweep: Annotated[
        str | None, typer.Argument(help="YAML file of the sweep, or the name of a shipped one.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in --run-dir.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Search the configuration with many runs, ranked by validation; exports the best controller, a table and a plot.

    Shipped: ablations, smoke, halving, learning, bayesian, grid. Ctrl-C stops; `--resume --run-dir FOLDER` continues.
    """


@command(store_app, "ray_ctrl.commands.store", "inspect")
def store_inspect(path: StorePath) -> None:
    """Print the size of a store, and the models and configurations of its outcomes."""


@command(store_app, "ray_ctrl.commands.store", "prune")
def store_prune(
    path: StorePath,
    max_gb: Annotated[float | None, _option(help="Maximum size, GB.", min=0)] = None,
    unused_days: Annotated[float | None, _option(help="Delete entries not used for this many days.", min=0)] = None,
) -> None:
    """Delete entries that were not used for long, then the least recently used until the store is small enough."""


@command(store_app, "ray_ctrl.commands.store", "export")
def store_export(
    path: StorePath,
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    table: Annotated[str, typer.Option(help="outcomes or latency_tokens.")] = "outcomes",
) -> None:
    """Write a table of the store as Parquet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that a terminal lacks must not cost a result
    with warnings.catch_warnings():
        warnings.showwarning = warn
        return guard(lambda: app(args=arguments, prog_name="ray-ctrl", standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
