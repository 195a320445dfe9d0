"""A sharded checkpoint is read without a second copy of it in memory."""

import json
import sys
from pathlib import Path

import pytest
from conftest import finish, start

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "loading.py"
ALLOWED_SHARDS = 1.3


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
def test_loading_holds_the_model_and_little_more(tmp_path: Path) -> None:
    done = finish(start(["--gib", "0.25", "--shard-mib", "64", "--folder", tmp_path], program=(BENCHMARK,)))
    figures = json.loads(done.out)
    assert figures["shards"] > 3
    # At this size the interpreter itself weighs more than a shard, so that what loading added is what counts.
    allowed = figures["resident_model_mib"] + ALLOWED_SHARDS * figures["largest_shard_mib"]
    assert figures["resident_model_mib"] <= figures["peak_above_before_mib"] <= allowed
    assert list(tmp_path.iterdir()) == []
