"""Which latency profile a run uses: one that is there and valid, or a new measurement."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.knobs import KnobSpace
from envs.latency import Identity, LatencyProfile, ProfiledClock, profile
from envs.latency.profiler import GOOD_FIT
from policies.controller import Controller
from policies.fused import FusedController
from ray_ctrl.config import Config
from ray_ctrl.console import console, counted
from ray_ctrl.serving import RequestController

PROFILE_FILE = "profile.json"
MISSING = "no such file"


@dataclass(frozen=True)
class Use:
    """A valid profile."""

    path: Path


@dataclass(frozen=True)
class Measure:
    """No valid profile: a new one belongs at `path`."""

    path: Path
    reason: str


def resolve_profile(
    given: Path | None, folder: Path, variant: str, problem: Callable[[Path], str | None]
) -> Use | Measure:
    """The profile to use. Pure: files are seen through `problem` alone.

    Args:
        given: `latency.profile`, which is used or refused.
        folder: keeps `profile.json` and, if that belongs to another device or model, `profile-VARIANT.json`.
        problem: why the profile at a path cannot be used: None for a valid one, `MISSING` for no file.

    Raises:
        UserError: the given profile is not valid, or both places in the folder contain one that is not.
    """
    if given is not None:
        found = problem(given)
        if found is None:
            return Use(given)
        raise UserError(f"profile {given} cannot be used: {found}" if found == MISSING else found)
    reason = ""
    for path in (folder / PROFILE_FILE, folder / f"profile-{variant}.json"):
        found = problem(path)
        if found is None:
            return Use(path)
        if found == MISSING:
            return Measure(path, reason or f"no profile of this device, model and thread count in {folder}")
        reason = f"profile {path} is not used: {found}"
    raise UserError(f"{reason}; remove it, or set latency.profile_dir to another folder")


def find_profile(config: Config, engine: Any, folder: Path) -> Use | Measure:
    """`resolve_profile` on this device, with the profiles kept in `folder`."""
    import torch

    latency = config.latency
    identity = Identity.of(engine)

    def problem(path: Path) -> str | None:
        if not path.is_file():
            return MISSING
        try:
            ProfiledClock.for_engine(LatencyProfile.load(path), engine)
        except UserError as error:
            return error.message
        return None

    given = Path(latency.profile) if latency.profile else None
    home = Path(latency.profile_dir) if latency.profile_dir else folder
    return resolve_profile(given, home, f"{identity.model[:8]}-{torch.get_num_threads()}", problem)


def measure_profile(config: Config, engine: Any) -> LatencyProfile:
    """Measures this device on training samples, with a bar and a line of what it found."""
    latency = config.latency
    # An untrained controller costs the time of a trained one, and only its time counts here.
    controller = FusedController(Controller(int(engine.model.config.d_model), config.controller.hidden))
    with counted("profiling this device") as report:
        measured = profile(
            engine,
            config.task.load("train"),
            repeats=latency.profile_repeats,
            per_tiling=latency.profile_samples,
            seed=config.run.seed,
            progress=report,
            controller=RequestController(controller, KnobSpace(engine.importance), budget_ms=1.0, reference_ms=1.0),
        )
    clock = ProfiledClock(measured)
    console.print(
        f"profiled {len(measured.cells)} requests, {latency.profile_repeats} times each: reference request "
        f"{clock.reference_ms:.1f} ms, median error of the fit {clock.median_error:.1%}"
        + fit_warning(clock.median_error)
    )
    return measured


def fit_warning(median_error: float) -> str:
    """What to do about a profile that does not fit its own measurements: its budgets would mean little."""
    if median_error <= GOOD_FIT:
        return ""
    return f", above {GOOD_FIT:.0%}: the device was busy; profile it when idle, or raise latency.profile_repeats"
