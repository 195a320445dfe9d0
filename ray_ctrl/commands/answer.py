"""`ray-ctrl answer`: one question within a budget, by a trained controller, on the wall clock."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from envs.budgets import check_budget
from envs.data.sample import FileImage, Sample, content_id
from envs.errors import UserError
from envs.knobs import TIERS, Knobs, KnobSpace
from envs.latency import Identity, LatencyRecord, MeasuredClock
from policies.controller import Controller
from ray_ctrl.commands.evaluate import controller_config, find_controller, newest_controller
from ray_ctrl.config import Config
from ray_ctrl.console import console, table
from ray_ctrl.run_context import check_importance, env_config
from ray_ctrl.serving import Steering, plans_within, shown_budget

RUNS = Path("runs")


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    answer: str
    knobs: Knobs
    budget_ms: float
    shown_ms: float
    reference_ms: float
    record: LatencyRecord
    new_tokens: int
    feasible: bool = True

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "answer": self.answer,
            "knobs": asdict(self.knobs),
            "budget_ms": self.budget_ms,
            "budget_shown_ms": self.shown_ms,
            "latency_ms": self.record.total,
            "within_budget": self.record.total <= self.budget_ms,
            "feasible": self.feasible,
            "stages_ms": self.record.to_dict(),
            "new_tokens": self.new_tokens,
            "reference_ms": self.reference_ms,
        }


def run(image: str, question: str, budget_ms: float, controller: Path | None, *, repeats: int, as_json: bool) -> None:
    """Prints the answer, the setting chosen and where the time went.

    Raises:
        UserError: a bad budget, image or question, or no usable controller.
    """
    check_budget(budget_ms)
    sample = make_sample(image, question)
    folder = find_controller(controller)[0] if controller else newest_controller(RUNS)
    found, metadata = Controller.load(folder)
    config = controller_config(metadata, folder)
    answered = answer(config, metadata, found, sample, budget_ms, repeats)
    if as_json:
        print(json.dumps(answered.to_dict() | {"controller": str(folder)}, indent=2))
    else:
        _show(answered)
        console.print(f"controller {folder}", markup=False)


def make_sample(image: str, question: str) -> Sample:
    """The request as a sample; `-` is no image.

    Raises:
        UserError: an empty question, or an image that cannot be read to its end.
    """
    if not question.strip():
        raise UserError("the question is empty: ask something")
    reference = None
    if image != "-":
        reference = FileImage.open(image)
        reference.load()
    digest = reference.digest if reference else None
    return Sample(content_id(digest, question, ()), reference, question, ())


def answer(
    config: Config,
    metadata: Mapping[str, Any],
    controller: Controller,
    sample: Sample,
    budget_ms: float,
    repeats: int = 1,
) -> Answer:
    """Runs one request at batch 1: the controller chooses, the model answers, every stage is timed.

    Args:
        metadata: what was exported with the controller.
        repeats: runs of the request; the last one counts, those before it warm the device up.

    Raises:
        UserError: the controller belongs to another model or block importance.
    """
    torch.set_num_threads(config.model.threads)
    engine = env_config(config, "test").build_engine()
    _check_model(engine, metadata)
    check_importance(engine, metadata)
    reference_ms = _reference(engine, metadata)
    space = KnobSpace(engine.importance)
    shown_ms = shown_budget(budget_ms, metadata, reference_ms)
    if shown_ms > budget_ms:
        warnings.warn(
            f"a budget of {budget_ms:g} ms is smaller than any that the controller was trained for: it chooses as for "
            f"{shown_ms:.1f} ms, and may be late",
            stacklevel=2,
        )
    fits = plans_within(metadata, engine, space, sample, budget_ms, reference_ms)
    steering = Steering(controller, space, shown_ms, reference_ms, fits)
    if not steering.feasible:
        warnings.warn(
            f"no plan is predicted to meet {budget_ms:g} ms for this request: the cheapest one runs", stacklevel=2
        )
    for _ in range(max(1, repeats)):
        outcome, record, _ = engine.run_steered(sample, steering)
    if steering.knobs is None:
        raise RuntimeError("the engine ended a request without asking the controller")
    return Answer(
        engine.text(outcome),
        steering.knobs,
        budget_ms,
        shown_ms,
        reference_ms,
        record,
        outcome.n_tokens,
        steering.feasible,
    )


def _check_model(engine: Any, metadata: Mapping[str, Any]) -> None:
    trained = metadata.get("fingerprint")
    if trained is not None and trained != engine.model.fingerprint:
        raise UserError(
            f"the controller was trained on another model (fingerprint {str(trained)[:12]}, this one is "
            f"{engine.model.fingerprint[:12]}): train again, or choose another with --controller"
        )


def _reference(engine: Any, metadata: Mapping[str, Any]) -> float:
    """The reference latency of this device: the one trained with where it is the same device, else measured now."""
    config = metadata.get("config", {})
    profiled = config.get("latency", {}).get("source") == "profiled"
    if profiled and metadata.get("device") == Identity.of(engine).device:
        return float(metadata["reference_ms"])
    return MeasuredClock(engine).reference_ms


def _show(answered: Answer) -> None:
    knobs, record = answered.knobs, answered.record
    inside = "within" if record.total <= answered.budget_ms else "OVER"
    console.print(f"answer  {answered.answer}", markup=False)
    console.print(
        f"choice  tier {knobs.tier} (of {', '.join(TIERS)}), decided after block {knobs.insertion}: "
        f"{knobs.top_k} experts, {knobs.blocks} blocks"
    )
    console.print(f"time    {record.total:.1f} ms, {inside} the budget of {answered.budget_ms:g} ms")
    rows = [(stage, f"{ms:.2f}") for stage, ms in record.to_dict().items()]
    console.print(table(("stage", "ms"), rows, ""))
