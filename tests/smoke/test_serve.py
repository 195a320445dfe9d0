"""`ray-ctrl serve` as a user starts it: answers, hostile bodies, reload, a killed replica, the page, metrics."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import finish, start
from PIL import Image

from policies.controller import CARD_FILE
from ray_ctrl.pipeline import AdaptivePipeline

BROWSER = Path("/usr/bin/chromium")
BUDGET_MS = 20_000


@dataclass
class Served:
    """A running server, its controller's folder, and where its metrics are."""

    url: str
    process: subprocess.Popen[str]
    controller: Path
    metrics: str

    def ask(self, question: str = "how many digits?", image: bytes | None = None) -> httpx.Response:
        """As a form if there is an image, else as JSON."""
        fields = {"question": question, "budget_ms": BUDGET_MS}
        body: dict[str, Any] = {"json": fields} if image is None else {"data": fields, "files": {"image": image}}
        return httpx.post(f"{self.url}/answer", timeout=60, **body)

    def info(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/info", timeout=60).json())

    def replica(self) -> int:
        """Process id of the replica."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        parents = {int(pid): int(parent) for pid, parent, _ in rows}
        for pid, _, name in rows:
            above = int(pid)
            while above > 1 and above != self.process.pid:
                above = parents.get(above, 0)
            if above == self.process.pid and name.startswith("ray::ServeReplica:ray-ctrl"):
                return int(pid)
        raise AssertionError("no replica is running")


@pytest.fixture(scope="module")
def served(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    controller = tmp_path_factory.mktemp("served") / "controller"
    shutil.copytree(trained / "controller", controller)
    port = 8700 + os.getpid() % 200
    process = start(["serve", controller, "--port", str(port), "read_timeout_s=3", "max_body_mb=5"])
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f":{port}/" in line, line + (process.stderr.read() if process.stderr else "")
    metrics = re.search(r"http://\S+/metrics", process.stdout.readline())
    assert metrics is not None
    yield Served(f"http://127.0.0.1:{port}", process, controller, metrics[0])
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.status, done.err.strip()) == (130, "interrupted")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_answers_are_the_pipelines(served: Served, picture: Path) -> None:
    pipe = AdaptivePipeline.from_pretrained(None, served.controller)
    for question in ("how many digits?", "what color is the square?"):
        found = served.ask(question, picture.read_bytes()).json()
        expected = pipe(picture, question, BUDGET_MS)
        assert found["answer"] == expected.answer  # type: ignore[union-attr]
        assert found["knobs"] == expected.to_dict()["knobs"]  # type: ignore[union-attr]
        assert found["within_budget"]


def test_a_gigabyte_and_a_slow_client_are_refused_and_others_are_served(served: Served) -> None:
    host = served.url.removeprefix("http://")
    large, slow = (http.client.HTTPConnection(host, timeout=60) for _ in range(2))
    large.putrequest("POST", "/answer")
    large.putheader("Content-Length", str(10**9))
    large.endheaders(b"x" * 65536)
    slow.putrequest("POST", "/answer")
    slow.putheader("Content-Length", "1000")
    slow.endheaders(b'{"question"')
    assert served.ask().status_code == 200
    for connection, status in ((large, 413), (slow, 408)):
        response = connection.getresponse()
        assert response.status == status
        assert "\n" not in json.loads(response.read())["error"]
        connection.close()
    assert served.ask(image=b"no image").status_code == 400


def test_a_new_controller_is_loaded_without_losing_a_request(served: Served) -> None:
    card = json.loads((served.controller / CARD_FILE).read_text("utf-8"))
    card["metadata"]["iteration"] = 777
    (served.controller / CARD_FILE).write_text(json.dumps(card))
    statuses: list[int] = []
    deadline = time.monotonic() + 60
    while served.info()["iteration"] != 777:
        statuses.append(served.ask().status_code)
        assert time.monotonic() < deadline
    assert set(statuses) <= {200}
    assert served.process.poll() is None


def test_metrics_are_at_rays_endpoint(served: Served) -> None:
    assert served.ask().status_code == 200
    deadline, wanted = time.monotonic() + 60, {"requests_total", "latency_ms_bucket", "plans_total", "drift_ratio"}
    while wanted:
        page = httpx.get(served.metrics, timeout=60).text
        wanted = {name for name in wanted if f"ray_ray_ctrl_serve_{name}" not in page}
        assert time.monotonic() < deadline, wanted
        time.sleep(0.5)


def test_a_killed_replica_loses_only_what_it_was_doing_and_says_so(served: Served) -> None:
    done: list[int] = []

    def ask() -> None:
        done.append(served.ask().status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    os.kill(served.replica(), signal.SIGKILL)
    for thread in threads:
        thread.join(90)
    assert len(done) == 8, "everyone is answered"
    assert set(done) <= {200, 500, 503}
    deadline = time.monotonic() + 90
    while served.ask().status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.skipif(not BROWSER.is_file(), reason=f"no browser at {BROWSER}")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_the_answer_stage_by_stage(served: Served, picture: Path, width: int, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(BROWSER), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(served.url)
        page.wait_for_function("document.getElementById('about').textContent.includes('reference request')")
        page.set_input_files("#image", str(picture))
        page.fill("#question", "what color is the square?")
        page.evaluate("b => { b.value = b.max; b.dispatchEvent(new Event('input')); }", page.query_selector("#budget"))
        page.click("#send")
        page.wait_for_selector("#result:not([hidden]), #error:not([hidden])", timeout=60_000)
        stages = page.eval_on_selector_all("#stages td:first-child", "cells => cells.map(cell => cell.textContent)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if page.is_visible("#result"):
            assert stages == ["queue", "processor", "vision", "prefix", "suffix", "decode", "controller"]
            assert "experts per token" in page.inner_text("#plan")
            assert "the budget of" in page.inner_text("#verdict")
        else:
            assert "budget" in page.inner_text("#error")
        page.screenshot(path=os.environ.get("PAGE_SHOTS", str(tmp_path)) + f"/{width}.png", full_page=True)
        assert problems == []
        browser.close()
