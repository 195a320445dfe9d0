"""The store: canonical, transactional, bounded, shared; and keys that contain all that decides an outcome."""

import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from doubles import with_geometry

from envs.engine import OutcomeStore, RolloutEngine, export_parquet, open_existing
from envs.engine.keys import EngineFingerprint, PromptKey, latency_key, outcome_key, processor_fingerprint
from envs.engine.store import StoredOutcome, StoredStates
from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE

FINGERPRINT = json.dumps({"weights": "w"})


def entry(number, *, token=1, seconds=0.5):
    prompt = json.dumps({"image": None, "tiling": None, "text_ids": [number]})
    return number.to_bytes(32, "big"), (prompt, "[8]", StoredOutcome((token, number), True, seconds))


def fill(store, numbers, **kwargs):
    return store.put_outcomes(FINGERPRINT, dict(entry(number, **kwargs) for number in numbers))


@pytest.fixture
def store(tmp_path):
    return OutcomeStore(tmp_path / "deep" / "store.sqlite")


def test_first_writer_is_canonical(store):
    fill(store, [1], token=7)
    canonical = fill(store, [1, 2], token=9)
    assert [canonical[entry(n)[0]].token_ids for n in (1, 2)] == [(7, 1), (9, 2)]
    assert store.disagreements == 1
    assert OutcomeStore(store.path).get_outcomes([entry(1)[0]])[entry(1)[0]].token_ids == (7, 1)


def test_states_come_back_bit_equal(store):
    raw = torch.randn(5, 16, 8).numpy().tobytes()
    store.put_states(FINGERPRINT, {b"k": ("{}", "{}", StoredStates(raw, 1.0))})
    assert store.get_states([b"k", b"other"]) == {b"k": StoredStates(raw, 1.0)}


def test_pickles_as_a_path(store):
    fill(store, [3])
    assert pickle.loads(pickle.dumps(store)).get_outcomes([entry(3)[0]])


WRITER = """
import sys, json
sys.path.insert(0, {root!r})
from envs.engine.store import OutcomeStore, StoredOutcome
store = OutcomeStore({path!r})
print("ready", flush=True)
for batch in range({start}, {stop}, 5):
    rows = {{n.to_bytes(32, "big"): (json.dumps({{"text_ids": [n]}}), "[8]", StoredOutcome(({token}, n), True, 0.1))
            for n in range(batch, batch + 5)}}
    store.put_outcomes('{{"weights": "w"}}', rows)
    print(batch, flush=True)
"""


def start_writer(path, start, stop, token):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    code = WRITER.format(root=root, path=str(path), start=start, stop=stop, token=token)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_writing_lose_nothing(store):
    """Their keys overlap: every key is there once, and each batch of five came from one of the two."""
    writers = [start_writer(store.path, 0, 400, 1), start_writer(store.path, 200, 600, 2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    held = store.get_outcomes([n.to_bytes(32, "big") for n in range(600)])
    assert len(held) == 600
    tokens = [held[n.to_bytes(32, "big")].token_ids for n in range(600)]
    assert all(answer[1] == n for n, answer in enumerate(tokens))
    assert {answer[0] for answer in tokens[:200]} == {1}
    assert {answer[0] for answer in tokens[400:]} == {2}
    assert all(len({answer[0] for answer in tokens[batch : batch + 5]}) == 1 for batch in range(0, 600, 5))


def test_killed_writer_leaves_complete_batches(store):
    writer = start_writer(store.path, 0, 10**6, 4)
    assert writer.stdout is not None
    seen = [writer.stdout.readline() for _ in range(12)]
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait(timeout=30)
    confirmed = int(seen[-1])
    again = OutcomeStore(store.path)
    rows = list(again.rows())
    assert len(rows) >= confirmed + 5
    assert len(rows) % 5 == 0
    assert all(row["token_ids"] == [4, row["text_ids"][0]] for row in rows)
    fill(again, [10**7])
    assert sqlite3.connect(store.path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_bound_drops_what_was_not_used_for_longest(tmp_path):
    store = OutcomeStore(tmp_path / "s.sqlite", max_bytes=2**20)
    old = list(range(3000))
    fill(store, old)
    # An entry used again counts as fresh from then on.
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE outcomes SET used = used - 10 * 86400")
    keep = [entry(n)[0] for n in old[:50]]
    assert len(store.get_outcomes(keep)) == 50
    for start in range(3000, 6000, 1000):
        fill(store, range(start, start + 1000))
    assert store.inspect()["bytes"] <= 2**20
    assert store.path.stat().st_size <= 1.1 * 2**20
    assert len(store.get_outcomes(keep)) == 50
    assert len(store.get_outcomes([entry(n)[0] for n in old[50:]])) < 2000


def test_prune_by_age_and_size(store):
    fill(store, range(100))
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE outcomes SET used = 5 WHERE token_ids LIKE '[1, 1%'")
    aged = sum(str(n).startswith("1") for n in range(100))
    assert store.prune(unused_days=30) == aged
    assert store.inspect()["outcomes"] == 100 - aged
    assert store.prune(max_bytes=0) == 100 - aged
    assert store.inspect()["settings"] == []


def test_latency_tokens_go_before_outcomes(tmp_path):
    """A run that overflows its bound loses latency tokens, the oldest first, and no outcome."""
    store = OutcomeStore(tmp_path / "s.sqlite", max_bytes=2**21)
    fill(store, range(500))
    written = 0
    for batch in range(16):
        keys = [f"{batch:02} {i}".encode() for i in range(20)]
        store.put_states(FINGERPRINT, {key: ("{}", "{}", StoredStates(os.urandom(2**14), 1.0)) for key in keys})
        written += len(keys)
        with sqlite3.connect(store.path) as db:
            db.execute("UPDATE latency_tokens SET used = used - 86400 WHERE used > ?", (time.time() - 1000,))
        assert store.inspect()["bytes"] <= 2**21
    found = store.inspect()
    assert written * 2**14 > 2 * 2**21
    assert found["outcomes"] == 500
    assert 50 < found["latency_tokens"] < written / 2
    assert store.path.stat().st_size <= 1.1 * 2**21


@pytest.mark.parametrize("table", ["outcomes", "latency_tokens"])
def test_pruning_and_counting_never_read_the_states(store, table):
    queries = (
        f"SELECT key FROM {table} ORDER BY used, key LIMIT 5",
        f"SELECT COUNT(*) FROM {table}",
        f"SELECT COUNT(*), COALESCE(SUM(seconds), 0) FROM {table}",
        f"SELECT key FROM {table} WHERE used < 5",
    )
    with sqlite3.connect(store.path) as db:
        for query in queries:
            steps = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}")]
            assert all(f"COVERING INDEX {table}_used" in step for step in steps), steps


def test_a_store_in_use_or_without_space_is_not_to_be_thrown_away(store, monkeypatch):
    fill(store, range(20))
    store.close()
    monkeypatch.setattr("envs.engine.store.BUSY_SECONDS", 0.1)
    blocker = sqlite3.connect(store.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match="locked; another process is writing to it: wait") as locked:
        fill(store, [21])
    blocker.execute("ROLLBACK")
    store._open().execute("PRAGMA max_page_count = 1")
    with pytest.raises(UserError, match="full; free some space") as full:
        fill(store, range(100, 2000))
    store._open().execute("PRAGMA query_only = 1")
    with pytest.raises(UserError, match="readonly database; make the file and its folder writable") as closed:
        fill(store, [22])
    for error in (locked, full, closed):
        assert "remove" not in str(error.value)
    assert len(OutcomeStore(store.path).get_outcomes([entry(n)[0] for n in range(20)])) == 20


def test_export(store, tmp_path):
    import pyarrow.parquet as parquet

    fill(store, range(7))
    assert export_parquet(store, tmp_path / "out.parquet") == 7
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert sorted(row["token_ids"][1] for row in rows) == list(range(7))
    assert rows[0]["weights"] == "w"
    with pytest.raises(UserError, match="exists already"):
        export_parquet(store, tmp_path / "out.parquet")


def test_inspect_counts(store):
    fill(store, range(4), seconds=0.25)
    found = store.inspect()
    assert (found["outcomes"], found["outcomes_seconds"], found["latency_tokens"]) == (4, 1.0, 0)
    assert found["settings"] == [{"weights": "w", "outcomes": 4}]


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no store at"):
        open_existing(tmp_path / "gone.sqlite")
    noise = tmp_path / "noise.sqlite"
    noise.write_bytes(b"not a database, but long enough to look like one " * 40)
    with pytest.raises(UserError, match="cannot use store"):
        OutcomeStore(noise)
    later = OutcomeStore(tmp_path / "later.sqlite")
    with sqlite3.connect(later.path) as db:
        db.execute("UPDATE facts SET value = '99'")
    with pytest.raises(UserError, match="format 99"):
        OutcomeStore(later.path)
    with pytest.raises(UserError, match="at least"):
        OutcomeStore(tmp_path / "x", max_bytes=10)
    with pytest.raises(UserError, match="does not exist"):
        list(OutcomeStore(tmp_path / "y.sqlite").rows("facts; DROP TABLE outcomes"))


# Everything below: a fingerprint that changes outcomes and is not in the key is a defect.

PROMPT = PromptKey("ab", (2, 3), (5, 6))
TOP_K = ExecutionPlan().top_k_per_block


@pytest.fixture
def fingerprint(small_model, processor):
    return EngineFingerprint.of(small_model, processor, 8)


@pytest.mark.parametrize("name", [field.name for field in fields(EngineFingerprint)])
def test_every_field_is_in_the_key(fingerprint, name):
    value = getattr(fingerprint, name)
    other = replace(fingerprint, **{name: value + 1 if isinstance(value, int) else value + "x"})
    assert outcome_key(fingerprint.to_json(), PROMPT, TOP_K) != outcome_key(other.to_json(), PROMPT, TOP_K)
    assert latency_key(fingerprint.to_json(), PROMPT, {}) != latency_key(other.to_json(), PROMPT, {})


@pytest.mark.parametrize("change", [{"image": "cd"}, {"tiling": (3, 2)}, {"text_ids": (5, 7)}, {"image": None}])
def test_every_part_of_the_prompt_is_in_the_key(fingerprint, change):
    text = fingerprint.to_json()
    assert outcome_key(text, PROMPT, TOP_K) != outcome_key(text, replace(PROMPT, **change), TOP_K)


def test_plans_and_encoders_are_in_the_key(fingerprint):
    text = fingerprint.to_json()
    keys = {outcome_key(text, PROMPT, ExecutionPlan("high", p, k).top_k_per_block) for p in (1, 2) for k in (4, 5, 8)}
    assert len(keys) == 5, "two positions, two reduced top-k, and one full plan"
    assert latency_key(text, PROMPT, {"seed": 0}) != latency_key(text, PROMPT, {"seed": 1})


def changed_weight(model):
    other = AdaptiveMolmoE(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.language.blocks[7].down[0, 0, 0] += 1e-3
    return other


def other_kernel(model):
    other = AdaptiveMolmoE(model.config)
    other.load_state_dict(model.state_dict())
    other.experts = "dense"
    return other


def other_eos(model):
    other = AdaptiveMolmoE(replace(model.config, eos_token_id=3))
    other.load_state_dict(model.state_dict())
    return other


FINGERPRINT_CHANGES = {
    "weights": lambda m, p: (changed_weight(m), p, 8),
    "dtype": lambda m, p: (AdaptiveMolmoE(m.config).bfloat16(), p, 8),
    "kernels": lambda m, p: (other_kernel(m), p, 8),
    "stop": lambda m, p: (other_eos(m), p, 8),
    "max_new_tokens": lambda m, p: (m, p, 9),
    "margins": lambda m, p: (m, with_geometry(p, mean=(0.1, 0.2, 0.3)), 8),
}


@pytest.mark.parametrize("name", FINGERPRINT_CHANGES)
def test_changed_objects_change_the_fingerprint(small_model, processor, fingerprint, name):
    assert EngineFingerprint.of(*FINGERPRINT_CHANGES[name](small_model, processor)) != fingerprint


def test_matmul_precision_changes_the_fingerprint(small_model, processor, fingerprint):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert EngineFingerprint.of(small_model, processor, 8) != fingerprint
    finally:
        torch.set_float32_matmul_precision(before)


def test_processor_fingerprint_survives_pickling(processor):
    assert processor_fingerprint(pickle.loads(pickle.dumps(processor))) == processor_fingerprint(processor)


def test_engines_share_a_store(small_model, processor, pairs, tmp_path):
    samples, plans = pairs
    tiers, levels = [plan.tier for plan in plans], [5] * len(plans)
    first = RolloutEngine(small_model, processor, max_new_tokens=8, store=tmp_path / "s.sqlite")
    tokens, outcomes = first.latency_tokens(samples, tiers, levels), first.outcomes(samples, plans)
    second = RolloutEngine(small_model, processor, max_new_tokens=8, store=tmp_path / "s.sqlite")
    assert torch.equal(second.latency_tokens(samples, tiers, levels), tokens)
    assert second.outcomes(samples, plans) == outcomes
    stats = second.stats()
    assert stats["engine/executed"] == stats["engine/seconds"] == 0
    assert stats["engine/seconds_saved"] > 0
    assert stats["engine/outcome_hits"] == stats["engine/latency_token_hits"] == len(samples)
    other = RolloutEngine(small_model, processor, max_new_tokens=8, encoder_seed=9, store=tmp_path / "s.sqlite")
    assert not torch.equal(other.latency_tokens(samples, tiers, levels), tokens)


def test_the_store_decides_over_ones_own_result(small_model, processor, samples, tmp_path):
    """Another process was first with a different answer: that one counts from then on."""
    engine = RolloutEngine(small_model, processor, max_new_tokens=8, store=tmp_path / "s.sqlite")
    plan = ExecutionPlan()
    prompt = engine.prompts.prompt(samples[0], plan.tier)
    key = outcome_key(engine.fingerprint, prompt.key, plan.top_k_per_block)
    inner = engine.executor.run

    def late(jobs):
        OutcomeStore(tmp_path / "s.sqlite").put_outcomes(
            engine.fingerprint, {key: ("{}", "[]", StoredOutcome((9, 9), True, 0.0))}
        )
        return inner(jobs)

    engine.executor.run = late
    assert engine.outcomes(samples[:1], [plan])[0].token_ids == (9, 9)
    assert engine.stats()["engine/disagreements"] == 1


def test_waits_for_a_busy_store(store):
    blocker = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    import threading

    threading.Timer(0.5, lambda: blocker.execute("COMMIT")).start()
    began = time.monotonic()
    fill(store, [1])
    assert time.monotonic() - began > 0.3
