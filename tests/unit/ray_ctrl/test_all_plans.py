"""All plans of many samples, run by several processes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from envs.config import LatencySettings, StoreSettings, TaskSettings
from envs.env_resources import EnvConfig
from ray_ctrl import all_plans


def config(store: Path | None, samples: int = 4) -> EnvConfig:
    return EnvConfig(
        task=TaskSettings(train_samples=samples),
        latency=LatencySettings(source="roofline"),
        store=StoreSettings(path=None if store is None else str(store)),
    )


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two processes, whatever the machine, with one sample a batch."""
    monkeypatch.setattr(all_plans, "LEAST_BATCHES", 1)
    monkeypatch.setattr(all_plans, "BATCH", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    others = set(active_children())
    yield
    for child in set(active_children()) - others:
        child.join(30)  # a process that has been terminated may still be ending
        assert not child.is_alive(), "no process outlives the call"


def test_processes_give_the_outcomes_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = all_plans.fill_store(config(tmp_path / "shared.sqlite", 2), "samples")
    plans = all_plans.distinct_plans(shared)
    for sample in shared.samples:
        assert None not in shared.engine.known_outcomes([sample] * len(plans), plans), "everything was run"
    alone = config(tmp_path / "alone.sqlite", 2).build()
    first, second = ([*all_plans.run_all_plans(r, r.samples, "samples")] for r in (shared, alone))
    assert first == second
    # What is known is not run again, so no process starts.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(all_plans, "_run_shares", lambda *given: pytest.fail("ran again"))
    all_plans.fill_store(config(tmp_path / "shared.sqlite", 2), "samples")
    monkeypatch.undo()


def test_without_a_store_processes_could_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_plans, "_run_shares", lambda *given: pytest.fail("started processes"))
    resources = all_plans.fill_store(config(None), "samples")
    assert len(resources.samples) == 4


def _die(indices: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(indices: Any) -> None:
    time.sleep(60)


def _nothing(config: EnvConfig) -> None:
    """A process of the pool that loads no model."""


def test_a_killed_process_leaves_the_rest_to_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(all_plans, "_start", _nothing)
    monkeypatch.setattr(all_plans, "_run_indices", _die)
    resources = all_plans.fill_store(config(tmp_path / "s.sqlite"), "samples")
    assert "was killed, perhaps for memory: the rest runs in this one" in capsys.readouterr().out.replace("\n", " ")
    assert len(resources.samples) == 4


def test_an_interruption_waits_for_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_plans, "_start", _nothing)
    monkeypatch.setattr(all_plans, "_run_indices", _hang)
    settings = config(tmp_path / "s.sqlite")
    settings.build()
    threading.Timer(8.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        all_plans.fill_store(settings, "samples")
    assert time.monotonic() - began < 40
