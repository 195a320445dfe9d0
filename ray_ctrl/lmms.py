"""The pipeline as a model of lmms-eval, every request under one budget. Needs `ray-ctrl[lmms]`.

from lmms_eval.evaluator import simple_evaluate
from ray_ctrl.lmms import lmms_model

simple_evaluate(model=lmms_model("runs/my-run", budget_ms=100), tasks=["textvqa_val"])
"""

from collections.abc import Sequence
from typing import Any

from envs.budgets import check_budget
from envs.errors import UserError
from ray_ctrl.pipeline import AdaptivePipeline, Answer


class Adapter:
    """What lmms-eval calls; `answers` keeps what it does not ask for, plans and latencies among it.

    Args:
        controller, model, settings: as of `AdaptivePipeline.from_pretrained`.
        budget_ms: of every request.
    """

    is_simple = True

    def __init__(self, controller: str, budget_ms: float, model: str | None = None, **settings: Any) -> None:
        super().__init__()
        self.budget_ms = check_budget(budget_ms)
        self.pipeline = AdaptivePipeline.from_pretrained(model, controller, **settings)
        self.answers: list[Answer] = []

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, cut where the task's `until` says.

        Args:
            requests: with `args` (context, generation keywords, function from document to images, document id, task,
                split).

        Raises:
            UserError: a request with several images.
        """
        return [self._generate(*request.args) for request in requests]

    def _generate(
        self, context: str, keywords: dict[str, Any], visuals: Any, document: Any, task: str, split: str
    ) -> str:
        images = list(visuals(self.task_dict[task][split][document]) or ())  # type: ignore[attr-defined]
        if len(images) > 1:
            raise UserError(f"document {document} of {task} has {len(images)} images: the model takes one")
        # `<image>` marks the image's place for models that take several.
        question = context.replace("<image>", "").strip()
        answer = self.pipeline(images[0] if images else None, question, self.budget_ms)
        assert isinstance(answer, Answer)
        self.answers.append(answer)
        text, until = answer.answer, keywords.get("until") or ()
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        self.cache_hook.add_partial("generate_until", (context, keywords), text)  # type: ignore[attr-defined]
        return text

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not defined: a plan is chosen for a generated answer."""
        raise UserError("tasks that compare likelihoods cannot be run under a budget: choose one that generates")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not defined: the model was not trained on dialogs."""
        raise UserError("tasks of several turns are not supported: choose one of a single turn")


def lmms_model(controller: str, budget_ms: float, model: str | None = None, **settings: Any) -> Any:
    """The adapter as an lmms-eval model.

    Raises:
        UserError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.api.model import lmms
    except ModuleNotFoundError as error:
        raise UserError(f"this needs {error.name}: pip install 'ray-ctrl[lmms]'") from None
    return type("AdaptiveMolmoE", (Adapter, lmms), {})(controller, budget_ms, model, **settings)
