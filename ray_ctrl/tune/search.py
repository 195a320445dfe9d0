"""From a sweep to Ray Tune: search space, searcher, scheduler, and the resources of a trial."""

import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from cluster.resources import ResourcePlan, Role
from ray_ctrl.config import Config
from ray_ctrl.preflight import plan_layout
from ray_ctrl.run_folder import RunFolder
from ray_ctrl.tune.sweep import Range, Sweep
from ray_ctrl.tune.trial import TRIALS

TIME = "iteration"


def domain(item: Range) -> Any:
    """Tune's own form of one range."""
    low, high = item.values[0], item.values[-1]
    return {
        "uniform": lambda: tune.uniform(low, high),
        "log_uniform": lambda: tune.loguniform(low, high),
        "int": lambda: tune.randint(low, high + 1),
        "log_int": lambda: tune.lograndint(low, high + 1),
        "choice": lambda: tune.choice(list(item.values)),
        "grid": lambda: tune.grid_search(list(item.values)),
    }[item.kind]()


def param_space(sweep: Sweep) -> dict[str, Any]:
    """What Tune samples from."""
    return {item.key: domain(item) for item in sweep.space}


def searcher(sweep: Sweep, concurrent: int) -> Any:
    """Tune's searcher: its own for random and grid, Optuna's tree-structured Parzen estimator for bayesian."""
    file = sweep.file
    if file.search != "bayesian":
        from ray.tune.search import BasicVariantGenerator

        return BasicVariantGenerator(random_state=file.seed, max_concurrent=concurrent)
    import optuna
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    sampler = optuna.samplers.TPESampler(seed=file.seed, n_startup_trials=max(2, min(10, sweep.trials // 3)))
    return ConcurrencyLimiter(OptunaSearch(sampler=sampler, metric=file.metric, mode=file.mode), concurrent)


def silence_tune() -> None:
    """Turns off messages of Tune and Optuna that repeat the lines of Progress."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
    # A resumed trial reports its last result again.
    warnings.filterwarnings("ignore", message="The reported value is ignored")
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # which trials an interruption left unfinished


def trial_resources(config: Config) -> PlacementGroupFactory:
    """Resources of a trial: its own process and the processes of its plan, placed together.

    Without runners the trial's process runs the model itself and so gets a runner's share.
    """
    runners = config.runners
    own = {"CPU": float(max(runners.cpus, config.model.threads)) if runners.count == 0 else 1.0}
    if runners.count == 0 and runners.gpus:
        own["GPU"] = float(runners.gpus)
    bundles = [own]
    for role in plan_layout(config).resources.roles:
        if role.placed and (role.cpus or role.gpus):
            each = {"CPU": float(role.cpus)} | ({"GPU": float(role.gpus)} if role.gpus else {})
            bundles += [each] * role.count
    return PlacementGroupFactory(bundles)


def totals(group: PlacementGroupFactory) -> dict[str, float]:
    """CPUs and GPUs of one trial."""
    return {name: float(sum(bundle.get(name, 0) for bundle in group.bundles)) for name in ("CPU", "GPU")}


def concurrent_trials(sweep: Sweep, trial: Mapping[str, float], available: Mapping[str, float]) -> int:
    """How many trials run at a time: what fits, and at most `concurrent`."""
    fits = [math.floor(available.get(name, 0.0) / amount + 1e-9) for name, amount in trial.items() if amount > 0]
    return max(0, min([sweep.trials, *fits, *([sweep.file.concurrent] if sweep.file.concurrent else [])]))


def needed(trial: Mapping[str, float]) -> ResourcePlan:
    """One trial as a resource plan, to wait for on a cluster."""
    return ResourcePlan((Role("trial", 1, trial["CPU"], trial["GPU"]),))


def scheduler(sweep: Sweep, root: Path) -> TrialScheduler:
    """Tune's scheduler of a sweep in folder `root`; time is counted in iterations."""
    file, last = sweep.file, sweep.base.run.iterations
    if file.scheduler == "none":
        return FIFOScheduler()
    grace = min(file.asha.grace, last)
    return Halving(
        root, file.metric, file.mode, time_attr=TIME, max_t=last, grace_period=grace,
        reduction_factor=file.asha.reduction,
    )  # fmt: skip


class Halving(AsyncHyperBandScheduler):
    """ASHA that also counts the scores from before an interruption, after which Tune restores no scheduler."""

    def __init__(self, root: Path, metric: str, mode: str, **options: Any) -> None:
        super().__init__(metric=metric, mode=mode, **options)
        self.root, self.score = root, metric
        self.seen: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        place = self.root / TRIALS / trial.trial_id
        if trial.trial_id in self.seen or not place.is_dir():  # or added again after its process died
            return
        self.seen.add(trial.trial_id)
        reported = (trial.last_result or {}).get(TIME, 0)
        for row in RunFolder(place).metrics():
            if self.score in row and row[TIME] <= reported:
                # Only recorded: whether the trial was stopped there was decided then.
                self.on_trial_result(tune_controller, trial, row)
