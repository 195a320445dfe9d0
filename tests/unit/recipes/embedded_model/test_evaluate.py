"""The complete measurement of an embedded model, on few samples: what it writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from envs.data.scenes import load
from envs.embedded import WEIGHTS
from envs.knobs import KnobSpace
from envs.model.block_importance import read_importance
from recipes.embedded_model import evaluate

COUNTS = {"validation": 12, "test": 4}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        # The probe takes complete splits; here they are small, but have both classes.
        patch.setattr(evaluate, "load", lambda split, count=None: load(split, count or 24))
        evaluate.run(WEIGHTS, out, COUNTS, with_latency=False)
    return out


def test_all_plans_of_all_samples_are_saved(measured: Path) -> None:
    plans = len(KnobSpace(read_importance(WEIGHTS)).distinct)
    for split, count in COUNTS.items():
        with np.load(measured / f"outcomes-{split}.npz") as saved:
            assert saved["accuracy"].shape == (count, plans)
            assert saved["samples"].tolist() == [sample.id for sample in load(split, count)]
            assert len(set(saved["knobs"].tolist())) == plans
            full, cheapest = (saved["knobs"].tolist().index(knobs) for knobs in ("high 1 8 16", "low 1 4 12"))
            assert saved["accuracy"][:, full].mean() > saved["accuracy"][:, cheapest].mean()


def test_the_figures_are_those_of_the_saved_outcomes(measured: Path) -> None:
    figures = json.loads((measured / "figures.json").read_text("utf-8"))
    for split, count in COUNTS.items():
        with np.load(measured / f"outcomes-{split}.npz") as saved:
            cheapest = saved["accuracy"][:, saved["knobs"].tolist().index("low 1 4 12")]
        found = figures[split]
        assert found["samples"] == count
        stated = found["accuracy"]["cheapest"]["overall"]
        assert stated == pytest.approx(100 * float(cheapest.mean()), abs=0.1)  # saved as float16
        assert "headroom" not in found  # latency was not measured
    assert 0 <= figures["probe_auc"]["text_and_token"] <= 1
