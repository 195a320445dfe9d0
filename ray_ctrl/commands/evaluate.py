"""`ray-ctrl evaluate`: every test sample under every held-out budget exactly once, compared with the baselines."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from envs.config import GuardrailSettings
from envs.env_resources import EnvResources
from envs.errors import UserError
from envs.files import atomic_write, write_json
from envs.knobs import KNOBS, TIERS, Knobs
from policies.controller import Controller
from policies.grpo.config import VALIDATED_MODULE
from ray_ctrl import report
from ray_ctrl.config import Config
from ray_ctrl.console import console, counted, table
from ray_ctrl.controllers import controller_config, find_controller
from ray_ctrl.load_config import with_overrides
from ray_ctrl.lookup import baselines
from ray_ctrl.pipeline import check_importance
from ray_ctrl.plots import accuracy_over_budget, latency_over_budget
from ray_ctrl.preflight import plan_layout
from ray_ctrl.provenance import provenance
from ray_ctrl.run_context import RunContext, open_context
from ray_ctrl.run_folder import check_writable, claim_folder, explained, free_folder, remove_on_error
from ray_ctrl.serving import clamped_budget_ms


def run(path: Path, overrides: Sequence[str], out: Path | None) -> None:
    """Evaluates the controller at `path` (run folder, sweep, checkpoint, export) into a new folder.

    Raises:
        UserError: no controller there, a damaged one, or one for another model; nowhere to write.
    """
    from cluster.connect import connect

    folder, home = find_controller(path)
    if (folder / VALIDATED_MODULE).is_dir():
        with TemporaryDirectory() as place:
            export_rllib(folder, Path(place) / "controller")
            run(Path(place), overrides, out or free_folder(home / "evaluation"))
        return
    stored = with_moved_store(controller_config(Controller.load(folder)[1], folder), home)
    config = with_overrides(stored, overrides)
    layout = plan_layout(with_overrides(config, ["grpo.max_policy_lag=0"]))  # nothing is learned here
    if folder.parent != home and (home / "run.json").is_file() and path == home:
        console.print(f"the run has exported no controller yet: evaluating {folder}", markup=False)
    with new_folder(out, home) as place:
        context = open_context(config)
        load_controller(folder, context)  # before anything takes time: does it fit this model?
        runners = config.runners
        with connect(runners.address, layout.resources, timeout_s=runners.connect_timeout_s):
            evaluate_context(with_profile_of(context, stored, home, place), folder, place)


@contextmanager
def new_folder(out: Path | None, home: Path, name: str = "evaluation") -> Iterator[Path]:
    """The folder of an evaluation, by default a new one in `home`, made before the work; removed if it stays empty."""
    if out is None:
        place = claim_folder(home / name)
    else:
        with explained(out):
            if out.exists():
                raise UserError(f"output folder {out} exists already: choose another with --out")
        check_writable(out)
        place = out
    try:
        yield place
    finally:
        with suppress(OSError):
            place.rmdir()


def with_profile_of(context: RunContext, stored: Config, home: Path, out: Path) -> RunContext:
    """The context with profile and budgets of the run at `home` as far as they apply, else with new ones in `out`."""
    of_run = any((home / name).is_file() for name in ("run.json", "sweep.yaml"))
    profile_folder, budgets_folder, changed = profile_folders(stored, context.config, home if of_run else None, out)
    if changed and stored.latency.source == context.config.latency.source == "profiled":
        console.print(f"the run's profile is not used, settings differ: {', '.join(changed)}", markup=False)
    if budgets_folder == home:
        return context.with_profile(home)
    with remove_on_error(out, UserError, KeyboardInterrupt):
        return context.with_profile(out, profile_folder)


def profile_folders(stored: Config, config: Config, home: Path | None, out: Path) -> tuple[Path, Path, list[str]]:
    """Where profile and budgets of an evaluation come from, and the changed settings that rule the run's profile out.

    The run's profile applies while latency and task are the run's (the profile itself records the model); its budgets
    apply while model, budgets and training samples are, too. Evaluating by the wall clock what was trained on a profile
    is no change.

    Args:
        home: the run's folder; None for an export without its run.
    """
    keys = [("latency", key) for key in type(config.latency).model_fields]
    keys += [("task", key) for key in ("name", "seed", "on_invalid_row")]
    changed = []
    for section, key in keys:
        was, now = (getattr(getattr(some, section), key) for some in (stored, config))
        if was != now and (key, was, now) != ("source", "profiled", "measured"):
            changed.append(f"{section}.{key}")
    if home is None or changed:
        return out, out, changed
    same = (stored.model, stored.budgets, stored.task.train_samples) == (
        config.model,
        config.budgets,
        config.task.train_samples,
    )
    return home, home if same else out, changed


def export_rllib(checkpoint: Path, folder: Path) -> None:
    """Exports the controller of an algorithm's own checkpoint (pickle: only of your own) with its settings.

    Raises:
        UserError: a checkpoint of another algorithm or environment.
    """
    from ray.rllib.core.rl_module.rl_module import RLModule

    try:
        arguments = pickle.loads((checkpoint / "class_and_ctor_args.pkl").read_bytes())["ctor_args_and_kwargs"][0]
        described = arguments[0]["env_config"]["resources"]
        sections = {
            name: getattr(described, name) for name in ("model", "task", "latency", "store", "budgets", "reward")
        }
        fitted = described.guardrail
        controller: Controller = RLModule.from_checkpoint(str(checkpoint / VALIDATED_MODULE)).controller
    except (OSError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint} is no RLlib checkpoint of GRPO on the environment of ray-ctrl: {error}"
        ) from error
    config = Config(**sections, guardrail=GuardrailSettings(confidence=fitted.confidence if fitted else None))
    controller.save(folder, {"config": config.model_dump(mode="json")})


def with_moved_store(config: Config, home: Path) -> Config:
    """`config` with the outcome store where the run or its sweep is now, if the folder it names is gone."""
    if config.store.path is None or Path(config.store.path).parent.is_dir():
        return config
    for folder in (home, *home.absolute().parents[:2]):
        if (moved := folder / Path(config.store.path).name).is_file():
            return with_overrides(config, [f"store.path={moved}"])
    return with_overrides(config, ["store.path=null"])


def load_controller(folder: Path, context: RunContext) -> tuple[Controller, dict[str, Any]]:
    """The controller exported to `folder` and what was exported with it.

    Raises:
        UserError: a damaged one, or one for another model or block importance.
    """
    model = context.engine.model
    controller, metadata = Controller.load(folder, d_model=int(model.config.d_model), fingerprint=model.fingerprint)
    check_importance(context.engine, metadata)
    return controller, metadata


def evaluate_context(context: RunContext, folder: Path, out: Path) -> dict[str, Any]:
    """Evaluates inside a running Ray; writes tables and pictures to `out`, returns the summary."""
    from policies.grpo.evaluation import evaluate_contexts
    from ray_ctrl.rllib_setup import build_evaluator

    check_writable(out)
    budgets = context.budgets.held_out()
    resources = context.build("test")
    controller, metadata = load_controller(folder, context)
    contexts = [(sample, ms) for sample in range(len(resources.samples)) for ms in budgets]
    clamped = {ms: clamped_budget_ms(ms, metadata, resources.clock.reference_ms) for ms in budgets}
    observed = [(sample, ms, clamped[ms]) for sample, ms in contexts]
    for ms, instead in clamped.items():
        if ms != instead:
            console.print(f"{ms:.1f} ms is outside the training range: the controller observes {instead:.1f} ms")
    algorithm = build_evaluator(context, controller, len(contexts))
    try:
        methods = {"controller": None} | baselines(context, resources, budgets)
        frames = []
        with counted("evaluating") as progress:
            for name, baseline in methods.items():
                rows = evaluate_contexts(algorithm, contexts if baseline else observed, baseline=baseline)
                frames.append(report.rollouts(name, rows))
                progress(len(frames), len(methods))
    finally:
        algorithm.stop()
    return write_report(with_predictions(pd.concat(frames, ignore_index=True), resources), out)


def with_predictions(rollouts: pd.DataFrame, resources: EnvResources) -> pd.DataFrame:
    """Adds question, family, answer and reference answers; the engine still has the outcomes of what just ran."""
    samples = [resources.samples[index] for index in rollouts["sample"]]
    chosen = [Knobs(TIERS[tier], *others) for tier, *others in rollouts[list(KNOBS)].to_numpy().tolist()]
    outcomes = resources.engine.outcomes(samples, [resources.space.plan(knobs) for knobs in chosen])
    return rollouts.assign(
        family=[sample.family for sample in samples],
        question=[sample.question for sample in samples],
        answer=[resources.engine.text(outcome) for outcome in outcomes],
        reference=[" | ".join(dict.fromkeys(sample.answers)) for sample in samples],
    )


def write_report(rollouts: pd.DataFrame, out: Path) -> dict[str, Any]:
    """Writes CSV, Markdown, JSON and both pictures, then prints the tables; returns the summary.

    The tables leave out budgets that no plan can meet; the CSV files contain everything.
    """
    methods = list(rollouts["method"].unique())
    kept = report.attainable_budgets(rollouts)
    left_out = sorted(set(rollouts["budget_ms"]) - set(kept))
    headline = rollouts[rollouts["budget_ms"].isin(kept or left_out)]
    per_budget = report.summarize(rollouts, "method", "budget_ms")
    overall = report.summarize(headline, "method")
    chosen = headline[headline["method"] == methods[0]]
    correlation, within = report.budget_rank_correlation(chosen), report.request_rank_correlation(chosen)
    budgets = pd.concat([report.summarize(chosen, "budget_ms"), overall[overall["method"] == methods[0]]])
    tables = [
        (f"{methods[0]}, held-out budgets; latencies in ms", report.BUDGET_HEADER, report.budget_rows(budgets)),
        ("all methods over these budgets", report.METHOD_HEADER, report.method_rows(overall)),
    ]
    if chosen["family"].notna().any():
        families = report.summarize(chosen.fillna({"family": "none"}), "family")
        tables.append((f"{methods[0]} by family", report.FAMILY_HEADER, report.family_rows(families)))
    notes = [
        report.BUDGET_LEGEND,
        *(f"left out: {ms:.1f} ms, which no plan can meet for over 95 % of requests" for ms in left_out if kept),
        f"rank correlation of budget and chosen latency: {correlation:.3f} over all rollouts, {within:.3f} within a "
        "request",
    ]
    origin = provenance()
    summary = {
        "methods": {line["method"]: line for line in overall.to_dict("records")},
        "per_budget": {name: part.to_dict("records") for name, part in per_budget.groupby("method", sort=False)},
        "rank_correlation": correlation,
        "rank_correlation_within_request": within,
        **origin,
    }
    csv = {"index": False, "float_format": "%.6g", "lineterminator": "\n"}
    atomic_write(out / "table.csv", pd.concat([per_budget, report.summarize(rollouts, "method")]).to_csv(**csv))
    atomic_write(out / "rollouts.csv", rollouts.to_csv(**csv))
    atomic_write(out / "table.md", _page(origin, tables, notes, len(chosen)))
    write_json(out / "summary.json", summary)
    accuracy_over_budget(per_budget, out / "accuracy_over_budget.png")
    latency_over_budget(per_budget, out / "latency_over_budget.png")
    for title, header, rows in tables:
        console.print(table(header, rows, title))
    console.print("\n".join(notes), f"tables, rollouts and pictures in {out}", sep="\n", markup=False)
    return summary


def _page(
    origin: Mapping[str, Any], tables: Sequence[tuple[str, Any, Any]], notes: Sequence[str], contexts: int
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    parts = [
        f"`{origin['command']}` on {origin['hardware']}; Python {origin['python']}, {versions}; {contexts} (test "
        "sample, held-out budget) pairs; ±: standard error over samples; over: share of requests slower "
        "than their budget.\n"
    ]
    parts += [f"{title}\n\n{report.markdown(header, rows)}" for title, header, rows in tables]
    return "\n".join([*parts, *(f"- {note}" for note in notes)]) + "\n"
