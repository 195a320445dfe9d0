"""`ray-ctrl compare` from a run to its report, on new scenes."""

from pathlib import Path

import pandas as pd
from conftest import fine, refused, snapshot

from envs.data.scenes import fresh_scenes


def test_a_run_is_compared_on_new_scenes(trained: Path, tmp_path: Path) -> None:
    before = snapshot(trained)
    out = tmp_path / "comparison"
    done = fine("compare", f"ours={trained}", f"ours={trained}", "--fresh", "3", "--samples", "4", "--out", out)
    assert snapshot(trained) == before
    methods = pd.read_csv(out / "methods.csv").set_index("method")
    assert methods.loc["ours", "seeds"] == 2
    assert methods.loc["oracle (unattainable)", "accuracy"] == methods["accuracy"][~methods["incomparable"]].max()
    assert "oracle (unattainable)" in done.out
    page = (out / "report.html").read_text("utf-8")
    assert all(sample.question in page for sample in fresh_scenes(3, 4))
    rows = pd.read_parquet(out / "rollouts.parquet")
    assert rows.groupby(["method", "seed"]).size().nunique() == 1
    first, second = (rows[(rows["method"] == "ours") & (rows["seed"] == seed)] for seed in (0, 1))
    assert first["plan"].tolist() == second["plan"].tolist()
    assert not rows.loc[rows["method"] == "oracle (unattainable)", "violation"][~rows["fallback"]].any()


def test_every_plan_cannot_be_timed(trained: Path, tmp_path: Path) -> None:
    said = refused("compare", trained, "latency.source=measured", "--out", tmp_path / "comparison")
    assert "latency.source=profiled" in said
