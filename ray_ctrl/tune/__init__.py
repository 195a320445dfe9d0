"""`ray-ctrl tune SWEEP.yaml`: many runs over a search space, ranked by validation. Ray Tune does the search.

    SWEEP/sweep.yaml  trials/TRIAL/ (run folders)  outcomes.sqlite  tune/ (Ray Tune's state)
    SWEEP/controller/  summary.csv  summary.md  summary.json  sweep.png

Ctrl-C stops the trials at their last checkpoints; `--resume` keeps finished trials and continues the others.
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
from ray_ctrl.run_folder import RunFolder, check_writable, claim_folder, free_folder, locked
from ray_ctrl.signals import Stopper, hint_on_interrupt
from ray_ctrl.tune.sweep import Sweep, dump, find_sweep, load_sweep

if TYPE_CHECKING:
    from ray_ctrl.tune.summary import Result

STATE = "tune"
STATUSES = "statuses.json"
# Read by Ray Tune; the user's own values are kept.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see signals.Stopper
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # tracebacks are in the trials' error files
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run(
    sweep: str | None,
    overrides: Sequence[str] = (),
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Runs or resumes a sweep.

    Args:
        sweep: YAML file, or the name of a shipped sweep.

    Raises:
        Interrupted: by SIGINT or SIGTERM; the trials' checkpoints are kept.
        UserError: an invalid sweep or folder, or no trial that reached a validation.
    """
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if resume:
        root = _sweep_folder(run_dir, sweep)
        loaded = load_sweep(root / "sweep.yaml", overrides)
    elif sweep is None:
        raise UserError("no sweep: give its YAML file or name, or --resume --run-dir FOLDER")
    else:
        loaded = load_sweep(find_sweep(sweep), overrides)
        default = Path(loaded.base.run.folder) / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
        root = (run_dir or default).absolute()
        RunFolder.refuse(root)
    if dry_run:
        print_plan(loaded)
        return
    if not resume:
        root = root if run_dir else claim_folder(root)  # two sweeps may begin in the same second
        check_writable(root)
    with locked(root):
        if not resume:
            RunFolder.refuse(root)
        _run(loaded, root, resume)


def _sweep_folder(run_dir: Path | None, sweep: str | None) -> Path:
    if run_dir is None:
        raise UserError("no sweep to resume: give its folder with --run-dir")
    if not (run_dir / "sweep.yaml").is_file():
        raise UserError(f"{run_dir} is not a sweep folder: it has no sweep.yaml")
    if sweep is not None and find_sweep(sweep).resolve() != (run_dir / "sweep.yaml").resolve():
        raise UserError(f"a resumed sweep uses its own {run_dir / 'sweep.yaml'}: leave out {sweep}")
    return run_dir.absolute()


def _run(sweep: Sweep, root: Path, resume: bool) -> None:
    from cluster.connect import connect
    from ray_ctrl.tune.search import concurrent_trials, needed, totals, trial_resources
    from ray_ctrl.tune.trial import TRIALS

    if resume:
        statuses = recorded(root)
        if len(statuses) == sweep.trials and set(statuses.values()) == {"TERMINATED"}:
            console.print(f"all {sweep.trials} trials of this sweep have ended: nothing is left to train")
            finish(sweep, root, summarize(sweep, root, statuses))
            return
        for place in sorted((root / TRIALS).glob("*/run.json")):
            RunFolder.open(place.parent).check_importance()
    else:
        sweep = prepare(sweep, root)
        atomic_write(root / "sweep.yaml", dump(sweep))
    sweep = with_shared_store(sweep, root)
    runners, each = sweep.base.runners, totals(trial_resources(sweep.base))
    how = f"ray-ctrl tune --resume --run-dir {root}"
    with connect(runners.address, needed(each), timeout_s=runners.connect_timeout_s) as available, Stopper() as stopper:
        print_plan(sweep, available)
        with hint_on_interrupt(f"continue with: {how}"):
            with _tune_signal_kept(), stopper.defer_interrupt("the trials stop at their last checkpoints"):
                statuses = drive(sweep, root, concurrent_trials(sweep, each, available), resume, stopper)
                results = summarize(sweep, root, statuses)
            ended = sum(status in ("TERMINATED", "ERROR") for status in statuses.values())
            if ended < sweep.trials:
                stopper.raise_if_interrupted()
                raise UserError(f"{ended} of {sweep.trials} trials ended: continue with {how}")
        finish(sweep, root, results)


def recorded(root: Path) -> dict[str, str]:
    """Each trial's last recorded status; empty before the first end or interruption."""
    try:
        return dict(json.loads((root / STATUSES).read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def with_shared_store(sweep: Sweep, root: Path) -> Sweep:
    """The sweep with one outcome store of all trials in its folder, wherever that folder is now."""
    if not sweep.file.share_store or sweep.base.store.path is not None:
        return sweep
    return replace(sweep, base=with_overrides(sweep.base, [f"store.path={root / 'outcomes.sqlite'}"]))


def prepare(sweep: Sweep, root: Path) -> Sweep:
    """Profiles the device and computes the budgets once for all trials, which copy both from the folder.

    The sweep returned does not contain the folder's own path, so that the folder may be moved.
    """
    from ray_ctrl.run_context import open_context

    base = sweep.base
    if sweep.shares_budgets:
        profile = open_context(with_shared_store(sweep, root).base).with_profile(root).profile
        if profile is not None and not profile.absolute().is_relative_to(root):
            base = with_overrides(base, [f"latency.profile={profile.absolute()}"])
    changing = [item.key for item in sweep.space if item.key.startswith("reward.")]
    if changing and sweep.file.metric in ("validation/reward", "validation/score"):
        console.print(
            f"note: {changing[0]} is searched and changes the meaning of {sweep.file.metric}; rank by metric: "
            "validation/accuracy, or another that it does not change"
        )
    return replace(sweep, base=base)


def print_plan(sweep: Sweep, available: Mapping[str, float] | None = None) -> None:
    """What will run, and on which resources, before it starts.

    Args:
        available: of the cluster, by Ray's names; None takes this machine's, if the trials would run here.

    Raises:
        UserError: not even one trial fits.
    """
    from cluster.connect import is_local
    from ray_ctrl.preflight import machine_resources
    from ray_ctrl.tune.search import concurrent_trials, totals, trial_resources

    file, each = sweep.file, totals(trial_resources(sweep.base))
    address = sweep.base.runners.address
    if available is None and is_local(address):
        available = machine_resources(each["GPU"])
    uses = _amounts(each)
    where = f"on the cluster at {address}, which a dry run does not ask"
    if available is not None:
        concurrent = concurrent_trials(sweep, each, available)
        if not concurrent:
            raise UserError(
                f"a trial needs {uses}, more than the {_amounts(available)} available: lower runners.count or the "
                "resources of each"
            )
        where = f"of {_amounts(available)}: {concurrent} at a time"
    how = file.search + (f" with {file.scheduler}" if file.scheduler != "none" else "")
    console.print(f"{sweep.trials} trials, {how}; up to {sweep.base.run.iterations} iterations each")
    for item in sweep.space:
        console.print(f"  {item.key:<28}{item.kind} {list(item.values)}")
    console.print(f"each trial uses {uses} {where}")
    store = sweep.base.store.path or "shared in the sweep folder"
    console.print(f"ranked by {file.metric}, {file.mode}imum; store {store}")


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"


def drive(sweep: Sweep, root: Path, concurrent: int, resume: bool, stopper: Stopper) -> dict[str, str]:
    """Ray Tune's part; returns each trial's last status."""
    from ray import tune

    from policies.grpo.rllib_adapter import replace_restored
    from ray_ctrl.tune.progress import Progress
    from ray_ctrl.tune.search import param_space, scheduler, searcher, silence_tune, trial_resources
    from ray_ctrl.tune.summary import read_results
    from ray_ctrl.tune.trial import TRIALS, train_trial

    silence_tune()
    trainable = tune.with_parameters(train_trial, sweep=sweep, root=str(root))
    trainable = tune.with_resources(trainable, trial_resources(sweep.base))
    progress = Progress(sweep, lambda: stopper.requested)
    state, space, halving = root / STATE, param_space(sweep), scheduler(sweep, root)
    restorable = resume and tune.Tuner.can_restore(str(state))
    if (root / TRIALS).exists() and not restorable:
        # Killed before Tune had saved its state: it will name its trials anew, and none may count twice.
        (root / TRIALS).rename(free_folder(root / f"{TRIALS}-before"))
    if restorable:
        tuner = tune.Tuner.restore(str(state), trainable, restart_errored=True, param_space=space)
        progress.recall(score for result in read_results(sweep, root, {}) for _, score in result.curve)
        # Tune restores the objects pickled at the start, without what they learned and with the old configuration.
        replace_restored(tuner, callbacks=[progress], scheduler=halving)
    else:
        config = tune.TuneConfig(  # schedulers and searchers have their own metric and mode
            reuse_actors=True,  # a trial begins in a process that has everything loaded
            num_samples=1 if sweep.file.search == "grid" else sweep.file.trials or 1,
            search_alg=searcher(sweep, concurrent),
            scheduler=halving,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        )
        failures = tune.FailureConfig(max_failures=sweep.file.retries)
        run_config = tune.RunConfig(
            name=STATE, storage_path=str(root), verbose=0, callbacks=[progress], failure_config=failures
        )
        tuner = tune.Tuner(trainable, param_space=space, tune_config=config, run_config=run_config)
    tuner.fit()
    return progress.statuses()


def summarize(sweep: Sweep, root: Path, statuses: Mapping[str, str]) -> Sequence["Result"]:
    """Writes and prints the table and plot of the trials; returns their results, the best trial first."""
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
        raise UserError(f"no trial of {root} reached a validation: see the error files below {root / STATE}")
    winner, (iteration, score) = results[0], results[0].best
    export_winner(winner, root)
    chosen = ", ".join(f"{key}={value}" for key, value in winner.chosen.items())
    console.print(
        f"best: trial {winner.trial}, {sweep.file.metric} {score:+.4f} after iteration {iteration}: {chosen}\n"
        f"controller, table and plot in {root}; next: ray-ctrl evaluate {root / 'controller'}"
    )


@contextmanager
def _tune_signal_kept() -> Iterator[None]:
    """Restores the handler of SIGUSR1, by which Progress stops Ray Tune: Tune does not remove its own."""
    before = signal.getsignal(signal.SIGUSR1)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
