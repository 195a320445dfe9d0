"""One replica: reads requests, queues them, answers one after another within what is left of their budgets.

The clock of a request starts when it arrives here. Reading, decoding and waiting are subtracted from the budget before
the controller decides. A request that cannot be answered within its budget any more is refused when it arrives, as far
as the queue says so then, or when its turn comes.
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from envs.data.sample import Sample
from envs.errors import UserError
from envs.latency.measured import reference_sample
from policies.controller import CARD_FILE, WEIGHTS_FILE
from ray_ctrl.controllers import find_controller
from ray_ctrl.pipeline import AdaptivePipeline, Answer
from ray_ctrl.serve.monitoring import DriftWatch, Metrics, RayMetrics
from ray_ctrl.serve.request import Asked, Refused, read
from ray_ctrl.serve.settings import ReplicaSettings

SMOOTHING: Final = 0.9
"""Weight of the past in the running mean of what a request takes."""
LEAST_MS: Final = 0.1
"""What a late request is run with under `late=cheapest`: below every plan, so that the cheapest runs."""
_log = logging.getLogger("ray.serve")


class Server:
    """A replica of the deployment.

    Args:
        settings: fields of `ReplicaSettings`; the controller comes by `reconfigure`, before any request.
        metrics: None publishes at Ray's endpoint.
    """

    def __init__(self, settings: Mapping[str, Any], metrics: Metrics | None = None) -> None:
        self.settings = ReplicaSettings(**settings)
        self.metrics = metrics or RayMetrics()
        # The model runs in one thread, whose order is the queue; the loop stays free to read and refuse.
        self.worker = ThreadPoolExecutor(1)
        self.page = resources.files("ray_ctrl.serve").joinpath("page.html").read_text("utf-8")
        self.drift = DriftWatch(self.settings.drift_tolerance)
        self.pending, self.service_ms, self.started = 0, 0.0, 0.0
        self.pipeline: AdaptivePipeline | None = None
        self.controller, self.stamp = "", 0.0
        self.watching: asyncio.Task[None] | None = None

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Changes the controller between two requests; one that cannot be loaded leaves the old one at work.

        Args:
            config: `controller`: run folder, exported controller or hub id.

        Raises:
            UserError: the first one cannot be loaded.
        """
        wanted = str(config["controller"])
        self.stamp = last_change(wanted)
        try:
            self.pipeline = await asyncio.get_running_loop().run_in_executor(self.worker, self._load, wanted)
            self.controller = wanted
        except UserError as error:
            if self.pipeline is None:
                raise
            self.metrics.reload_failed()
            _log.error("controller %s is not used, %s stays: %s", wanted, self.controller, error.message)
        self.watching = self.watching or asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Loads the controller again when its files have changed."""
        while True:
            await asyncio.sleep(self.settings.reload_s)
            if await asyncio.to_thread(last_change, self.controller) != self.stamp:
                await self.reconfigure({"controller": self.controller})

    async def __call__(self, request: Request) -> Response:
        """Answers any HTTP request: the page at `/`, `/info`, and questions posted to `/answer`."""
        arrived = time.perf_counter()
        try:
            route = (request.method, request.url.path.rstrip("/").rpartition("/")[2])
            if route == ("POST", "answer"):
                return JSONResponse(await self._answer(await read(request, self.settings), arrived))
            if route == ("GET", "info"):
                return JSONResponse(self.info())
            if route == ("GET", ""):
                return HTMLResponse(self.page)
            raise Refused(405 if route[1] in ("answer", "info", "") else 404, "POST to /answer, or GET / or /info")
        except Refused as refused:
            self.metrics.refused(refused.status)
            again = refused.retry_after_s
            headers = {} if again is None else {"Retry-After": str(max(1, math.ceil(again)))}
            return JSONResponse({"error": refused.message}, refused.status, headers)

    def info(self) -> dict[str, Any]:
        """What is served, the range of budgets that the controller was trained on, and how busy it is."""
        pipeline = self._pipeline()
        budgets = pipeline.metadata.get("budgets") or {}
        scaled = {key: budgets[key] * pipeline.scale for key in ("low_ms", "high_ms") if key in budgets}
        return {
            "controller": Path(self.controller).name,
            "iteration": pipeline.metadata.get("iteration"),
            "reference_ms": pipeline.reference_ms,
            **scaled,
            "pending": self.pending,
            "drift_ratio": self.drift.ratio,
        }

    def wait_ms(self) -> float:
        """Expected time until a request that arrives now starts."""
        running_ms = (time.perf_counter() - self.started) * 1e3
        return max(self.pending * self.service_ms - min(running_ms, self.service_ms), 0.0) if self.pending else 0.0

    async def _answer(self, asked: Asked, arrived: float) -> dict[str, Any]:
        deadline = arrived + (asked.budget_ms - self.settings.reserve_ms) / 1e3
        wait_ms = self.wait_ms()
        if self.pending >= self.settings.max_queue:
            raise Refused(503, f"{self.pending} requests are waiting: try again later", wait_ms / 1e3)
        self._check_deadline(asked.sample, deadline, wait_ms)
        self.pending += 1
        try:
            loop = asyncio.get_running_loop()
            began, answer = await loop.run_in_executor(self.worker, self._run, asked.sample, deadline)
        finally:
            self.pending -= 1
            self.metrics.state(self.pending, self.drift.ratio)
        queue_ms, latency_ms = (began - arrived) * 1e3, (time.perf_counter() - arrived) * 1e3
        within = latency_ms + self.settings.reserve_ms <= asked.budget_ms
        self.metrics.answered(answer, latency_ms, queue_ms, within)
        given = {"budget_ms": asked.budget_ms, "latency_ms": latency_ms, "queue_ms": queue_ms, "within_budget": within}
        return answer.to_dict() | given | {"decided_for_ms": answer.budget_ms}

    def _run(self, sample: Sample, deadline: float) -> tuple[float, Answer]:
        """In the worker: the request's turn has come."""
        self.started = began = time.perf_counter()
        self._check_deadline(sample, deadline, 0.0)
        pipeline = self._pipeline()
        answer = pipeline.answer(sample, max((deadline - began) * 1e3, LEAST_MS))
        spent_ms = (time.perf_counter() - began) * 1e3
        self.service_ms = SMOOTHING * self.service_ms + (1 - SMOOTHING) * spent_ms
        predicted = pipeline.predicted(sample, pipeline.space.plan(answer.knobs), answer.new_tokens)
        if predicted is not None:
            self.drift.add(answer.record.total, predicted.total)
        return began, answer

    def _check_deadline(self, sample: Sample, deadline: float, wait_ms: float) -> None:
        """Refuses, if so configured, a request that no plan is predicted to answer within its budget."""
        left_ms = (deadline - time.perf_counter()) * 1e3 - wait_ms
        fastest_ms = self._pipeline().fastest_ms(sample)
        if self.settings.late == "refuse" and left_ms < max(fastest_ms, LEAST_MS):
            raise Refused(
                503,
                f"{max(left_ms, 0):.0f} ms of the budget are left after queueing and the fastest plan takes "
                f"{fastest_ms:.0f} ms: try again later, or with a larger budget",
                max(wait_ms, self.service_ms) / 1e3,
            )

    def _pipeline(self) -> AdaptivePipeline:
        assert self.pipeline is not None  # Serve calls `reconfigure` before it sends requests
        return self.pipeline

    def _load(self, controller: str) -> AdaptivePipeline:
        """In the worker: a pipeline that has run once at the largest size, so that no request pays for that."""
        pipeline = AdaptivePipeline.from_pretrained(self.settings.model, controller)
        warm_up = reference_sample(pipeline.engine.model.config.vision.crop_size)
        for _ in range(2):
            self.service_ms = pipeline.answer(warm_up, 2 * pipeline.reference_ms).record.total
        return pipeline


def last_change(place: str) -> float:
    """When the files of a controller were last written; 0 for one of the hub."""
    if not Path(place).exists():
        return 0.0
    try:
        folder = find_controller(Path(place))[0]
        return max((folder / name).stat().st_mtime for name in (CARD_FILE, WEIGHTS_FILE))
    except (UserError, OSError):
        return 0.0
