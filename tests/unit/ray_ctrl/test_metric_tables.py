"""The tables of metrics in the documents name what a run writes down, no more and no less."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from envs.config import RewardSettings
from envs.knobs import KNOBS
from policies.distribution import LOGITS_WIDTH
from policies.grpo.algorithm import GRPO
from policies.grpo.config import GRPOSettings
from policies.grpo.ema import WeightAverage
from policies.grpo.env_runner import Rollouts
from policies.grpo.lagrangian import PenaltyMultipliers
from policies.grpo.sampling import COUNTS
from ray_ctrl.trainer import Trainer

DOCS = Path(__file__).parents[3] / "docs"
ENDINGS = {"<head>": KNOBS, "<bin>": ("0", "1")}


def documented(page: str, heading: str) -> set[str]:
    """Names in the first column of the table under a heading, with every ending that a placeholder stands for."""
    section = (DOCS / page).read_text("utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    columns = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = [name for column in columns for name in re.findall(r"`([^`]+)`", column)]
    found = [one for name in names for one in _expanded(name)]
    assert len(found) == len(set(found)), "a name is in the table twice"
    return set(found)


def _expanded(name: str) -> list[str]:
    for ending, values in ENDINGS.items():
        if ending in name:
            return [name.replace(ending, value) for value in values]
    return [name]


def rollouts(count: int) -> Rollouts:
    """What runners send of `count` rollouts, in both bins of budgets."""
    numbers = np.linspace(0.1, 1.0, count)
    infos = dict.fromkeys(("accuracy", "latency_ms", "budget_ms", "feasible", "avoidable", *KNOBS), numbers)
    infos["budget_bin"] = np.arange(count) % 2
    return Rollouts(
        obs={},
        actions=np.zeros((count, 2, 4), np.int64),
        log_probs=np.zeros((count, 2), np.float32),
        logits=np.zeros((count, 2, LOGITS_WIDTH), np.float32),
        rewards=numbers,
        infos=infos,
    )


def iteration() -> dict[str, float]:
    """`result["grpo"]` of an iteration in which everything there is happened."""
    settings = RewardSettings(mode="lagrangian")
    algorithm: Any = SimpleNamespace(
        config=SimpleNamespace(grpo=GRPOSettings(group_size=4, kl_coef=0.1), lagrangian=settings, penalty_bins=2),
        updates=1,
        average=WeightAverage(0.0),
        multipliers=PenaltyMultipliers.start(settings, 2).updated(np.array([[9.0, 9.0], [9.0, 9.0], [4.5, 0.0]])),
        metrics=SimpleNamespace(peek=lambda key, default: 0.5, aggregate=lambda results, key: None),
        _all_or_nothing=nullcontext,
        _refresh_reference=lambda: None,
        _publish=lambda: None,
        _sample=lambda: (rollouts(8), [], dict.fromkeys(COUNTS, 0.0)),
        _returns=lambda found: found.rewards,
        _learn=lambda found, returns, groups: [],
        _count_executions=lambda found: {"model_executions": 8.0},
    )
    GRPO.training_step(algorithm)
    return dict(algorithm._row)


def test_the_loops_numbers_are_documented() -> None:
    assert set(iteration()) == documented("grpo.md", 'The numbers of an iteration: `result["grpo"]`')


def test_the_columns_of_metrics_jsonl_are_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [{"reward": 0.5, "accuracy": 1.0, "latency_ms": 9.0, "budget_ms": 10.0}]
    monkeypatch.setattr("policies.grpo.evaluation.evaluate_contexts", lambda *given: contexts)
    rows: list[dict[str, Any]] = []
    trainer: Any = SimpleNamespace(
        algorithm=SimpleNamespace(train=lambda: {"grpo": iteration()}, engine_stats=dict),
        contexts=[(0, 10.0)],
        done=0,
        folder=SimpleNamespace(append_metrics=rows.append),
        writer=None,
        trackers=[],
        _validates=lambda: True,
        _validate=lambda: Trainer._validate(trainer),
    )
    Trainer.iterate(trainer)
    # The engine's own are looked at where there is an engine.
    wanted = {name for name in documented("runs.md", "metrics.jsonl") if not name.startswith("engine/")}
    assert set(rows[0]) == wanted
