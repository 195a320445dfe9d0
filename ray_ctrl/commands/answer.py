"""`ray-ctrl answer`: one question within a latency budget, by a trained controller, on the wall clock."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from envs.budgets import check_budget
from envs.data import load_task
from envs.data.sample import FileImage, Sample, content_id
from envs.errors import UserError
from envs.knobs import TIERS, Knobs, KnobSpace
from envs.latency import Identity, LatencyRecord, MeasuredClock
from policies.controller import Controller
from ray_ctrl.commands.evaluate import controller_config, find_controller, newest_controller
from ray_ctrl.config import Config
from ray_ctrl.console import console, table
from ray_ctrl.load_config import load_config, with_overrides
from ray_ctrl.run_context import check_importance, env_config
from ray_ctrl.serving import RequestController, clamped_budget_ms, plans_within

MIN_ROLLOUTS = 2000
"""Fewer training rollouts than this are a trial run (the `smoke` preset has 64, `laptop` more than 30,000)."""


@dataclass(frozen=True)
class Answer:
    """The result of one request; `clamped_budget_ms` is the budget that the controller observed."""

    answer: str
    knobs: Knobs
    budget_ms: float
    clamped_budget_ms: float
    reference_ms: float
    record: LatencyRecord
    new_tokens: int
    feasible: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        latency = {
            "latency_ms": self.record.total,
            "within_budget": self.record.total <= self.budget_ms,
            "stages_ms": self.record.to_dict(),
        }
        return {key: value for key, value in asdict(self).items() if key != "record"} | latency


def run(
    image: str | None,
    question: str | None,
    budget_ms: float,
    overrides: Sequence[str] = (),
    *,
    controller: Path | None = None,
    sample: int | None = None,
    repeats: int = 1,
    as_json: bool = False,
) -> None:
    """Prints the answer, the plan chosen and the stage latencies.

    Args:
        sample: index of a test sample to ask instead of `image` and `question`, which are overrides then.

    Raises:
        UserError: a bad budget, image or question, or no usable controller.
    """
    check_budget(budget_ms)
    if sample is not None:
        overrides = [*(word for word in (image, question) if word is not None), *overrides]
    folder = find_controller(controller)[0] if controller else newest_controller(_runs(overrides))
    trained, metadata = Controller.load(folder)
    # Nothing is computed twice here: a store would only be left behind in the current folder.
    config = with_overrides(controller_config(metadata, folder), [*overrides, "store.path=null"])
    request = make_sample(image, question) if sample is None else sample_of_task(config, sample)
    _warn_of_trial_run(config, metadata, folder)
    answered = answer(config, metadata, trained, request, budget_ms, repeats)
    if as_json:
        asked = {"controller": str(folder), "question": request.question, "references": list(request.answers)}
        print(json.dumps(answered.to_dict() | asked, indent=2))
        return
    if sample is not None:
        console.print(f"question   {request.question}", markup=False)
        console.print(f"reference  {' | '.join(dict.fromkeys(request.answers))}", markup=False)
    _print(answered)
    console.print(f"controller {folder}, {metadata.get('iteration', '?')} iterations", markup=False)


def _runs(overrides: Sequence[str]) -> Path:
    """Folder of runs: `run.folder` of the command line, else its default."""
    return Path(load_config(None, None, [word for word in overrides if word.startswith("run.folder=")]).run.folder)


def make_sample(image: str | None, question: str | None) -> Sample:
    """The request as a sample; `-` is no image.

    Raises:
        UserError: a missing or empty question, or an image that cannot be read completely.
    """
    if image is None or question is None:
        raise UserError("no question: give IMAGE and QUESTION (`-` for no image), or --sample N")
    if not question.strip():
        raise UserError(f"the question is empty ({question!r}): give text")
    reference = None
    if image != "-":
        reference = FileImage.open(image)
        reference.load()
    return Sample(content_id(reference.digest if reference else None, question, ()), reference, question, ())


def sample_of_task(config: Config, index: int) -> Sample:
    """Test sample `index` of the configured task.

    Raises:
        UserError: there are fewer.
    """
    task = config.task
    samples = load_task(task.name, "test", index + 1, task.seed, on_invalid_row=task.on_invalid_row)
    if index >= len(samples):
        raise UserError(f"--sample {index}: task {task.name!r} has {len(samples)} test samples, counted from 0")
    return samples[index]


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
        metadata: of the exported controller.
        repeats: runs of the request; the last one counts, earlier ones warm the device up.

    Raises:
        UserError: the controller belongs to another model or block importance, or the prompt is too long.
    """
    torch.set_num_threads(config.model.threads)
    engine = env_config(config, "test").build_engine()
    _check_model(engine, metadata)
    check_importance(engine, metadata)
    reference_ms = _reference_ms(engine, metadata)
    space = KnobSpace(engine.importance)
    clamped_ms = clamped_budget_ms(budget_ms, metadata, reference_ms)
    if clamped_ms > budget_ms:
        warnings.warn(
            f"a budget of {budget_ms:g} ms is below the controller's training range: it decides as for "
            f"{clamped_ms:.1f} ms, and may exceed the budget",
            stacklevel=2,
        )
    fits = plans_within(metadata, engine, space, sample, budget_ms, reference_ms)
    deciding = RequestController(controller, space, clamped_ms, reference_ms, fits)
    if not deciding.feasible:
        size = "" if sample.image is None else f", image {sample.image.size[0]} x {sample.image.size[1]}"
        warnings.warn(
            f"no plan is predicted to meet {budget_ms:g} ms for this request ({len(sample.question.split())} words"
            f"{size}): the cheapest plan runs",
            stacklevel=2,
        )
    for _ in range(max(1, repeats)):
        outcome, record, _ = engine.run_decided(sample, deciding)
    assert deciding.knobs is not None  # decided in stage 2 of every run
    text = engine.text(outcome)
    return Answer(
        text, deciding.knobs, budget_ms, clamped_ms, reference_ms, record, outcome.n_tokens, deciding.feasible
    )


def _check_model(engine: Any, metadata: Mapping[str, Any]) -> None:
    trained = metadata.get("fingerprint")
    if trained is not None and trained != engine.model.fingerprint:
        raise UserError(
            f"the controller was trained on another model (fingerprint {str(trained)[:12]}, this one is "
            f"{engine.model.fingerprint[:12]}): train again, choose another with --controller, or set model.name to "
            "its model's folder"
        )


def _warn_of_trial_run(config: Config, metadata: Mapping[str, Any], folder: Path) -> None:
    rollouts = int(metadata.get("iteration", 0)) * config.grpo.group_size * config.grpo.groups_per_iteration
    if rollouts < MIN_ROLLOUTS:
        warnings.warn(
            f"controller {folder} was trained on {rollouts} rollouts only, a trial run: choose another with "
            "--controller, or train one with `ray-ctrl train`",
            stacklevel=2,
        )


def _reference_ms(engine: Any, metadata: Mapping[str, Any]) -> float:
    """Reference latency of this device: that of training on the same device if it was profiled there, else measured."""
    profiled = metadata.get("config", {}).get("latency", {}).get("source") == "profiled"
    if profiled and metadata.get("device") == Identity.of(engine).device:
        return float(metadata["reference_ms"])
    return MeasuredClock(engine).reference_ms


def _print(answered: Answer) -> None:
    knobs, record = answered.knobs, answered.record
    within = "within" if record.total <= answered.budget_ms else "OVER"
    console.print(f"answer     {answered.answer}", markup=False)
    console.print(
        f"plan       tier {knobs.tier} (of {', '.join(TIERS)}), decided after block {knobs.insertion}: "
        f"{knobs.top_k} experts, {knobs.blocks} blocks"
    )
    console.print(f"latency    {record.total:.1f} ms, {within} the budget of {answered.budget_ms:g} ms")
    rows = [(stage, f"{ms:.2f}") for stage, ms in record.to_dict().items()]
    console.print(table(("stage", "ms"), rows, ""))
