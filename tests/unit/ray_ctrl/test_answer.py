"""Answers within a budget, on the embedded model: what the controller observes, what is predicted, what is refused."""

import math
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from envs.budgets import BudgetDistribution
from envs.config import ModelSettings
from envs.errors import UserError
from envs.latency.guardrail import AnswerLengths, Guardrail, ProfileCosts
from policies.controller import Controller
from ray_ctrl.commands import answer
from ray_ctrl.pipeline import AdaptivePipeline, make_sample
from ray_ctrl.serving import clamped_budget_ms

TRAINED = BudgetDistribution.over(20.0, 60.0)
METADATA = {"budgets": asdict(TRAINED), "reference_ms": 80.0}


@given(st.floats(1e-3, 1e7), st.sampled_from([0.5, 1.0, 3.0]))
def test_a_budget_is_clamped_to_the_training_range(budget_ms: float, slower: float) -> None:
    """On a device so many times as slow, budgets are so many times as large."""
    clamped = clamped_budget_ms(budget_ms, METADATA, 80.0 * slower)
    assert clamped == pytest.approx(np.clip(budget_ms, 20.0 * slower, 60.0 * slower))


def test_only_held_out_budgets_outside_the_range_are_clamped() -> None:
    low, *middles, high = TRAINED.held_out()
    assert [clamped_budget_ms(ms, METADATA, 80.0) for ms in middles] == middles
    assert (clamped_budget_ms(low, METADATA, 80.0), clamped_budget_ms(high, METADATA, 80.0)) == (20.0, 60.0)


def test_without_exported_budgets_nothing_is_clamped() -> None:
    assert clamped_budget_ms(3.0, {}, 80.0) == 3.0


@pytest.mark.parametrize("budgets", [None, {"low": 3}, asdict(TRAINED) | {"low_ms": "few"}])
def test_budgets_that_cannot_be_read_are_a_users_mistake(budgets: Any) -> None:
    with pytest.raises(UserError, match=r"cannot be read|not a number"):
        clamped_budget_ms(3.0, {"budgets": budgets, "reference_ms": 80.0}, 80.0)


@pytest.fixture(scope="module")
def pipe() -> AdaptivePipeline:
    """The embedded model and an untrained controller; by its profile a crop takes 1 ms, a block 2 ms."""
    width = 64
    costs = {stage: [0.0] * count for stage, count in QUANTITIES.items()}
    costs["vision"][1], costs["suffix"][2] = 10.0, 2.0
    lengths = AnswerLengths.fit(np.eye(1, width), [1], 0.9)
    guardrail = Guardrail(0.9, lengths, 1.0, 1.0, ProfileCosts(costs)).to_dict()
    metadata = METADATA | {"guardrail": guardrail, "device": "another", "config": {"model": {"threads": 1}}}
    torch.manual_seed(0)
    found = AdaptivePipeline(ModelSettings(device="cpu"), Controller(width, 16).eval(), metadata)
    found.reference_ms, found.scale, found.range_ms = 80.0, 1.0, [20.0, 60.0]  # as on the device of the profile
    return found


QUANTITIES = {"processor": 5, "vision": 3, "prefix": 5, "suffix": 7, "decode": 4, "controller": 1}


@pytest.mark.parametrize(("budget_ms", "clamped_ms"), [(3.0, 20.0), (30.0, 30.0), (1e5, 60.0)])
def test_an_answer_uses_the_clamped_budget(pipe: AdaptivePipeline, budget_ms: float, clamped_ms: float) -> None:
    """The answer keeps the requested budget; one that is too small is warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        given = answer.answer(pipe, make_sample(None, "what?"), budget_ms, 1)
    assert (given.budget_ms, given.to_dict()["clamped_budget_ms"]) == (budget_ms, pytest.approx(clamped_ms))
    assert bool(warned) == (budget_ms < clamped_ms)


def test_a_request_too_large_for_its_budget_is_warned_of(pipe: AdaptivePipeline) -> None:
    """By its sizes alone, with what makes it large: a photo's pixels, a long question."""
    photo = Image.new("RGB", (500, 300))
    with pytest.warns(UserWarning, match=r"no plan is predicted to meet 21 ms .*3 words, image 500 x 300"):
        given = answer.answer(pipe, make_sample(photo, "what is it?"), 21.0, 1)
    assert not given.feasible
    assert given.knobs == pipe.space.cheapest
    assert given.to_dict()["within_budget"] == (given.record.total <= 21.0)


def test_an_answer_is_the_models_under_the_plan_chosen(pipe: AdaptivePipeline) -> None:
    """Predictions are the profile's, for the predicted and for the true length."""
    sample = make_sample(Image.new("RGB", (90, 60), "red"), "what color is it?")
    given = pipe.answer(sample, 90.0)
    plan = pipe.space.plan(given.knobs)
    outcome = pipe.engine.outcomes([sample], [plan])[0]
    assert given.answer == pipe.engine.text(outcome)
    assert given.predicted is not None
    crops = pipe.engine.shape(sample, plan.tier).crops
    assert given.predicted.total == pytest.approx(crops + 2.0 * (len(plan.blocks) - plan.insertion - 1))
    assert pipe.fastest_ms(sample) <= given.predicted.total <= 90.0
    assert given.record.controller > 0


def test_batches_are_requests_one_after_another(pipe: AdaptivePipeline) -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    many = pipe([pixels, None], ["what color is it?", "how many?"], 100.0)
    assert isinstance(many, list)
    single = [pipe(image, text, 100.0) for image, text in ((pixels, "what color is it?"), (None, "how many?"))]
    assert [(a.answer, a.knobs) for a in many] == [(a.answer, a.knobs) for a in single]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="lists of 1, 2 requests"):
        pipe([None], ["a", "b"], 100.0)


@pytest.mark.parametrize("budget_ms", [0.0, -1.0, math.nan, math.inf, "soon"])
def test_budgets_must_be_finite_and_above_zero(pipe: AdaptivePipeline, budget_ms: Any) -> None:
    with pytest.raises(UserError, match=r"budget"):
        pipe(None, "what?", budget_ms)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "not an image"),
        (b"GIF89a", "cannot read the image"),
        ("/no/such.png", "cannot read image /no/such.png"),
        (np.zeros((3, 3)), "the image is a ndarray"),
        (7, "the image is a int"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_sample(image, "what?")


@pytest.mark.parametrize("question", ["", "  ", None])
def test_a_question_is_text(question: Any) -> None:
    with pytest.raises(UserError, match="give text"):
        make_sample(None, question)


def test_a_controller_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="trained on another model"):
        AdaptivePipeline(ModelSettings(device="cpu"), Controller(64, 16), {"fingerprint": "0" * 64})
