"""`ray-ctrl tune SWEEP.yaml`: many runs over a space of settings, chosen by validation. Ray Tune does the searching.

    SWEEP/sweep.yaml  trials/TRIAL/ (run folders)  outcomes.sqlite  tune/ (Ray Tune's state)
    SWEEP/controller/  summary.csv  summary.md  summary.json  sweep.png

Ctrl-C stops the trials at their last checkpoints; `--resume` goes on: finished trials stay, the others continue.
"""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from envs.errors import UserError
from envs.files import atomic_write, write_json
from ray_ctrl.console import console, table
from ray_ctrl.load_config import with_overrides
from ray_ctrl.provenance import provenance
from ray_ctrl.run_folder import RunFolder, free_folder
from ray_ctrl.signals import Stopper, telling
from ray_ctrl.tune.sweep import Sweep, dump, load_sweep

if TYPE_CHECKING:
    from ray_ctrl.tune.summary import Result

STATE = "tune"
STATUSES = "statuses.json"
STOPPING = "stopping the trials at their last checkpoints"
# Read by Ray Tune; set only where the user has not.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see stopping.Stopper
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # tracebacks are in the trials' error files
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Runs or resumes a sweep.

    Raises:
        Interrupted: by SIGINT or SIGTERM; what the trials have reached is kept.
        UserError: a sweep or folder that does not do, or no trial that reached a validation.
    """
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if resume:
        root = _existing(run_dir, path)
        sweep = load_sweep(root / "sweep.yaml", overrides)
    else:
        if path is None:
            raise UserError("which sweep? give its YAML file, or --resume --run-dir FOLDER")
        sweep = load_sweep(path, overrides)
        root = (
            run_dir or free_folder(Path(sweep.base.run.folder) / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}")
        ).absolute()
        if root.exists() and any(root.iterdir()):
            raise UserError(f"sweep folder {root} exists already: continue it with --resume, or choose another")
    if dry_run:
        show_plan(sweep, None)
    else:
        _run(sweep, root, resume)


def _existing(run_dir: Path | None, path: Path | None) -> Path:
    if run_dir is None:
        raise UserError("which sweep is to be resumed? give its folder with --run-dir")
    if path is not None and path.resolve() != (run_dir / "sweep.yaml").resolve():
        raise UserError(f"a resumed sweep keeps its own settings ({run_dir / 'sweep.yaml'}): leave {path} out")
    if not (run_dir / "sweep.yaml").is_file():
        raise UserError(f"{run_dir} is not a sweep folder: it has no sweep.yaml")
    return run_dir.absolute()


def _run(sweep: Sweep, root: Path, resume: bool) -> None:
    from cluster.connect import connect
    from ray_ctrl.tune.search import at_once, needed, totals, trial_resources
    from ray_ctrl.tune.trial import TRIALS

    if resume:
        statuses = recorded(root)
        if len(statuses) == sweep.trials and set(statuses.values()) == {"TERMINATED"}:
            console.print(f"all {sweep.trials} trials of this sweep ended before: nothing is left to train")
            finish(sweep, root, summarise(sweep, root, statuses))
            return
        for place in sorted((root / TRIALS).glob("*/run.json")):
            RunFolder.open(place.parent).check_importance()
    else:
        root.mkdir(parents=True, exist_ok=True)
        sweep = prepare(sweep, root)
        atomic_write(root / "sweep.yaml", dump(sweep))
    sweep = with_shared_store(sweep, root)
    runners = sweep.base.runners
    group = trial_resources(sweep.base)
    with connect(runners.address, needed(totals(group)), timeout_s=runners.connect_timeout_s) as there:
        concurrent = at_once(sweep, totals(group), there)
        show_plan(sweep, there)
        with Stopper() as stopper:
            with telling(f"go on with: {_resume(root)}"):
                with _tune_signal_kept(), stopper.patient(STOPPING):
                    statuses = drive(sweep, root, concurrent, resume, stopper)
                    results = summarise(sweep, root, statuses)
                ended = sum(status in ("TERMINATED", "ERROR") for status in statuses.values())
                if ended < sweep.trials:
                    stopper.obey()
                    raise UserError(f"{ended} of {sweep.trials} trials ended: go on with {_resume(root)}")
            finish(sweep, root, results)


def recorded(root: Path) -> dict[str, str]:
    """Each trial's last status as it was written down; empty before a first end or interruption."""
    try:
        return dict(json.loads((root / STATUSES).read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def _resume(root: Path) -> str:
    return f"ray-ctrl tune --resume --run-dir {root}"


def with_shared_store(sweep: Sweep, root: Path) -> Sweep:
    """The sweep with one outcome store for all trials in its folder, wherever that folder is now."""
    if not sweep.file.share_store or sweep.base.store.path is not None:
        return sweep
    return replace(sweep, base=with_overrides(sweep.base, [f"store.path={root / 'outcomes.sqlite'}"]))


def prepare(sweep: Sweep, root: Path) -> Sweep:
    """Profiles the device and computes the budgets once for all trials, which take copies of both from the folder.

    Nothing in the sweep returned names the folder itself, so that it may be moved.
    """
    from ray_ctrl.run_context import open_setting

    base = sweep.base
    if sweep.shares_budgets:
        table = open_setting(with_shared_store(sweep, root).base).with_clock(root).table
        if table is not None and not table.absolute().is_relative_to(root):
            base = with_overrides(base, [f"latency.profile={table.absolute()}"])
    judged = [item.key for item in sweep.space if item.key.startswith("reward.")]
    if judged and sweep.file.metric in ("validation/reward", "validation/score"):
        console.print(
            f"note: {judged[0]} is searched and changes what {sweep.file.metric} means; rank by metric: "
            "validation/accuracy, or another that it does not change",
            markup=False,
        )
    return replace(sweep, base=base)


def show_plan(sweep: Sweep, there: Mapping[str, float] | None) -> None:
    """What will run, and on what, before it starts."""
    from cluster.resources import machine_cpus
    from ray_ctrl.tune.search import at_once, totals, trial_resources

    file = sweep.file
    each = totals(trial_resources(sweep.base))
    have = dict(there) if there is not None else {"CPU": float(machine_cpus())}
    concurrent = at_once(sweep, each, have)
    held = f"{each['CPU']:g} CPUs and {each['GPU']:g} GPUs"
    offered = f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
    if not concurrent:
        raise UserError(
            f"a trial holds {held}, more than the {offered} there: lower runners.count or what each process holds"
        )
    how = file.search + (f" with {file.scheduler}" if file.scheduler != "none" else "")
    console.print(f"{sweep.trials} trials, {how}; up to {sweep.base.run.iterations} iterations each")
    for item in sweep.space:
        console.print(f"  {item.key:<28}{item.kind} {list(item.values)}", markup=False)
    rounds = -(-sweep.trials // concurrent)
    console.print(f"each trial holds {held}; there are {offered}: {concurrent} at a time, {rounds} rounds")
    console.print(
        f"ranked by {file.metric}, {file.mode}imum; store {sweep.base.store.path or 'shared in the sweep folder'}"
    )


def drive(sweep: Sweep, root: Path, concurrent: int, resume: bool, stopper: Stopper) -> dict[str, str]:
    """Ray Tune's part; returns each trial's last status."""
    from ray import tune

    from ray_ctrl.tune.progress import Progress
    from ray_ctrl.tune.schedulers import scheduler
    from ray_ctrl.tune.search import param_space, quiet, searcher, trial_resources
    from ray_ctrl.tune.summary import read_results
    from ray_ctrl.tune.trial import TRIALS, train_trial

    quiet()
    trainable = tune.with_parameters(train_trial, sweep=sweep, root=str(root))
    trainable = tune.with_resources(trainable, trial_resources(sweep.base))
    progress = Progress(sweep, root, lambda: stopper.requested)
    state = root / STATE
    restorable = resume and tune.Tuner.can_restore(str(state))
    if (root / TRIALS).exists() and not restorable:
        # Killed before Tune had saved anything: it will name its trials anew, and none may count twice.
        (root / TRIALS).rename(free_folder(root / f"{TRIALS}-before"))
    if restorable:
        tuner = tune.Tuner.restore(str(state), trainable, restart_errored=True, param_space=param_space(sweep))
        progress.recall(score for result in read_results(sweep, root, {}) for _, score in result.curve)
        # Tune restores what it was given at the start: without a memory, and blind to settings changed since.
        tuner._local_tuner.get_run_config().callbacks = [progress]
        tuner._local_tuner._tune_config.scheduler = scheduler(sweep, root)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=param_space(sweep),
            tune_config=tune.TuneConfig(
                # Schedulers and searchers carry metric and mode themselves.
                reuse_actors=True,  # a trial begins in a process that has everything loaded
                num_samples=1 if sweep.file.search == "grid" else sweep.file.trials or 1,
                search_alg=searcher(sweep, concurrent),
                scheduler=scheduler(sweep, root),
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name=STATE,
                storage_path=str(root),
                verbose=0,
                callbacks=[progress],
                failure_config=tune.FailureConfig(max_failures=sweep.file.retries),
            ),
        )
    tuner.fit()
    return progress.statuses()


def summarise(sweep: Sweep, root: Path, statuses: Mapping[str, str]) -> Sequence["Result"]:
    """Table and plot of what the trials have reached; returns it, the best trial first."""
    from ray_ctrl.tune.summary import read_results, rows, write_summary

    results = read_results(sweep, root, statuses)
    if statuses:
        write_json(root / STATUSES, dict(statuses))
    if results:
        write_summary(sweep, results, root, provenance())
        header, lines = rows(sweep, results)
        console.print(table(header, lines, f"{len(results)} trials by {sweep.file.metric}"))
    return results


def finish(sweep: Sweep, root: Path, results: Sequence["Result"]) -> None:
    """Exports the best controller."""
    from ray_ctrl.tune.summary import export_winner

    if not results or results[0].best is None:
        raise UserError(f"no trial of {root} reached a validation: look at the error files under {root / STATE}")
    winner = results[0]
    export_winner(winner, root)
    chosen = ", ".join(f"{key}={value}" for key, value in winner.chosen.items())
    score, at = (winner.best or (0, 0.0))[1], (winner.best or (0, 0.0))[0]
    console.print(
        f"best: trial {winner.trial}, {sweep.file.metric} {score:+.4f} after iteration {at}: {chosen}", markup=False
    )
    console.print(f"controller, table and plot in {root}; next: ray-ctrl evaluate {root / 'controller'}", markup=False)


@contextmanager
def _tune_signal_kept() -> Iterator[None]:
    """Gives SIGUSR1 back, what Ray Tune is told by (see Progress): Tune leaves its handler behind."""
    before = signal.getsignal(signal.SIGUSR1)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
