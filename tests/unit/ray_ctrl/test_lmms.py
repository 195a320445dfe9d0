"""The lmms-eval adapter, against a stand-in for its abstract model."""

import abc
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from envs.errors import UserError
from envs.knobs import Knobs
from envs.latency import LatencyRecord
from ray_ctrl.lmms import lmms_model
from ray_ctrl.pipeline import AdaptivePipeline, Answer

DOCUMENTS = [{"images": ["one"]}, {"images": []}, {"images": ["one", "two"]}]


class Lmms(abc.ABC):
    """As `lmms_eval.api.model.lmms`: three abstract methods, a cache hook and the tasks' documents."""

    is_simple = False

    def __init__(self) -> None:
        self.cached: list[Any] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))
        self.task_dict: dict[str, Any] = {"vqa": {"val": DOCUMENTS}}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...
    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...
    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the pipeline is asked, with lmms-eval in place."""
    seen: list[Any] = []

    def pipeline(model: Any, controller: str, **settings: Any) -> Any:
        def answer(image: Any, question: str, budget_ms: float) -> Answer:
            seen.append((image, question, budget_ms))
            record = LatencyRecord(suffix=5.0)
            return Answer("red\n\nand more", Knobs("low", 1, 4, 12), budget_ms, budget_ms, 60.0, None, record, 3, True)

        seen.append((model, controller, settings))
        return answer

    module = ModuleType("lmms_eval.api.model")
    module.lmms = Lmms  # type: ignore[attr-defined]
    for name, value in {
        "lmms_eval": ModuleType("lmms_eval"),
        "lmms_eval.api": ModuleType("api"),
        module.__name__: module,
    }.items():
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setattr(AdaptivePipeline, "from_pretrained", pipeline)
    return seen


def request(document: int, until: Any = ("\n\n",), context: str = "<image>\nwhat color?") -> Any:
    return SimpleNamespace(args=(context, {"until": until}, lambda found: found["images"], document, "vqa", "val"))


def test_requests_are_answered_under_the_budget(asked: list[Any]) -> None:
    model = lmms_model("runs/x", 80, device="cpu")
    assert isinstance(model, Lmms)
    assert model.generate_until([request(0), request(1, "and"), request(1, None)]) == [
        "red",
        "red\n\n",
        "red\n\nand more",
    ]
    assert asked == [
        (None, "runs/x", {"device": "cpu"}),
        ("one", "what color?", 80.0),
        *[(None, "what color?", 80.0)] * 2,
    ]
    assert [entry[2] for entry in model.cached] == ["red", "red\n\n", "red\n\nand more"]
    assert [answer.record.total for answer in model.answers] == [5.0] * 3


def test_what_the_model_cannot_do_is_named(asked: list[Any]) -> None:
    model = lmms_model("runs/x", 80)
    with pytest.raises(UserError, match="document 2 of vqa has 2 images"):
        model.generate_until([request(2)])
    with pytest.raises(UserError, match="likelihoods"):
        model.loglikelihood([])
    with pytest.raises(UserError, match="several turns"):
        model.generate_until_multi_round([])
    with pytest.raises(UserError, match="budget"):
        lmms_model("runs/x", 0)


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(UserError, match=r"pip install 'ray-ctrl\[lmms\]'"):
        lmms_model("runs/x", 80)
