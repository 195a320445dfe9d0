"""`ray-ctrl answer`: one question within a latency budget, by a trained controller, on the wall clock."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.budgets import check_budget
from envs.data.sample import Sample
from envs.errors import UserError
from envs.knobs import TIERS
from policies.controller import Controller
from ray_ctrl.config import Config
from ray_ctrl.console import console, table
from ray_ctrl.controllers import controller_config, find_controller, newest_controller
from ray_ctrl.load_config import load_config, with_overrides
from ray_ctrl.pipeline import AdaptivePipeline, Answer, make_sample

MIN_ROLLOUTS = 2000
"""Fewer training rollouts than this are a trial run (the `smoke` preset has 64, `laptop` more than 30,000)."""


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
    config = with_overrides(controller_config(metadata, folder), overrides)
    request = _sample(image, question) if sample is None else sample_of_task(config, sample)
    _warn_of_trial_run(config, metadata, folder)
    answered = answer(AdaptivePipeline(config.model, trained, metadata), request, budget_ms, repeats)
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


def _sample(image: str | None, question: str | None) -> Sample:
    if image is None or question is None:
        raise UserError("no question: give IMAGE and QUESTION (`-` for no image), or --sample N")
    return make_sample(None if image == "-" else image, question)


def sample_of_task(config: Config, index: int) -> Sample:
    """Test sample `index` of the configured task.

    Raises:
        UserError: there are fewer.
    """
    samples = config.task.load("test", index + 1)
    if index >= len(samples):
        raise UserError(f"--sample {index}: task {config.task.name!r} has {len(samples)} test samples, counted from 0")
    return samples[index]


def answer(pipeline: AdaptivePipeline, sample: Sample, budget_ms: float, repeats: int) -> Answer:
    """Runs one request `repeats` times and returns the last answer: earlier runs warm the device up."""
    for _ in range(max(1, repeats)):
        answered = pipeline.answer(sample, budget_ms)
    if answered.clamped_budget_ms > budget_ms:
        warnings.warn(
            f"a budget of {budget_ms:g} ms is below the controller's training range: it decides as for "
            f"{answered.clamped_budget_ms:.1f} ms, and may exceed the budget",
            stacklevel=2,
        )
    if not answered.feasible:
        size = "" if sample.image is None else f", image {sample.image.size[0]} x {sample.image.size[1]}"
        warnings.warn(
            f"no plan is predicted to meet {budget_ms:g} ms for this request ({len(sample.question.split())} words"
            f"{size}): the cheapest plan ran",
            stacklevel=2,
        )
    return answered


def _warn_of_trial_run(config: Config, metadata: Mapping[str, Any], folder: Path) -> None:
    rollouts = int(metadata.get("iteration", 0)) * config.grpo.group_size * config.grpo.groups_per_iteration
    if rollouts < MIN_ROLLOUTS:
        warnings.warn(
            f"controller {folder} was trained on {rollouts} rollouts only, a trial run: choose another with "
            "--controller, or train one with `ray-ctrl train`",
            stacklevel=2,
        )


def _print(answered: Answer) -> None:
    knobs, record = answered.knobs, answered.record
    within = "within" if answered.within_budget else "OVER"
    console.print(f"answer     {answered.answer}", markup=False)
    console.print(
        f"plan       tier {knobs.tier} (of {', '.join(TIERS)}), decided after block {knobs.insertion}: "
        f"{knobs.top_k} experts, {knobs.blocks} blocks"
    )
    console.print(f"latency    {record.total:.1f} ms, {within} the budget of {answered.budget_ms:g} ms")
    expected = {} if answered.predicted is None else answered.predicted.to_dict()
    rows = [(stage, f"{ms:.2f}", f"{expected.get(stage, math.nan):.2f}") for stage, ms in record.to_dict().items()]
    console.print(table(("stage", "ms", "predicted"), rows, ""))
