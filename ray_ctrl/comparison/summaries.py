"""From rollouts to tables: means with paired intervals, clustered by image.

The headline covers budgets that are held out inside the training range and feasible; every other budget is in the
per-budget table with its label.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from envs.knobs import KNOBS
from policies.baselines.rules import Rule
from ray_ctrl.comparison.methods import ONE_PLAN, ORACLE, Choices, Method
from ray_ctrl.comparison.outcomes import PlanOutcomes

Z95: Final = 1.96
LEARNING: Final = ("method", "seed", "model_executions", "accuracy", "violations")
SIZES: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Training samples of the rules' learning curves."""


def clustered_error(values: npt.ArrayLike, clusters: npt.ArrayLike) -> float:
    """Standard error of the mean of `values` (N,) that are dependent within `clusters` (N,); 0 for one cluster.

    The cluster-robust sandwich estimator with its finite-sample factor (Liang and Zeger 1986).
    """
    found = np.asarray(values, np.float64)
    names, rows = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return 0.0
    sums = np.bincount(rows, found - found.mean())
    return float(np.sqrt(len(names) / (len(names) - 1) * (sums**2).sum()) / len(found))


def per_sample(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy of each (method, sample) over seeds and budgets, with its image."""
    return frame.groupby(["method", "image", "sample"], sort=False, as_index=False)["accuracy"].mean()


def overall(frame: pd.DataFrame, boosted: str) -> pd.DataFrame:
    """One row per method over all rows of `frame`.

    Columns: accuracy and half of its 95 % interval; gain over one plan per budget (paired) and half of its interval;
    share of the gain of `boosted`; gap to the oracle; violations (mean, and of the worst budget and seed); latency over
    budget at the 95th and 99th percentile; mean latency; share of requests without an allowed plan; standard deviation
    over seeds.

    Args:
        boosted: the method whose gain counts as 1.
    """
    samples = per_sample(frame).pivot(index=["sample", "image"], columns="method", values="accuracy")
    images = samples.index.get_level_values("image")
    reference = samples[ONE_PLAN]
    rows = []
    for method, part in frame.groupby("method", sort=False):
        used = part["latency_ms"] / part["budget_ms"]
        rates = part.groupby(["seed", "budget_ms"])["violation"].mean()
        gain = samples[method] - reference
        seeds = part.groupby("seed")["accuracy"].mean()
        rows.append(
            {
                "method": method,
                "seeds": len(seeds),
                "accuracy": samples[method].mean(),
                "accuracy_ci": Z95 * clustered_error(samples[method], images),
                "gain": gain.mean(),
                "gain_ci": Z95 * clustered_error(gain, images),
                "violations": part["violation"].mean(),
                "worst_violations": rates.max(),
                "p95_used": used.quantile(0.95),
                "p99_used": used.quantile(0.99),
                "latency_ms": part["latency_ms"].mean(),
                "fallback": part["fallback"].mean(),
                "margin": part["margin"].mean(),
                "seed_std": seeds.std(ddof=1) if len(seeds) > 1 else 0.0,
            }
        )
    found = pd.DataFrame(rows)
    accuracy = found.set_index("method")["accuracy"]
    found["gain_share"] = found["gain"] / (accuracy[boosted] - accuracy[ONE_PLAN])
    found["gap_to_oracle"] = accuracy[ORACLE] - found["accuracy"]
    found["incomparable"] = found["margin"].isna()  # last: no margin brings them to the violation rate of the others
    return found.sort_values(["incomparable", "accuracy"], ascending=[True, False], ignore_index=True)


def paired_differences(frame: pd.DataFrame, ours: Sequence[str], others: Sequence[str]) -> pd.DataFrame:
    """Accuracy of each of `ours` minus each of `others`, paired by sample, with half of the 95 % interval."""
    samples = per_sample(frame).pivot(index=["sample", "image"], columns="method", values="accuracy")
    images = samples.index.get_level_values("image")
    rows = []
    for mine in ours:
        for other in others:
            gap = samples[mine] - samples[other]
            row = {"method": mine, "minus": other, "difference": gap.mean()}
            rows.append(row | {"difference_ci": Z95 * clustered_error(gap, images)})
    return pd.DataFrame(rows)


def parts(frame: pd.DataFrame) -> pd.DataFrame:
    """What the first method of `frame` loses without each part: difference of accuracy and violations of the rest."""
    first, *others = frame["method"].unique()
    found = paired_differences(frame, [first], others).drop(columns="method").rename(columns={"minus": "method"})
    return found.merge(frame.groupby("method", as_index=False)[["accuracy", "violation"]].mean(), on="method")


def per_budget(frame: pd.DataFrame, labels: Mapping[float, str]) -> pd.DataFrame:
    """One row per (method, budget).

    Args:
        labels: why a budget is not in the headline; empty for those that are.
    """
    rows = []
    for (method, budget_ms), part in frame.groupby(["method", "budget_ms"], sort=False):
        samples = per_sample(part)
        used = part["latency_ms"] / budget_ms
        rows.append(
            {
                "method": method,
                "budget_ms": budget_ms,
                "label": labels[budget_ms],
                "accuracy": samples["accuracy"].mean(),
                "accuracy_ci": Z95 * clustered_error(samples["accuracy"], samples["image"]),
                "violations": part["violation"].mean(),
                "p95_used": used.quantile(0.95),
                "p99_used": used.quantile(0.99),
                "latency_ms": part["latency_ms"].mean(),
            }
        )
    return pd.DataFrame(rows)


def knob_use(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Share of each option of each knob by (method, `key`); rows method, key, knob, option, share."""
    parts = []
    for knob in KNOBS:
        counts = frame.groupby(["method", key], sort=False)[knob].value_counts(normalize=True).rename("share")
        part = counts.reset_index().rename(columns={knob: "option"})
        parts.append(part.assign(knob=knob, option=part["option"].astype(str)))
    found = pd.concat(parts, ignore_index=True)
    return found[["method", key, "knob", "option", "share"]]


def learning_of_rules(
    rules: Sequence[Rule], train: PlanOutcomes, validation: PlanOutcomes, budgets: Sequence[float], seed: int
) -> pd.DataFrame:
    """Validation accuracy and violations of masked rules over the model executions that their samples take."""
    order = np.random.default_rng(seed).permutation(len(train.accuracy))
    everyone = np.arange(len(validation.accuracy))
    executions = len(train.resources.space.distinct)
    rows = []
    for rule in rules:
        for size in [size for size in SIZES if size < len(order)] + [len(order)]:
            known = train.known(order[:size])
            rule.fit(known)
            choices, method = Choices(validation, known), Method(f"{rule.name} + mask", rule, True)
            chosen = [choices.plans(method, ms, 1.0) for ms in budgets]
            accuracy = np.mean([validation.accuracy[everyone, plans] for plans in chosen])
            violations = choices.violation_rates(method, budgets, 1.0).mean()
            rows.append((method.label, 0, size * executions, float(accuracy), float(violations)))
    return pd.DataFrame(rows, columns=LEARNING)


def learning_of_run(label: str, seed: int, metrics: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The same columns from a run's validations."""
    keys = ("model_executions", "validation/accuracy", "validation/violations")
    rows = [(label, seed, *(row[key] for key in keys)) for row in metrics if all(key in row for key in keys)]
    return pd.DataFrame(rows, columns=LEARNING)
