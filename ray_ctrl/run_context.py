"""From configuration to what one run needs: model, samples, clock and budgets, checked in the driver first.

Mistakes about models, tasks and profiles surface here, before a run folder is made and before Ray starts.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from envs.budgets import BudgetDistribution, budget_range
from envs.calibrate_guardrail import fit_guardrail
from envs.env_resources import EnvConfig, EnvResources
from envs.errors import UserError
from envs.files import write_json
from envs.knobs import BLOCK_COUNTS, INSERTIONS, TIERS, TOP_KS
from envs.latency import Identity, LatencyProfile, ProfiledClock, is_measuring
from envs.latency.guardrail import Guardrail
from ray_ctrl.config import Config
from ray_ctrl.console import console
from ray_ctrl.profiles import PROFILE_FILE, Measure, Use, find_profile, measure_profile
from ray_ctrl.provenance import hardware, versions
from ray_ctrl.run_folder import check_writable

__all__ = ["BUDGETS_FILE", "PROFILE_FILE", "RunContext", "env_config", "open_context"]
BUDGETS_FILE = "budgets.json"
GUARDRAIL_FILE = "guardrail-{clock}.json"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class RunContext:
    """A configuration with its live engine and, after `with_profile`, its profile, budgets and guardrail."""

    config: Config
    engine: Any
    profile: Path | None = None
    given_budgets: BudgetDistribution | None = None
    guardrail: Guardrail | None = None

    @property
    def budgets(self) -> BudgetDistribution:
        """Training and held-out budgets of this device, ms."""
        if self.given_budgets is None:
            raise RuntimeError("the budgets are known only after with_profile()")
        return self.given_budgets

    def env_config(self, split: str) -> EnvConfig:
        """The picklable description of one split's environments; equal models share one engine in a process."""
        return env_config(self.config, split, self.profile, self.given_budgets, self.guardrail)

    def build(self, split: str) -> EnvResources:
        """What environments of one split share, built in this process."""
        return self.env_config(split).build()

    def with_profile(self, folder: Path, profile_folder: Path | None = None) -> "RunContext":
        """This context with a profile (measured if no valid one is there), budgets and guardrail, kept in `folder`.

        Args:
            profile_folder: another folder that keeps the profile.
        """
        source = self.config.latency.source
        profile = None if source == "roofline" else self._profile(profile_folder or folder)
        known = replace(self, profile=profile)
        known = replace(known, given_budgets=known._budgets(folder / BUDGETS_FILE))
        return replace(known, guardrail=known._guardrail(folder / GUARDRAIL_FILE.format(clock=source)))

    def profiled(self) -> ProfiledClock | None:
        """The clock of the profile, whichever clock is in use; None without a profile."""
        return ProfiledClock.for_engine(LatencyProfile.load(self.profile), self.engine) if self.profile else None

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Checksums of what a resumed run must find unchanged: the weights, and each split's samples."""
        digests = {"model": str(self.engine.model.fingerprint)}
        for split in SPLITS:
            ids = "\n".join(sample.id for sample in self.build(split).samples)
            digests[f"{split} samples"] = hashlib.sha256(ids.encode()).hexdigest()
        return digests

    def metadata(self) -> dict[str, Any]:
        """What an exported controller needs to be used: model, encoder, configuration, reference latency, origin."""
        clock = self.env_config("train").build_clock(self.engine)
        identity = Identity.of(self.engine)
        return {
            "fingerprint": self.engine.model.fingerprint,
            "importance": list(self.engine.importance),
            "config": self.config.model_dump(mode="json"),
            "reference_ms": float(clock.reference_ms),
            "device": identity.device,
            "identity": asdict(identity),
            "knobs": {"tiers": TIERS, "insertions": INSERTIONS, "top_ks": TOP_KS, "block_counts": BLOCK_COUNTS},
            "budgets": asdict(self.budgets),
            "guardrail": None if self.guardrail is None else self.guardrail.to_dict(),
            "hardware": hardware(),
            "versions": versions(),
        }

    def _profile(self, folder: Path) -> Path | None:
        """The profile; the measured clock only compares with one that is there, and measures none."""
        required = self.config.latency.source == "profiled"
        try:
            decision = find_profile(self.config, self.engine, folder)
        except UserError as error:
            if required:
                raise
            decision = Measure(folder, error.message)
        if isinstance(decision, Use):
            return decision.path
        console.print(decision.reason if required else f"{decision.reason}: no static plans to compare with")
        if not required:
            return None
        check_writable(decision.path.parent)
        measure_profile(self.config, self.engine).save(decision.path)
        return decision.path

    def _budgets(self, path: Path) -> BudgetDistribution:
        """The device's budgets, kept next to the profile so that a resumed run has the same ones."""
        stored: BudgetDistribution | None = _stored(path, BudgetDistribution.restored)
        if stored is not None:
            return stored
        resources, given = self.build("train"), self.config.budgets
        budgets = resources.budgets
        if given.low_ms is not None or given.high_ms is not None:
            _compare_with_device(resources)
        if path.parent.is_dir():
            write_json(path, asdict(budgets))
        held_out = ", ".join(f"{ms:.1f}" for ms in budgets.held_out())
        console.print(
            f"budgets {budgets.low_ms:.1f} to {budgets.high_ms:.1f} ms, held out {held_out} ms; "
            f"{self.config.latency.source} latencies"
        )
        return budgets

    def _guardrail(self, path: Path) -> Guardrail | None:
        """The guardrail calibrated for this clock, stored so that a resumed run has the same one.

        None if it is off, or if a measuring clock has no profile to predict latencies from.
        """
        confidence = self.config.guardrail.confidence
        if confidence is None:
            return None
        stored: Guardrail | None = _stored(path, Guardrail.from_dict)
        if stored is not None and stored.confidence == confidence:
            return stored
        profile = self.profiled()
        train, validation = self.build("train"), self.build("validation")
        if profile is None and is_measuring(train.clock):
            console.print("no profile to predict latencies from: the guardrail is off")
            return None
        with console.status("calibrating the guardrail"):
            guardrail = fit_guardrail(train, validation, confidence, profile, self.config.run.seed)
        if path.parent.is_dir():
            write_json(path, guardrail.to_dict())
        console.print(
            f"guardrail at {confidence:.0%}: plans predicted to take up to {1 / guardrail.factor:.1%} of the budget"
        )
        return guardrail


def env_config(
    config: Config,
    split: str,
    profile: Path | None = None,
    distribution: BudgetDistribution | None = None,
    guardrail: Guardrail | None = None,
) -> EnvConfig:
    """What environments of one split are built from; without its profile, the roofline model takes its place."""
    latency = config.latency
    if latency.source == "profiled":
        source, path = ("profiled", str(profile.absolute())) if profile else ("roofline", None)
        latency = latency.model_copy(update={"source": source, "profile": path})
    sections = {name: getattr(config, name) for name in ("model", "task", "store", "budgets", "reward")}
    return EnvConfig(**sections, latency=latency, split=split, distribution=distribution, guardrail=guardrail)


def open_context(config: Config) -> RunContext:
    """Loads the model and the first sample of each split.

    Raises:
        UserError: a model, device, task or roofline device that is not there, or a split without samples.
    """
    import torch

    with console.status("loading model and samples"):
        torch.set_num_threads(config.model.threads)
        for split in SPLITS:
            if not config.task.load(split, 1):
                raise UserError(f"task {config.task.name!r} has no samples in split {split}")
        described = env_config(config, "train")
        engine = described.build_engine()
        if config.latency.source == "roofline":
            described.build_clock(engine)
    return RunContext(config, engine)


def _stored(path: Path, restore: Callable[[Any], Any]) -> Any:
    """What an earlier process stored at `path`; None without a file."""
    if not path.is_file():
        return None
    try:
        return restore(json.loads(path.read_text("utf-8")))
    except (ValueError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}): start in a new run folder") from None


def _compare_with_device(resources: EnvResources) -> None:
    """Budgets given in ms must leave a choice on this device.

    Raises:
        UserError: no plan meets any of them, or every plan meets all of them.
    """
    budgets = resources.budgets
    low, high = budget_range(resources.engine, resources.clock, resources.space, resources.samples)
    if budgets.high_ms < low or budgets.low_ms > high:
        problem = "too small" if budgets.high_ms < low else "too large"
        nothing = "" if budgets.high_ms < low else ", so that no plan ever exceeds one and there is nothing to learn"
        raise UserError(
            f"budgets {budgets.low_ms:g} to {budgets.high_ms:g} ms are {problem} for this device: its cheapest plan "
            f"takes {low:.1f} ms, the full one {high:.1f} ms{nothing}; set budgets.low_ms and budgets.high_ms in that "
            "range, or both to null"
        )
    console.print(f"this device takes {low:.1f} ms for the cheapest plan, {high:.1f} ms for the full one")
