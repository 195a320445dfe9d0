"""Answer scores equal the published evaluations on every golden pair."""

import json
from pathlib import Path
from typing import Any

import pytest

from envs.data import scoring
from envs.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "text" / "text_scores.json").read_text())


@pytest.mark.parametrize("pair", GOLDEN["pairs"], ids=range(len(GOLDEN["pairs"])))
def test_pair(pair: dict[str, Any]) -> None:
    prediction, answers = pair["prediction"], pair["answers"]
    assert scoring.normalize_vqa_answer(prediction) == pair["normalized_prediction"]
    assert [scoring.normalize_vqa_answer(a) for a in answers] == pair["normalized_answers"]
    assert scoring.vqa_accuracy(prediction, answers) == pytest.approx(pair["vqa_score"])
    assert scoring.a_okvqa_accuracy(prediction, answers) == pytest.approx(pair["a_okvqa_score"])
    assert scoring.anls(prediction, answers) == pytest.approx(pair["anls_max"])
    assert [scoring.anls(prediction, [a]) for a in answers] == pytest.approx(pair["anls_each"])
    assert scoring.exact_match(prediction, answers) == pair["em"]
    assert scoring.relaxed_correctness(prediction, answers) == pair["relaxed_correctness_max"]
    each = [scoring.relaxed_correctness(prediction, [a]) for a in answers]
    assert each == pair["relaxed_correctness_each"]


@pytest.mark.parametrize("case", GOLDEN["vqaeval_postprocess"])
def test_extracted_answer(case: dict[str, str]) -> None:
    assert scoring.extract_answer(case["raw"]) == case["processed"]


@pytest.mark.parametrize("case", GOLDEN["select_mc_option"])
def test_selected_option(case: dict[str, Any]) -> None:
    assert scoring.select_option(case["target"], case["options"]) == case["index"]


def test_contractions_cover_every_missing_apostrophe() -> None:
    normalize = scoring.normalize_vqa_answer
    assert normalize("yall'll") == normalize("y'allll") == "y'all'll"
    assert normalize("couldnt've") == "couldn't've"
    assert normalize("somebody'd") == "somebodyd"


def test_only_the_first_32_periods_vanish() -> None:
    assert scoring.normalize_vqa_answer("." * 33 + "x") == ".x"


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "expected"),
    [
        ("vqa", " Two\n", ["2", "two"], 2 / 3),
        ("vqa", "", ["red"], 0.0),
        ("a_okvqa", "Red ", ["red"] * 5, 1.0),
        ("anls", "color", ["colour"], 5 / 6),
        ("exact_match", "Cat", ["cat"], 1.0),
        ("relaxed", "10.4", ["10"], 1.0),
        ("relaxed", "10.6", ["10"], 0.0),
        ("relaxed", "0", ["0"], 1.0),
        ("relaxed", "nan", ["10"], 0.0),
        ("multiple_choice:3", "B", ["B"], 1.0),
        ("multiple_choice:3", " b: blue sky", ["B"], 1.0),
        ("multiple_choice:3", "b", ["A"], 0.0),
    ],
)
def test_score(metric: str, prediction: str, answers: list[str], expected: float) -> None:
    assert scoring.score(metric, prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["bleu", "multiple_choice", "multiple_choice:1", "multiple_choice:x"])
def test_unknown_metric(metric: str) -> None:
    with pytest.raises(UserError, match=f"unknown metric '{metric}': choose one of vqa, vqa_exact, a_okvqa"):
        scoring.score(metric, "x", ["x"])
