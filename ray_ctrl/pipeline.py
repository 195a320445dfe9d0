"""Answers within a latency budget, without Ray: a model, a trained controller, requests in, answers out.

pipe = AdaptivePipeline.from_pretrained("embedded", "runs/my-run")
pipe("photo.jpg", "what is this?", budget_ms=40).answer
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from envs.budgets import check_budget
from envs.config import ModelSettings, StoreSettings
from envs.data.sample import ImageRef, Sample, content_id
from envs.env_resources import load_engine
from envs.errors import UserError
from envs.knobs import MAX_DROPPED, ExecutionPlan, Knobs, KnobSpace
from envs.latency import Identity, LatencyRecord, MeasuredClock
from envs.latency.guardrail import Guardrail, LatencyPredictor
from envs.model.block_importance import removal_order
from envs.processing.images import open_image, to_rgb
from policies.controller import Controller
from policies.fused import FusedController
from ray_ctrl.controllers import controller_folder
from ray_ctrl.serving import RequestController, clamped_budget_ms

ImageLike = str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | ImageRef | None


@dataclass(frozen=True)
class Answer:
    """The result of one request.

    Attributes:
        knobs: the plan chosen.
        budget_ms, clamped_budget_ms: as given, and as the controller observed it.
        predicted, record: milliseconds by stage; `predicted`, for the predicted length of the answer, is None without a
            guardrail that has this device's costs.
        new_tokens: length of the answer.
        feasible: whether some plan was predicted to meet the budget; if none is, the cheapest runs.
    """

    answer: str
    knobs: Knobs
    budget_ms: float
    clamped_budget_ms: float
    reference_ms: float
    predicted: LatencyRecord | None
    record: LatencyRecord
    new_tokens: int
    feasible: bool

    @property
    def within_budget(self) -> bool:
        """Whether the measured latency met the budget."""
        return self.record.total <= self.budget_ms

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        latency = {
            "latency_ms": self.record.total,
            "within_budget": self.within_budget,
            "stages_ms": self.record.to_dict(),
            "predicted_ms": None if self.predicted is None else self.predicted.to_dict(),
        }
        return {key: value for key, value in asdict(self).items() if key not in ("record", "predicted")} | latency


@dataclass(frozen=True)
class LoadedImage(ImageRef):
    """An image in memory, identified by the SHA-256 of its file, else of its pixels."""

    image: Image.Image
    digest: str

    @classmethod
    def of(cls, image: str | Path | bytes | Image.Image | npt.NDArray[np.uint8]) -> "LoadedImage":
        """Reads or converts it now; a UserError if that is not possible."""
        content = image
        if isinstance(image, str | Path):
            try:
                content = Path(image).expanduser().read_bytes()
            except OSError as error:
                raise UserError(f"cannot read image {image}: {error.strerror or error}; give an image file") from None
        if isinstance(content, bytes):
            name = None if isinstance(image, bytes) else f"image {image!s}"
            return cls(open_image(content, name), hashlib.sha256(content).hexdigest())
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise UserError(
                f"the image is a {type(image).__name__}: give a path, the bytes of a file, a PIL image, or a uint8 "
                "array of shape (H, W), (H, W, 3) or (H, W, 4)"
            )
        rgb = to_rgb(image)
        return cls(rgb, hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest())

    def load(self) -> Image.Image:
        return self.image


class AdaptivePipeline:
    """A model and a trained controller that answer requests one after another, every stage timed.

    Args:
        settings: of the model. Without `block_importance` the scores the controller was trained with apply.
        controller, metadata: as `Controller.load` returns them.

    Raises:
        UserError: a model that cannot be loaded, or a controller of another model or block importance.
    """

    def __init__(self, settings: ModelSettings, controller: Controller, metadata: Mapping[str, Any]) -> None:
        torch.set_num_threads(settings.threads)
        self.controller, self.metadata = FusedController(controller), metadata
        self.engine: Any = load_engine(settings, StoreSettings(path=None))
        check_model(self.engine, metadata)
        if settings.block_importance is not None:
            check_importance(self.engine, metadata)
        self.space = KnobSpace(metadata.get("importance") or self.engine.importance)
        self.reference_ms = self._reference_ms()
        self.scale = self.reference_ms / float(metadata.get("reference_ms", self.reference_ms))
        self.range_ms = [clamped_budget_ms(ms, metadata, self.reference_ms) for ms in (0.0, math.inf)]
        self.predictor = self._predictor()

    @classmethod
    def from_pretrained(cls, model: str | Path | None, controller: str | Path, **settings: Any) -> "AdaptivePipeline":
        """Loads both.

        Args:
            model: folder in the published layout, hub id or `embedded`; None takes the one the controller was trained
                on.
            controller: run folder, exported controller or hub id.
            settings: of section `model` in docs/config.md, such as `device="cpu"`; the rest is as in training.

        Raises:
            UserError: nothing there, damaged files, or a controller of another model.
        """
        loaded, metadata = Controller.load(controller_folder(controller))
        trained = dict(metadata.get("config", {}).get("model", {})) | {"block_importance": None}
        chosen = {} if model is None else {"name": str(model)}
        return cls(ModelSettings().replaced(**{**trained, **chosen, **settings}), loaded, metadata)

    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        question: str | Sequence[str],
        budget_ms: float | Sequence[float],
    ) -> Answer | list[Answer]:
        """Answers a question about an image (None: without one) within a budget.

        Lists are batches: equally long, or one value for all. Requests run one after another, each within its own
        budget; batching them would make each wait for the slowest.

        Args:
            image: path, file content, PIL image, uint8 array (H, W), (H, W, 3) or (H, W, 4), or None.

        Raises:
            UserError: an image that cannot be read, an empty or too long question, a budget that is not above 0.
        """
        columns = [image, question, budget_ms]
        lengths = {len(column) for column in columns if isinstance(column, list | tuple)}
        if not lengths:
            return self.answer(make_sample(image, question), budget_ms)  # type: ignore[arg-type]
        if len(lengths) > 1:
            raise UserError(f"lists of {', '.join(map(str, sorted(lengths)))} requests: give lists of equal length")
        count = lengths.pop()
        rows = zip(*(c if isinstance(c, list | tuple) else [c] * count for c in columns), strict=True)
        return [self.answer(make_sample(*row[:2]), row[2]) for row in rows]

    def answer(self, sample: Sample, budget_ms: float) -> Answer:
        """Runs one request at batch 1: the controller chooses, the model answers."""
        budget_ms = check_budget(budget_ms)
        started = time.perf_counter()
        predicted_ms = None if self.predictor is None else self.predictor.predicted_ms(sample) * self.scale
        fits = None if predicted_ms is None else predicted_ms <= budget_ms
        clamped_ms = min(max(budget_ms, self.range_ms[0]), self.range_ms[1])
        deciding = RequestController(self.controller, self.space, clamped_ms, self.reference_ms, fits)
        preparing_ms = (time.perf_counter() - started) * 1e3
        outcome, record, plan = self.engine.run_decided(sample, deciding)
        assert deciding.knobs is not None  # decided in stage 2 of every run
        return Answer(
            answer=self.engine.text(outcome),
            knobs=deciding.knobs,
            budget_ms=budget_ms,
            clamped_budget_ms=clamped_ms,
            reference_ms=self.reference_ms,
            predicted=self.predicted(sample, plan),
            record=replace(record, controller=record.controller + preparing_ms),
            new_tokens=outcome.n_tokens,
            feasible=deciding.feasible,
        )

    def predicted(self, sample: Sample, plan: ExecutionPlan, new_tokens: int | None = None) -> LatencyRecord | None:
        """Milliseconds by stage from the profile of training, scaled to this device; None without one.

        Args:
            new_tokens: length of the answer; None predicts it.
        """
        if self.predictor is None:
            return None
        length = self.predictor.length(sample) if new_tokens is None else new_tokens
        stages = self.predictor.costs.latency(self.engine.shape(sample, plan.tier), plan, length).to_dict()
        return LatencyRecord(**{stage: ms * self.scale for stage, ms in stages.items()})

    def fastest_ms(self, sample: Sample) -> float:
        """Smallest budget that some plan is predicted to meet, ms; 0 without a guardrail."""
        return 0.0 if self.predictor is None else float(self.predictor.predicted_ms(sample).min()) * self.scale

    def _predictor(self) -> LatencyPredictor | None:
        if not self.metadata.get("guardrail"):
            return None
        guardrail = Guardrail.from_dict(self.metadata["guardrail"])
        if guardrail.costs is None:
            return None
        return LatencyPredictor(guardrail, self.engine, self.space, None, factor=guardrail.noise)

    def _reference_ms(self) -> float:
        """Reference latency of this device: that of training if it was profiled on the same, else measured."""
        profiled = self.metadata.get("config", {}).get("latency", {}).get("source") == "profiled"
        if profiled and self.metadata.get("device") == Identity.of(self.engine).device:
            return float(self.metadata["reference_ms"])
        return MeasuredClock(self.engine).reference_ms


def make_sample(image: ImageLike, question: str) -> Sample:
    """A request as a sample, its image decoded.

    Raises:
        UserError: a question that is no text or empty, or an image that cannot be read completely.
    """
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"the question is {question!r}: give text")
    reference = image if image is None or isinstance(image, ImageRef) else LoadedImage.of(image)
    return Sample(content_id(reference.digest if reference else None, question, ()), reference, question, ())


def check_model(engine: Any, metadata: Mapping[str, Any]) -> None:
    """Refuses a controller that was trained on another model: a UserError."""
    trained = metadata.get("fingerprint")
    if trained is not None and trained != engine.model.fingerprint:
        raise UserError(
            f"the controller was trained on another model (fingerprint {str(trained)[:12]}, this one is "
            f"{engine.model.fingerprint[:12]}): train again, choose another with --controller, or set model.name to "
            "its model's folder"
        )


def check_importance(engine: Any, metadata: Mapping[str, Any]) -> None:
    """Refuses a controller whose block counts would remove other blocks here than in training.

    Raises:
        UserError: with the scores in use some knobs would run other blocks.
    """
    trained = metadata.get("importance")
    if trained is not None and _plans(trained) != _plans(engine.importance):
        first, now = (", ".join(map(str, removal_order(s)[:MAX_DROPPED])) for s in (trained, engine.importance))
        raise UserError(
            f"the controller was trained with another block importance (blocks {first} first, here {now}): set "
            "model.block_importance to the file it was trained with, or train again"
        )


def _plans(importance: Sequence[float]) -> list[ExecutionPlan]:
    space = KnobSpace(importance)
    return [space.plan(knobs) for knobs in space.all]
