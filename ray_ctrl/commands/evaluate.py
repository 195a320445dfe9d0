"""`ray-ctrl evaluate`: every test sample under every held-out budget exactly once, beside the baselines."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from envs.engine import Outcome
from envs.env_resources import World
from envs.errors import UserError
from envs.files import atomic_write, write_json
from envs.latency import is_measuring
from policies.baselines import Baseline, FixedKnobs, LookupKnobs, RandomKnobs
from policies.controller import Controller
from ray_ctrl import report
from ray_ctrl.config import Config
from ray_ctrl.console import console, counted, table
from ray_ctrl.load_config import parse, with_overrides
from ray_ctrl.plots import accuracy_over_budget, latency_over_budget
from ray_ctrl.preflight import plan_layout
from ray_ctrl.provenance import provenance
from ray_ctrl.report import Rollouts
from ray_ctrl.run_context import Setting, check_importance, open_setting
from ray_ctrl.run_folder import RunFolder, choose, free_folder, newest_runs, removed_if_vain
from ray_ctrl.serving import clamped_budget_ms

LOOKUP_BATCH = 1024  # larger ones are no faster, and progress is seen only between two
STATIC_SHARE = 0.9  # of the budget, for plans chosen from a profile and then measured: room for the device's noise


def run(path: Path, overrides: Sequence[str], out: Path | None) -> None:
    """Evaluates the controller at `path` (a run folder or an export) into a new folder.

    Raises:
        UserError: no controller there, a damaged one, or one for another model.
    """
    from cluster.connect import connect

    folder, home = find_controller(path)
    stored = controller_config(Controller.load(folder)[1], folder)
    config = with_overrides(stored, overrides)
    layout = plan_layout(with_overrides(config, ["grpo.max_policy_lag=0"]))  # nothing is learnt here
    out = _fresh(out) if out else free_folder(home / "evaluation")
    if folder.parent != home and (home / "run.json").is_file():
        console.print(f"the run has exported no controller yet: {folder} is evaluated", markup=False)
    setting = open_setting(config)
    load_controller(folder, setting)  # before anything takes time: does it go with this model?
    runners = config.runners
    with connect(runners.address, layout.resources, timeout_s=runners.connect_timeout_s):
        evaluate_setting(_with_clock(setting, stored, home, out), folder, out)


def _with_clock(setting: Setting, stored: Config, home: Path, out: Path) -> Setting:
    """The setting with profile and budgets of the run at `home` as far as they hold, else with new ones in `out`."""
    config = setting.config
    changed = _changed(stored, config)
    of_run = (home / "run.json").is_file() and not changed
    if of_run and _same_budgets(stored, config):
        return setting.with_clock(home)
    if changed and stored.latency.source == config.latency.source == "profiled":
        console.print(f"the run's profile is not used, settings differ: {', '.join(changed)}", markup=False)
    out.mkdir(parents=True)
    with removed_if_vain(out, (UserError, KeyboardInterrupt)):
        return setting.with_clock(out, home if of_run else out)


def _changed(stored: Config, config: Config) -> list[str]:
    """Settings of clock and task that the run's profile does not hold under; what it says of the model is in the table.

    The kind `measured` is no change from `profiled`: what was profiled is what is measured.
    """
    keys = [("latency", key) for key in type(config.latency).model_fields]
    keys += [("task", key) for key in ("name", "seed", "on_invalid_row")]
    found = []
    for section, key in keys:
        was, now = (getattr(getattr(some, section), key) for some in (stored, config))
        if was != now and (key, was, now) != ("kind", "profiled", "measured"):
            found.append(f"{section}.{key}")
    return found


def _same_budgets(stored: Config, config: Config) -> bool:
    """Whether the run's own budgets are those of `config`, its clock and task being the same."""
    return (stored.model, stored.budgets, stored.task.train_samples) == (
        config.model,
        config.budgets,
        config.task.train_samples,
    )


def find_controller(path: Path) -> tuple[Path, Path]:
    """The export at `path`, and the folder that keeps what belongs to it (the run, or the export's parent).

    Raises:
        UserError: neither a run folder with a controller nor an export.
    """
    if (path / "run.json").is_file():
        folder = RunFolder.open(path)
        if folder.controller.is_dir():
            return folder.controller, path
        chosen = choose(folder.checkpoints())
        if chosen is None:
            raise UserError(f"run {path} has no checkpoint yet: let it train on with --resume")
        return chosen.path / "controller", path
    if not path.is_dir():
        raise UserError(f"no run folder or exported controller at {path}: train first with 'ray-ctrl train'")
    return path, path.absolute().parent


def newest_controller(folder: Path) -> Path:
    """The controller of the newest run under `folder` that has one.

    Raises:
        UserError: there is none.
    """
    for run in newest_runs(folder):
        with suppress(UserError):
            return find_controller(run.root)[0]
    raise UserError(f"no run with a controller under {folder}: train first with 'ray-ctrl train'")


def controller_config(metadata: Mapping[str, Any], folder: Path) -> Config:
    """The settings a controller was trained with.

    Raises:
        UserError: an export without them.
    """
    if not isinstance(metadata.get("config"), dict):
        raise UserError(f"controller {folder} holds no settings: export it with 'ray-ctrl train'")
    return parse(metadata["config"])


def _fresh(out: Path) -> Path:
    if out.exists():
        raise UserError(f"output folder {out} exists already: choose another with --out")
    return out


def load_controller(folder: Path, setting: Setting) -> tuple[Controller, dict[str, Any]]:
    """The controller exported to `folder` and what was exported with it.

    Raises:
        UserError: a damaged one, or one for another model or block importance.
    """
    model = setting.engine.model
    controller, metadata = Controller.load(folder, d_model=int(model.config.d_model), fingerprint=model.fingerprint)
    check_importance(setting.engine, metadata)
    return controller, metadata


def evaluate_setting(setting: Setting, folder: Path, out: Path) -> dict[str, Any]:
    """Evaluates inside a running Ray; writes tables and pictures to `out`, returns the summary."""
    from policies.grpo.evaluation import evaluate_contexts
    from ray_ctrl.rllib_setup import build_evaluator

    budgets = setting.budgets.held_out()
    world = setting.build("test")
    controller, metadata = load_controller(folder, setting)
    contexts = [(sample, ms) for sample in range(len(world.samples)) for ms in budgets]
    shown = {ms: clamped_budget_ms(ms, metadata, world.clock.reference_ms) for ms in budgets}
    contexts_shown = [(sample, ms, shown[ms]) for sample, ms in contexts]
    for ms, instead in shown.items():
        if ms != instead:
            console.print(f"{ms:.1f} ms is beyond the budgets trained for: the controller is shown {instead:.1f} ms")
    algorithm = build_evaluator(setting, controller, len(contexts))
    try:
        methods = []
        who = {"controller": None} | baselines(setting, world, budgets)
        with counted("evaluating") as progress:
            for name, baseline in who.items():
                rows = evaluate_contexts(algorithm, contexts if baseline else contexts_shown, baseline=baseline)
                methods.append(Rollouts.of(name, rows))
                progress(len(methods), len(who))
    finally:
        algorithm.stop()
    out.mkdir(parents=True, exist_ok=True)
    return write_report(methods, out)


def baselines(setting: Setting, world: World, budgets: Sequence[float]) -> dict[str, Baseline | None]:
    """Who the controller is compared with."""
    space = world.space
    found: dict[str, Baseline | None] = {}
    lookup = lookup_table(setting, budgets)
    if lookup is not None:
        measured = is_measuring(world.clock)
        found[f"static plan at {STATIC_SHARE:.0%}" if measured else "lookup table"] = lookup
    found["random knobs"] = RandomKnobs(setting.config.run.seed)
    found["full plan"] = FixedKnobs(space.encode(space.full))
    found["cheapest plan"] = FixedKnobs(space.encode(space.cheapest))
    return found


def lookup_table(setting: Setting, budgets: Sequence[float]) -> LookupKnobs | None:
    """The best single plan of each budget on training samples, in time for at least 95 % of them by the profile.

    Under the measured clock plans are chosen for 90 % of the budget. None where it is off, or nothing was profiled.
    """
    world = setting.build("train")
    samples = list(world.samples)[: setting.config.evaluation.lookup_samples]
    clock: Any = world.clock
    if is_measuring(clock):
        clock = setting.profiled()
    if not samples or clock is None:
        return None
    accuracy_PS, latency_PS = all_plan_outcomes(world, samples, clock)
    share = STATIC_SHARE if is_measuring(world.clock) else 1.0
    choices = report.lookup_choices([share * ms for ms in budgets], accuracy_PS, latency_PS)
    reference = float(world.clock.reference_ms)
    middles = [math.sqrt(a * b) for a, b in pairwise(budgets)]
    actions = tuple(world.space.encode(world.space.distinct[choice]) for choice in choices)
    return LookupKnobs(tuple(math.log(ms / reference) for ms in middles), actions)


def all_plan_outcomes(world: World, samples: Sequence[Any], clock: Any) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and latency by `clock`, ms, of every distinct plan on every sample, both (plans, samples)."""
    plans = [world.space.plan(knobs) for knobs in world.space.distinct]
    accuracy = np.zeros((len(plans), len(samples)))
    latency = np.zeros_like(accuracy)
    for s, outcomes in enumerate(run_all_plans(world, samples)):
        for p, outcome in enumerate(outcomes):
            shape = world.engine.shape(samples[s], plans[p].tier)
            accuracy[p, s] = world.engine.accuracy(samples[s], outcome)
            latency[p, s] = clock.latency(shape, plans[p], outcome.n_tokens).total
    return accuracy, latency


def run_all_plans(world: World, samples: Sequence[Any]) -> Iterator[list[Outcome]]:
    """Outcomes of every distinct plan, sample by sample; many samples' plans are run in one go."""
    plans = [world.space.plan(knobs) for knobs in world.space.distinct]
    step = max(1, LOOKUP_BATCH // len(plans))
    with counted("running all plans on training samples") as progress:
        for first in range(0, len(samples), step):
            some = samples[first : first + step]
            outcomes = world.engine.outcomes([s for s in some for _ in plans], plans * len(some))
            progress(first + len(some), len(samples))
            for start in range(0, len(outcomes), len(plans)):
                yield outcomes[start : start + len(plans)]


def write_report(methods: Sequence[Rollouts], out: Path) -> dict[str, Any]:
    """Prints the tables and writes CSV, Markdown, JSON and both pictures; returns the summary."""
    lines = {m.name: report.per_budget(m) for m in methods}
    overall = [report.summarise(m) for m in methods]
    chosen = methods[0]
    correlation = report.budget_rank_correlation(chosen)
    within = report.request_rank_correlation(chosen)
    origin = provenance()
    budget_rows = report.budget_rows([*lines[chosen.name], overall[0]])
    method_rows = report.method_rows(overall)
    console.print(table(report.BUDGET_HEADER, budget_rows, f"{chosen.name}, held-out budgets"))
    console.print(table(report.METHOD_HEADER, method_rows, "all held-out budgets"))
    console.print(
        f"rank correlation of budget and chosen latency: {correlation:.3f} over all rollouts, "
        f"{within:.3f} within a request"
    )

    atomic_write(out / "table.csv", report.to_csv([line for name in lines for line in lines[name]] + overall))
    atomic_write(out / "rollouts.csv", report.rollouts_csv(methods))
    atomic_write(out / "table.md", _page(origin, budget_rows, method_rows, correlation, len(chosen)))
    summary = {
        "methods": {line.method: asdict(line) for line in overall},
        "per_budget": {name: [asdict(line) for line in some] for name, some in lines.items()},
        "rank_correlation": correlation,
        "rank_correlation_within_request": within,
        **origin,
    }
    write_json(out / "summary.json", summary)
    accuracy_over_budget(lines, out / "accuracy_over_budget.png")
    latency_over_budget(lines, out / "latency_over_budget.png")
    console.print(f"tables and pictures in {out}", markup=False)
    return summary


def _page(origin: Mapping[str, Any], budget_rows: Any, method_rows: Any, correlation: float, contexts: int) -> str:
    found = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return (
        f"`{origin['command']}` on {origin['hardware']}; Python {origin['python']}, {found}; "
        f"{contexts} (test sample, held-out budget) pairs.\n\n"
        + report.markdown(report.BUDGET_HEADER, budget_rows)
        + "\n"
        + report.markdown(report.METHOD_HEADER, method_rows)
        + f"\nRank correlation of budget and chosen latency: {correlation:.3f}. Tiers: low/medium/high, %. Over: share "
        "of requests slower than their budget. Reward: mean ± standard error over samples.\n"
    )
