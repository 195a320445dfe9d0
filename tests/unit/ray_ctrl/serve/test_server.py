"""A replica without Ray: what is answered, what is refused and how, queueing, reloading, drift."""

import asyncio
import base64
import io
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from starlette.requests import Request

from envs.errors import UserError
from envs.knobs import Knobs
from envs.latency import LatencyRecord
from policies.controller import CARD_FILE, WEIGHTS_FILE
from ray_ctrl.pipeline import AdaptivePipeline, Answer
from ray_ctrl.serve.monitoring import WINDOW, DriftWatch
from ray_ctrl.serve.server import Server

FASTEST_MS, RUN_MS = 20.0, 40.0


@dataclass
class Pipeline:
    """Takes 40 ms for any request and predicts 20 ms for the fastest plan; what it was asked is in `seen`."""

    name: str
    seen: list[tuple[str, float]] = field(default_factory=list)
    engine: Any = field(
        default_factory=lambda: SimpleNamespace(
            model=SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(crop_size=56)))
        )
    )
    metadata: Any = field(default_factory=lambda: {"budgets": {"low_ms": 20.0, "high_ms": 60.0}, "iteration": 7})
    space: Any = field(default_factory=lambda: SimpleNamespace(plan=lambda knobs: None))
    reference_ms: float = 60.0
    scale: float = 1.0

    def answer(self, sample: Any, budget_ms: float) -> Answer:
        self.seen.append((sample.question, budget_ms))
        time.sleep(RUN_MS / 1e3)
        record = LatencyRecord(suffix=RUN_MS)
        return Answer(self.name, Knobs("low", 1, 4, 12), budget_ms, budget_ms, 60.0, record, record, 1, True)

    def fastest_ms(self, sample: Any) -> float:
        return FASTEST_MS

    def predicted(self, sample: Any, plan: Any, new_tokens: int) -> LatencyRecord:
        return LatencyRecord(suffix=RUN_MS)


@dataclass
class Recorder:
    """Metrics of a test."""

    within: list[bool] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    failed_reloads: int = 0

    def answered(self, answer: Answer, latency_ms: float, queue_ms: float, within_budget: bool) -> None:
        assert 0 <= queue_ms <= latency_ms
        self.within.append(within_budget)

    def refused(self, status: int) -> None:
        self.statuses.append(status)

    def state(self, pending: int, drift_ratio: float) -> None:
        assert pending >= 0

    def reload_failed(self) -> None:
        self.failed_reloads += 1


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Server]:
    def from_pretrained(model: str | None, controller: str) -> Pipeline:
        if "none" in controller:
            raise UserError(f"no controller at {controller}")
        return Pipeline(controller)

    monkeypatch.setattr(AdaptivePipeline, "from_pretrained", from_pretrained)

    def make(**settings: Any) -> Server:
        server = Server(settings, Recorder())
        asyncio.run(server.reconfigure({"controller": "first"}))
        return server

    return make


def picture(form: str = "PNG", size: tuple[int, int] = (30, 20), **more: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, form, **more)
    return file.getvalue()


async def parts(body: bytes, wait_s: float = 0.0) -> AsyncIterator[dict[str, Any]]:
    for start in range(0, max(len(body), 1), 1 << 16):
        await asyncio.sleep(wait_s)
        yield {"type": "http.request", "body": body[start : start + (1 << 16)], "more_body": True}
    yield {"type": "http.request", "body": b"", "more_body": False}


async def send(
    server: Server, body: bytes, kind: str = "application/json", path: str = "/answer", method: str = "POST",
    headers: dict[str, str] | None = None, wait_s: float = 0.0,
) -> tuple[int, dict[str, Any], dict[str, str]]:  # fmt: skip
    """Status, JSON and headers of one request."""
    stream = parts(body, wait_s)
    sent = {"content-type": kind, **(headers or {})}
    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"", "root_path": "", "server": ("test", 80),
        "scheme": "http", "headers": [(k.encode(), v.encode()) for k, v in sent.items()],
    }  # fmt: skip
    response = await server(Request(scope, lambda: anext(stream)))
    return response.status_code, json.loads(bytes(response.body)), dict(response.headers)


def question(budget_ms: Any = 500, **more: Any) -> bytes:
    return json.dumps({"question": "what?", "budget_ms": budget_ms, **more}).encode()


def multipart(**fields: str | bytes) -> tuple[bytes, str]:
    mark, body = "----7d1f", b""
    for name, value in fields.items():
        file = f'; filename="{name}.bin"' if isinstance(value, bytes) else ""
        body += f'--{mark}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return body + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def test_a_question_is_answered_within_what_is_left_of_its_budget(make: Callable[..., Server]) -> None:
    server = make(reserve_ms=5.0)
    encoded = base64.b64encode(picture()).decode()
    status, found, _ = asyncio.run(send(server, question(200, image=f"data:image/png;base64,{encoded}")))
    assert status == 200
    assert found["answer"] == "first"
    assert found["knobs"] == {"tier": "low", "insertion": 1, "top_k": 4, "blocks": 12}
    assert found["budget_ms"] == 200
    assert found["within_budget"]
    assert found["latency_ms"] >= found["queue_ms"] + RUN_MS
    assert found["decided_for_ms"] == pytest.approx(195 - found["queue_ms"], abs=1.0)
    assert found["predicted_ms"]["suffix"] == RUN_MS
    assert server.metrics.within == [True]  # type: ignore[attr-defined]


@pytest.mark.parametrize("content", [picture("JPEG"), picture("PNG", (300, 200)), picture("BMP")])
def test_a_form_with_a_file_is_read_byte_by_byte(make: Callable[..., Server], content: bytes) -> None:
    body, kind = multipart(question="what? \u00e4", budget_ms="300", image=content)
    server = make()
    assert asyncio.run(send(server, body, kind))[0] == 200
    assert server.pipeline.seen[-1][0] == "what? \u00e4"  # type: ignore[attr-defined]


def animation() -> bytes:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    return picture("GIF", append_images=frames, save_all=True)


HOSTILE: list[tuple[bytes, str, int, str]] = [
    (b"", "application/json", 400, "not JSON"),
    (b"[1]", "application/json", 400, "JSON list"),
    (b"[" * 100_000, "application/json", 400, "not JSON"),
    (b"\xff\xfe", "text/plain", 400, "not JSON"),
    (b"{}", "application/json", 400, "give question, budget_ms"),
    (question(extra=1), "application/json", 400, "fields budget_ms, extra, question"),
    (question(0), "application/json", 400, "budget of 0.0 ms"),
    (question(-3), "application/json", 400, "budget of -3.0 ms"),
    (b'{"question": "a", "budget_ms": NaN}', "application/json", 400, "budget of nan ms"),
    (question(True), "application/json", 400, "truth value"),
    (question([5]), "application/json", 400, "not a number"),
    (question(86_400_000), "application/json", 400, "above the limit of 60000 ms"),
    (json.dumps({"question": "", "budget_ms": 50}).encode(), "application/json", 400, "give text"),
    (json.dumps({"question": "\udcff", "budget_ms": 50}).encode(), "application/json", 400, "half a character"),
    (json.dumps({"question": 7, "budget_ms": 50}).encode(), "application/json", 400, "give text"),
    (question(image="no base64!"), "application/json", 400, "not base64"),
    (question(image=""), "application/json", 400, "image is empty"),
    (question(image=base64.b64encode(b"no image").decode()), "application/json", 400, "not an image"),
    (question(image=base64.b64encode(picture()[:60]).decode()), "application/json", 400, "cannot read the image"),
    (*multipart(question="a", budget_ms="50", image=b""), 400, "image.bin' is empty"),
    (*multipart(question="a", budget_ms="soon"), 400, "not a number"),
    (b"no boundary", "multipart/form-data", 400, "no fields"),
    (b"x" * 3_000_000, "application/json", 413, "above 2 MB"),
    (question(image=base64.b64encode(picture(size=(3000, 2000))).decode()), "application/json", 413, "3000 x 2000"),
]


@pytest.mark.parametrize(("body", "kind", "status", "words"), HOSTILE)
def test_what_cannot_be_answered_is_one_line(
    make: Callable[..., Server], body: bytes, kind: str, status: int, words: str
) -> None:
    server = make(max_body_mb=2, max_megapixels=4)
    given, found, _ = asyncio.run(send(server, body, kind))
    assert (given, words in found["error"]) == (status, True), found
    assert "\n" not in found["error"]
    assert len(found["error"]) < 400
    assert server.metrics.statuses == [status]  # type: ignore[attr-defined]
    assert asyncio.run(send(server, question()))[0] == 200, "nothing else is disturbed"


def test_an_animation_is_its_first_frame(make: Callable[..., Server]) -> None:
    assert asyncio.run(send(make(), question(image=base64.b64encode(animation()).decode())))[0] == 200


def test_a_declared_gigabyte_is_refused_unread_and_a_slow_client_after_a_while(make: Callable[..., Server]) -> None:
    async def nothing() -> AsyncIterator[dict[str, Any]]:
        raise AssertionError("the body was read")
        yield {}

    server = make(read_timeout_s=0.2)
    status, _, _ = asyncio.run(send(server, b"", headers={"content-length": str(10**9)}))
    assert status == 413
    began = time.perf_counter()
    status, found, _ = asyncio.run(send(server, b"x" * 1_000_000, wait_s=0.05))
    assert (status, time.perf_counter() - began < 2) == (408, True)
    assert "within 0.2 s" in found["error"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/answer", 405), ("GET", "/x", 404), ("PUT", "/", 405)])
def test_other_places_are_named(make: Callable[..., Server], method: str, path: str, status: int) -> None:
    given, found, _ = asyncio.run(send(make(), b"", path=path, method=method))
    assert (given, "/answer" in found["error"]) == (status, True)


def test_the_range_of_budgets_is_given(make: Callable[..., Server]) -> None:
    _, found, _ = asyncio.run(send(make(), b"", path="/info", method="GET"))
    assert (found["low_ms"], found["high_ms"], found["controller"], found["iteration"]) == (20.0, 60.0, "first", 7)


def test_requests_that_cannot_be_met_any_more_are_refused_before_they_wait(make: Callable[..., Server]) -> None:
    """Four at the same time, 40 ms each: with 110 ms the first two or three can be answered."""

    async def burst(server: Server) -> list[tuple[int, dict[str, Any], dict[str, str], float]]:
        async def timed() -> tuple[int, dict[str, Any], dict[str, str], float]:
            began = time.perf_counter()
            return (*await send(server, question(110)), (time.perf_counter() - began) * 1e3)

        return await asyncio.gather(*(timed() for _ in range(6)))

    server = make()
    done = asyncio.run(burst(server))
    answered, refused = ([d for d in done if d[0] == status] for status in (200, 503))
    assert len(answered) + len(refused) == 6
    assert 1 <= len(answered) <= 3
    assert all(int(headers["retry-after"]) >= 1 for _, _, headers, _ in refused)
    assert all("of the budget are left" in found["error"] for _, found, _, _ in refused)
    assert server.pending == 0


def test_late_requests_run_the_cheapest_plan_if_configured(make: Callable[..., Server]) -> None:
    server = make(late="cheapest")

    async def burst() -> Any:
        return await asyncio.gather(*(send(server, question(50)) for _ in range(4)))

    done = asyncio.run(burst())
    assert [status for status, _, _ in done] == [200] * 4
    assert min(budget for _, budget in server.pipeline.seen[2:]) == pytest.approx(0.1)  # type: ignore[attr-defined]
    assert server.metrics.within.count(False) >= 2  # type: ignore[attr-defined]


def test_the_queue_is_bounded(make: Callable[..., Server]) -> None:
    server = make(max_queue=2, late="cheapest")

    async def burst() -> Any:
        return await asyncio.gather(*(send(server, question(5000)) for _ in range(5)))

    done = asyncio.run(burst())
    assert sorted(status for status, _, _ in done) == [200, 200, 503, 503, 503]
    assert all(headers["retry-after"] == "1" for status, _, headers in done if status == 503)


def test_a_new_controller_is_used_from_the_next_request_on(make: Callable[..., Server]) -> None:
    server = make()

    async def requests_around_a_reload() -> list[str]:
        before = asyncio.create_task(send(server, question()))
        await asyncio.sleep(0.01)
        await server.reconfigure({"controller": "second"})
        return [(await before)[1]["answer"], (await send(server, question()))[1]["answer"]]

    assert asyncio.run(requests_around_a_reload()) == ["first", "second"]
    asyncio.run(server.reconfigure({"controller": "none"}))
    assert asyncio.run(send(server, question()))[1]["answer"] == "second"
    assert server.metrics.failed_reloads == 1  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no controller at none"):
        asyncio.run(Server({}, Recorder()).reconfigure({"controller": "none"}))


def test_a_controller_written_anew_is_loaded_by_itself(make: Callable[..., Server], tmp_path: Path) -> None:
    for name in (CARD_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes(b"1")

    async def until_loaded() -> None:
        server = make_server()
        await server.reconfigure({"controller": str(tmp_path)})
        first = server.pipeline
        await asyncio.sleep(0.1)
        assert server.pipeline is first
        os.utime(tmp_path / CARD_FILE, (1, 2**31))
        async with asyncio.timeout(10):
            while server.pipeline is first:
                await asyncio.sleep(0.01)
        assert server.controller == str(tmp_path)

    def make_server() -> Server:
        return Server({"reload_s": 0.02}, Recorder())

    make()  # with its stand-ins
    asyncio.run(until_loaded())


def test_drift_is_warned_of_once_each_time(caplog: pytest.LogCaptureFixture) -> None:
    watch = DriftWatch(0.25)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        for ratio in (1.2, 0.9, 1.5, 1.5, 1.0, 0.5):
            for _ in range(WINDOW):
                watch.add(40.0 * ratio, 40.0)
            assert watch.drifted == (ratio in (1.5, 0.5))
            assert watch.ratio == pytest.approx(ratio)
    assert [record.args[0] > 1 for record in caplog.records] == [True, False]  # type: ignore[index, operator]
