"""Every figure of the model card, measured: `python -m recipes.embedded_model.evaluate`.

Writes `importance.json` (from validation, unless it is there), `outcomes-<split>.npz` (every sample under every plan)
and `figures.json`. Outcomes and latencies come from the rollout engine; latency is measured at batch 1 and interpolated
by the profiled clock. Answers are kept in `outcomes.sqlite` as they come, so that a stopped command continues.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from envs.data.sample import Sample
from envs.data.scenes import load
from envs.embedded import WEIGHTS
from envs.engine import RolloutEngine
from envs.engine.measure_block_importance import measure_importance
from envs.errors import UserError
from envs.knobs import TIERS, ExecutionPlan, Knobs, KnobSpace
from envs.latency.profiled import ProfiledClock
from envs.latency.profiler import profile
from envs.model.block_importance import importance_path, read_importance, write_importance
from envs.model.molmoe import AdaptiveMolmoE
from envs.processing.processor import MolmoEProcessor
from recipes.embedded_model.figures import (
    FloatArray,
    OutcomeTable,
    by_family,
    chance,
    headroom,
    knob_figures,
    markdown_table,
)
from recipes.embedded_model.loop import keep_freed_memory

SHIPPED_OUT = Path("runs/embedded-model")
_BATCH = 64
_PROBE_POSITION = 3
_PROBE_LEVEL = 8
_NEW_TOKENS = 4
_IMPORTANCE_SAMPLES = 400
_TIMED_SAMPLES = 80


def make_engine(folder: Path, importance: Sequence[float] | None = None, store: Path | None = None) -> RolloutEngine:
    """An engine for the model in `folder`; answers longer than any the scenes have are cut."""
    return RolloutEngine(
        AdaptiveMolmoE.from_pretrained(folder),
        MolmoEProcessor.from_pretrained(folder),
        store=store,
        importance=importance,
        max_new_tokens=_NEW_TOKENS,
    )


def accuracies(
    engine: RolloutEngine, samples: Sequence[Sample], plans: Sequence[ExecutionPlan], label: str
) -> FloatArray:
    """Accuracy (samples, plans), batch by batch so that a prompt's plans run together."""
    rows: list[list[float]] = []
    for start in _track(range(0, len(samples), _BATCH), label):
        batch = samples[start : start + _BATCH]
        pairs = list(product(batch, plans))
        outcomes = engine.outcomes([sample for sample, _ in pairs], [plan for _, plan in pairs])
        right = [engine.accuracy(sample, outcome) for (sample, _), outcome in zip(pairs, outcomes, strict=True)]
        rows += np.array(right).reshape(len(batch), len(plans)).tolist()
    return np.array(rows, dtype=np.float64)


def measure_ratios(engine: RolloutEngine, samples: Sequence[Sample], repeats: int = 3) -> dict[str, float]:
    """Latency at batch 1 of the ends of the range, means of each sample's fastest, and what each knob alone saves.

    Plans are interleaved request by request, so that a busy machine slows all alike.
    """
    space = KnobSpace(engine.importance)
    plans = {
        "full": space.plan(space.full),
        "cheapest": space.plan(space.cheapest),
        "low": space.plan(Knobs("low", 1, 8, 16)),
        "top_k_4": space.plan(Knobs("high", 1, 4, 16)),
        "blocks_12": space.plan(Knobs("high", 1, 8, 12)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for sample in samples[:2]:
        for plan in plans.values():
            engine.run_measured(sample, plan)
    for sample in _track(samples, "latency"):
        for name, plan in plans.items():
            fastest = min(engine.run_measured(sample, plan)[1].total for _ in range(repeats))
            seconds[name].append(fastest)
    mean = {name: float(np.mean(values)) for name, values in seconds.items()}
    return {
        "full_ms": mean["full"],
        "cheapest_ms": mean["cheapest"],
        "full_over_cheapest": mean["full"] / mean["cheapest"],
        "tier_saves_percent": 100 * (1 - mean["low"] / mean["full"]),
        "top_k_saves_percent": 100 * (1 - mean["top_k_4"] / mean["full"]),
        "blocks_save_percent": 100 * (1 - mean["blocks_12"] / mean["full"]),
    }


def latencies(
    engine: RolloutEngine, samples: Sequence[Sample], knobs: Sequence[Knobs], clock: ProfiledClock
) -> FloatArray:
    """Profiled latency (samples, knobs) of one-token answers, in ms."""
    space = KnobSpace(engine.importance)
    plans = [space.plan(k) for k in knobs]
    known: dict[tuple[Any, Knobs], float] = {}
    rows = []
    for sample in samples:
        row = []
        for knob, plan in zip(knobs, plans, strict=True):
            shape = engine.shape(sample, plan.tier)
            if (shape, knob) not in known:
                known[shape, knob] = clock.latency(shape, plan, 1).total
            row.append(known[shape, knob])
        rows.append(row)
    return np.array(rows)


def probe_auc(
    engine: RolloutEngine, train: Sequence[Sample], train_low: FloatArray, test: Sequence[Sample], test_low: FloatArray
) -> dict[str, float]:
    """How well a linear probe tells whether the low tier is enough: with and without the latency token (AUC on `test`).

    `train_low`, `test_low` are 1 where the low tier answers as well as the high one.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names = sorted({sample.family or "" for sample in train})

    def features(samples: Sequence[Sample]) -> tuple[FloatArray, FloatArray]:
        family = np.array([[float(sample.family == name) for name in names] for sample in samples])
        language = engine.language_features(samples).numpy()
        tiers, levels = ["low"] * len(samples), [_PROBE_LEVEL] * len(samples)
        tokens = engine.latency_tokens(samples, tiers, levels)[:, _PROBE_POSITION - 1].numpy()
        text = np.concatenate([family, language], 1).astype(np.float64)
        return text, np.concatenate([text, tokens], 1).astype(np.float64)

    found = {}
    for name, fit, held_out in zip(("text", "text_and_token"), features(train), features(test), strict=True):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000))
        probe.fit(fit, train_low)
        found[name] = float(roc_auc_score(test_low, probe.predict_proba(held_out)[:, 1]))
    return found | {"gain": found["text_and_token"] - found["text"]}


def figures(table: OutcomeTable, samples: Sequence[Sample]) -> dict[str, Any]:
    """All figures that need outcomes alone."""
    answers = [sample.answers[0] for sample in samples]
    result: dict[str, Any] = {
        "samples": len(samples),
        "plans": len(table.knobs),
        "accuracy": knob_figures(table),
        "chance": chance(table.families, [sample.question for sample in samples], answers),
    }
    if table.latency is not None:
        low, high = float(table.latency.mean(0).min()), float(table.latency.mean(0).max())
        budgets = [low + share * (high - low) for share in (0.3, 0.45, 0.6)]
        result["headroom"] = headroom(table, budgets)
    return result


def _track(items: Any, label: str) -> Iterable[Any]:
    return track(items, description=label, disable=not sys.stdout.isatty())


def low_is_enough(engine: RolloutEngine, samples: Sequence[Sample], label: str) -> FloatArray:
    """1 where the low tier answers a sample as well as the high one, else 0, (samples,)."""
    space = KnobSpace(engine.importance)
    plans = [space.plan(Knobs(tier, 1, 8, 16)) for tier in ("low", "high")]
    low, high = accuracies(engine, samples, plans, label).T
    return (low >= high).astype(np.float64)


def run(model: Path, out: Path, counts: Mapping[str, int | None], with_latency: bool) -> dict[str, Any]:
    """Importance, then outcomes and figures of so many samples of validation and test (None: all)."""
    out.mkdir(parents=True, exist_ok=True)
    validation, test = (load(split, counts[split]) for split in ("validation", "test"))
    engine = make_engine(model, ensure_importance(model), out / "outcomes.sqlite")
    space = KnobSpace(engine.importance)
    clock = None
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if with_latency:
        result["latency"] = measure_ratios(engine, test[:: max(1, len(test) // _TIMED_SAMPLES)])
        clock = ProfiledClock(profile(engine, test[:200], repeats=3, per_tiling=12))
    tables = {}
    for split, samples in (("validation", validation), ("test", test)):
        accuracy = accuracies(engine, samples, [space.plan(k) for k in space.distinct], split)
        latency = latencies(engine, samples, space.distinct, clock) if clock else None
        families = tuple(sample.family or "" for sample in samples)
        tables[split] = OutcomeTable(space.distinct, families, accuracy, latency)
        saved: dict[str, Any] = {
            "accuracy": accuracy.astype(np.float16),
            "knobs": np.array([f"{k.tier} {k.insertion} {k.top_k} {k.blocks}" for k in space.distinct]),
            "samples": np.array([sample.id for sample in samples]),
            "families": np.array(families),
        }
        if latency is not None:
            saved["latency_ms"] = latency.astype(np.float32)
        np.savez_compressed(out / f"outcomes-{split}.npz", **saved)
        result[split] = figures(tables[split], samples)
    # Two plans a sample are cheap: the probe is fitted and scored on complete splits.
    complete = {split: load(split) for split in tables}
    low = {split: low_is_enough(engine, samples, f"{split}, probe") for split, samples in complete.items()}
    result["probe_auc"] = probe_auc(engine, complete["validation"], low["validation"], complete["test"], low["test"])
    (out / "figures.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown_table(result["test"]["accuracy"]))
    return result


def ensure_importance(model: Path) -> tuple[float, ...]:
    """Block importance of the model folder, measured on validation samples if it has none yet.

    Raises:
        UserError: the file there was measured with other weights.
    """
    file, engine = importance_path(model), make_engine(model)
    fingerprint = engine.model.fingerprint
    if not file.is_file():
        found = measure_importance(engine, load("validation", _IMPORTANCE_SAMPLES))
        write_importance(file, found.to_dict({"task": "scenes", "split": "validation", "fingerprint": fingerprint}))
    elif json.loads(file.read_text(encoding="utf-8")).get("fingerprint", fingerprint) != fingerprint:
        raise UserError(f"{file} was measured with other weights than those next to it: remove it to measure anew")
    return read_importance(model)


def quick(model: Path, count: int | None, split: str = "validation") -> dict[str, dict[str, float]]:
    """Accuracy by family of the full and the cheapest plan and of each tier: a first look at a model."""
    importance = ensure_importance(model)
    samples = load(split, count)
    engine = make_engine(model, importance)
    space = KnobSpace(engine.importance)
    knobs = {f"{tier}, 8, 16": Knobs(tier, 1, 8, 16) for tier in TIERS}
    knobs |= {
        "high, 4, 16": Knobs("high", 1, 4, 16),
        "high, 8, 12": Knobs("high", 1, 8, 12),
        "cheapest": space.cheapest,
    }
    accuracy = accuracies(engine, samples, [space.plan(k) for k in knobs.values()], split)
    families = [sample.family or "" for sample in samples]
    return {name: by_family(families, accuracy[:, i]) for i, name in enumerate(knobs)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure a trained embedded model on the scenes.")
    parser.add_argument(
        "--model",
        type=Path,
        default=WEIGHTS,
        help="model folder, by default the shipped one; importance.json is written into it unless it is there",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder for outcomes and figures; by default {SHIPPED_OUT}, or `evaluation` next to another model",
    )
    parser.add_argument("--samples", type=int, help="run all plans on this many samples of a split instead of 2,000")
    parser.add_argument(
        "--validation-samples", type=int, help="on this many of validation, if not as many as --samples"
    )
    parser.add_argument("--no-latency", action="store_true", help="skip whatever needs measured latency")
    parser.add_argument("--quick", action="store_true", help="only print a few plans")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="for --quick")
    options = parser.parse_args()
    for name in ("samples", "validation_samples"):
        count = getattr(options, name)
        if count is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')} {count} is not allowed: give at least 1")
    keep_freed_memory()
    if options.quick:
        print(f"percent right on {options.split} by tier, experts per token, blocks:\n")
        print(markdown_table(quick(options.model, options.samples, options.split)))
        return 0
    counts = {"validation": options.validation_samples or options.samples, "test": options.samples}
    default = SHIPPED_OUT if options.model.resolve() == WEIGHTS.resolve() else options.model.parent / "evaluation"
    run(options.model, options.out or default, counts, not options.no_latency)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
