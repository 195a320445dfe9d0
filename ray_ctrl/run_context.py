"""From configuration to the world: model, samples, clock and budgets of one run, checked in the driver first.

Mistakes about models, tasks and tables surface here, before a run folder is made and before Ray starts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from envs.budgets import BudgetDistribution, budget_range
from envs.calibrate_guardrail import fit_guardrail
from envs.data import load_task
from envs.env_resources import EnvConfig, World
from envs.errors import UserError
from envs.files import write_json
from envs.knobs import MAX_DROPPED, ExecutionPlan, KnobSpace
from envs.latency import Identity, ProfiledClock, ProfileTable, is_measuring, profile
from envs.latency.guardrail import Guardrail
from envs.latency.profiler import GOOD_FIT
from envs.model.importance import removal_order
from policies.controller import Controller
from ray_ctrl.config import Config
from ray_ctrl.console import console, counted
from ray_ctrl.provenance import hardware, versions
from ray_ctrl.serving import RequestController

TABLE_FILE = "profile.json"
BUDGETS_FILE = "budgets.json"
GUARDRAIL_FILE = "guardrail-{clock}.json"


@dataclass(frozen=True)
class Setting:
    """A configuration with its live engine and, after `with_clock`, its clock and budgets."""

    config: Config
    engine: Any
    table: Path | None = None
    given_budgets: BudgetDistribution | None = None
    guardrail: Guardrail | None = None

    @property
    def budgets(self) -> BudgetDistribution:
        """Training and held-out budgets of this device, ms."""
        if self.given_budgets is None:
            raise RuntimeError("the budgets are known only after with_clock()")
        return self.given_budgets

    @property
    def reference_ms(self) -> float:
        """Latency of the full plan on the reference request; budgets are seen relative to it."""
        return float(self.world("train").build_clock(self.engine).reference_ms)

    def world(self, split: str) -> EnvConfig:
        """The picklable world of one split; equal models share one engine in a process."""
        return env_config(self.config, split, self.table, self.given_budgets, self.guardrail)

    def build(self, split: str) -> World:
        """The live world of one split in this process."""
        return self.world(split).build()

    def with_clock(self, folder: Path, table_folder: Path | None = None) -> "Setting":
        """This setting with a profile table (measured where a valid one is missing) and budgets, kept in `folder`.

        Args:
            table_folder: another folder that keeps the table.
        """
        latency, home = self.config.latency, table_folder or folder
        table = find_table(self.config, self.engine, home) if latency.source == "profiled" else None
        if latency.source == "measured":
            table = self._kept_table(home)
        known = replace(self, table=table)
        known = replace(known, given_budgets=_budgets(known, folder / BUDGETS_FILE))
        return replace(known, guardrail=_guardrail(known, folder / GUARDRAIL_FILE.format(clock=latency.source)))

    def _kept_table(self, folder: Path) -> Path | None:
        """A profile table that holds here, where there is one; nothing is measured, and one that does not is named."""
        latency = self.config.latency
        home = Path(latency.profile_dir).expanduser() if latency.profile_dir else folder
        path = Path(latency.profile) if latency.profile else home / TABLE_FILE
        if not path.is_file():
            console.print(f"no profile table at {path}: no static plans to compare with", markup=False)
            return None
        try:
            ProfiledClock.for_engine(ProfileTable.load(path), self.engine)
            return path
        except UserError as error:
            console.print(f"profile table {path} is not used: {error.message}", markup=False)
            return None

    def profiled(self) -> ProfiledClock | None:
        """The clock of the profile table, whichever clock is in use; None where there is no table."""
        return ProfiledClock.for_engine(ProfileTable.load(self.table), self.engine) if self.table else None

    def metadata(self) -> dict[str, Any]:
        """What an exported controller needs to be used: model, encoder, settings, reference latency, origin."""
        return {
            "fingerprint": self.engine.model.fingerprint,
            "importance": list(self.engine.importance),
            "config": self.config.model_dump(mode="json"),
            "reference_ms": self.reference_ms,
            "device": Identity.of(self.engine).device,
            "budgets": asdict(self.budgets),
            "guardrail": None if self.guardrail is None else self.guardrail.to_dict(),
            "hardware": hardware(),
            "versions": versions(),
        }


def env_config(
    config: Config,
    split: str,
    profile: Path | None = None,
    distribution: BudgetDistribution | None = None,
    guardrail: Guardrail | None = None,
) -> EnvConfig:
    """What environments of one split are built from; without its profile, the roofline model stands in."""
    latency = config.latency
    if latency.source == "profiled":
        source, path = ("profiled", str(profile.absolute())) if profile else ("roofline", None)
        latency = latency.model_copy(update={"source": source, "profile": path})
    sections = {name: getattr(config, name) for name in ("model", "task", "store", "budgets", "reward")}
    return EnvConfig(**sections, latency=latency, split=split, distribution=distribution, guardrail=guardrail)


def open_setting(config: Config) -> Setting:
    """Loads the model and looks at the samples.

    Raises:
        UserError: a model, device, task or roofline device that is not there, or too few samples.
    """
    with console.status("loading model and samples"):
        return _open(config)


def _open(config: Config) -> Setting:
    import torch

    torch.set_num_threads(config.model.threads)
    world = env_config(config, "train")
    for split in ("train", "validation", "test"):
        if not load_task(config.task.name, split, 1, config.task.seed, on_broken=config.task.on_invalid_row):
            raise UserError(f"task {config.task.name!r} has no samples in split {split}")
    engine = world.build_engine()
    if config.latency.source == "roofline":
        world.build_clock(engine)
    return Setting(config, engine)


def check_importance(engine: Any, metadata: Mapping[str, Any]) -> None:
    """Refuses to use a controller where its block counts would leave out other blocks than in training.

    Raises:
        UserError: under the scores in use some setting would run other blocks.
    """
    trained = metadata.get("importance")
    if trained is not None and _plans(trained) != _plans(engine.importance):
        first = ", ".join(map(str, removal_order(trained)[:MAX_DROPPED]))
        now = ", ".join(map(str, removal_order(engine.importance)[:MAX_DROPPED]))
        raise UserError(
            f"the controller was trained with another block importance (blocks {first} first, here {now}): set "
            "model.block_importance to the file it was trained with, or train again"
        )


def _plans(importance: Sequence[float]) -> list[ExecutionPlan]:
    space = KnobSpace(importance)
    return [space.plan(knobs) for knobs in space.all]


def find_table(config: Config, engine: Any, folder: Path) -> Path:
    """A profile table valid here: the one given, else the kept one, else measured now.

    Raises:
        UserError: `latency.profile` was measured elsewhere, or cannot be read.
    """
    if config.latency.profile is not None:
        ProfiledClock.for_engine(ProfileTable.load(config.latency.profile), engine)
        return Path(config.latency.profile)
    path = (Path(config.latency.profile_dir).expanduser() if config.latency.profile_dir else folder) / TABLE_FILE
    if path.is_file():
        try:
            ProfiledClock.for_engine(ProfileTable.load(path), engine)
            return path
        except UserError as error:
            console.print(f"profile table {path} is not used: {error.message}", markup=False)
            path = path.with_name(f"profile-{Identity.of(engine).model[:8]}-{engine_threads()}.json")
            if path.is_file():
                ProfiledClock.for_engine(ProfileTable.load(path), engine)
                return path
    console.print(f"no profile table of this device, model and thread count in {path.parent}", markup=False)
    measure_table(config, engine).save(path)
    return path


def engine_threads() -> int:
    """CPU threads of this process."""
    import torch

    return torch.get_num_threads()


def measure_table(config: Config, engine: Any) -> ProfileTable:
    """Measures this device on training samples, with a bar and a line of what it found."""
    samples = load_task(
        config.task.name, "train", config.task.train_samples, config.task.seed, on_broken=config.task.on_invalid_row
    )
    # An untrained controller costs the time of a trained one, and time is all that is asked of it here.
    controller = Controller(int(engine.model.config.d_model), config.controller.hidden).eval()
    steering = RequestController(controller, KnobSpace(engine.importance), budget_ms=1.0, reference_ms=1.0)
    with counted("profiling this device") as report:
        table = profile(
            engine,
            samples,
            repeats=config.latency.profile_repeats,
            per_tiling=config.latency.profile_samples,
            seed=config.run.seed,
            progress=report,
            controller=steering,
        )
    clock = ProfiledClock(table)
    console.print(
        f"profiled {len(table.cells)} requests, {config.latency.profile_repeats} times each: reference request "
        f"{clock.reference_ms:.1f} ms, median error of the fit {clock.median_error:.1%}{doubt(clock.median_error)}",
        markup=False,
    )
    return table


def doubt(median_error: float) -> str:
    """What to do where a profile does not fit its own measurements: budgets made from it would mean little."""
    if median_error <= GOOD_FIT:
        return ""
    return f", above {GOOD_FIT:.0%}: the device was busy; profile it when it is not, or raise latency.profile_repeats"


def _budgets(setting: Setting, path: Path) -> BudgetDistribution:
    """The device's budgets, kept beside the table so that a resumed run has the same ones."""
    if path.is_file():
        try:
            return BudgetDistribution.restored(json.loads(path.read_text("utf-8")))
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is damaged ({error}): start in a new run folder") from None
    budgets = setting.build("train").budgets
    if setting.config.budgets.low_ms is not None or setting.config.budgets.high_ms is not None:
        _compare_with_device(setting, budgets)
    if path.parent.is_dir():
        write_json(path, asdict(budgets))
    console.print(
        f"budgets {budgets.low_ms:.1f} to {budgets.high_ms:.1f} ms, held out "
        + _listed(budgets.held_out())
        + f" ms; {setting.config.latency.source} latencies"
    )
    return budgets


def _guardrail(setting: Setting, path: Path) -> Guardrail | None:
    """The guardrail calibrated for this clock, stored with the budgets so that a resumed run has the same one.

    None if it is off, or if a measuring clock has no profile to predict latencies from.
    """
    confidence = setting.config.guardrail.confidence
    if confidence is None:
        return None
    if path.is_file():
        try:
            stored = Guardrail.from_dict(json.loads(path.read_text("utf-8")))
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is damaged ({error}): start in a new run folder") from None
        if stored.confidence == confidence:
            return stored
    profile = setting.profiled()
    train, validation = setting.build("train"), setting.build("validation")
    if profile is None and is_measuring(train.clock):
        console.print("no profile to predict latencies from: the guardrail is off")
        return None
    with console.status("calibrating the guardrail"):
        guardrail = fit_guardrail(train, validation, confidence, profile, setting.config.run.seed)
    if path.parent.is_dir():
        write_json(path, guardrail.to_dict())
    console.print(
        f"guardrail at {confidence:.0%}: plans predicted to take up to {1 / guardrail.factor:.1%} of the budget"
    )
    return guardrail


def _compare_with_device(setting: Setting, budgets: BudgetDistribution) -> None:
    """Says how budgets given in ms lie to what this device can do.

    Raises:
        UserError: no plan is within any of them.
    """
    world = setting.build("train")
    low, high = budget_range(world.engine, world.clock, world.space, world.samples)
    if budgets.high_ms < low:
        raise UserError(
            f"budgets {budgets.low_ms:g} to {budgets.high_ms:g} ms are too small for this device: its cheapest plan "
            f"takes {low:.1f} ms, the full one {high:.1f} ms; set budgets.low_ms and budgets.high_ms in that range, or "
            "both to null"
        )
    beyond = "; every plan is within all of them, so there is little to learn" if budgets.low_ms > high else ""
    console.print(f"this device takes {low:.1f} ms for the cheapest plan, {high:.1f} ms for the full one{beyond}")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)
