"""From rollouts to tables: arithmetic and text, no model and no Ray.

Rollouts are one `pandas.DataFrame` with a row per (method, test sample, held-out budget); tables
aggregate it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from envs.errors import UserError
from envs.knobs import KNOBS, TIERS

Array = npt.NDArray[Any]
COLUMNS = ("context", "sample", "budget_ms", "accuracy", "latency_ms", "reward", "avoidable", *KNOBS)
MIN_ATTAINABLE = 0.05
"""Budgets that the cheapest plan meets for a smaller share of requests are left out of the headline tables."""


def rollouts(method: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One method's rollouts, ordered by context.

    Args:
        rows: an environment's final infos with `reward`, one per context.

    Raises:
        UserError: no row, a column missing, or a context given twice.
    """
    frame = pd.DataFrame(list(rows))
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise UserError(f"rollouts of {method!r} are not complete: {len(frame)} rows, columns missing {missing}")
    if frame["context"].duplicated().any():
        raise UserError(f"rollouts of {method!r} contain a context more than once")
    frame = frame[list(COLUMNS)].sort_values("context", ignore_index=True)
    frame.insert(0, "method", method)
    return frame


def summarize(frame: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """Means, 95th percentiles, shares and standard errors (over samples), one row per value of `keys`."""
    tiers = {f"tier_{name}": frame["tier"] == index for index, name in enumerate(TIERS)}
    violated = frame["latency_ms"] > frame["budget_ms"]
    frame = frame.assign(
        violations=violated, latency_p95_ms=frame["latency_ms"], attainable=frame["avoidable"], **tiers
    )
    means = ["accuracy", "violations", "latency_ms", "reward", "attainable", *tiers, "insertion", "top_k", "blocks"]
    grouped = frame.groupby(list(keys), sort=False)
    table = grouped[means].mean()
    table.insert(0, "rollouts", grouped.size())
    table.insert(4, "latency_p95_ms", grouped["latency_p95_ms"].quantile(0.95))
    per_sample = frame.groupby([*keys, "sample"], sort=False)[["accuracy", "reward"]].mean()
    errors = per_sample.groupby(level=list(range(len(keys))), sort=False).sem().fillna(0.0)
    return table.join(errors.add_suffix("_error")).reset_index()


def attainable_budgets(frame: pd.DataFrame) -> list[float]:
    """Budgets that the cheapest plan meets for at least `MIN_ATTAINABLE` of the first method's requests, rising, ms."""
    first = frame[frame["method"] == frame["method"].iloc[0]]
    shares = first.groupby("budget_ms")["avoidable"].mean()
    return [float(ms) for ms in shares.index[shares >= MIN_ATTAINABLE]]


def budget_rank_correlation(frame: pd.DataFrame) -> float:
    """Spearman correlation of budget and chosen latency; 0 if either is constant."""
    if frame["budget_ms"].nunique() < 2 or frame["latency_ms"].nunique() < 2:
        return 0.0
    return float(frame["budget_ms"].corr(frame["latency_ms"], method="spearman"))


def request_rank_correlation(frame: pd.DataFrame) -> float:
    """The same within each sample, averaged: what more budget buys one request, whatever its image's size."""
    return float(np.mean([budget_rank_correlation(part) for _, part in frame.groupby("sample")]))


LOOKUP_VIOLATIONS: Final = 0.05


def lookup_choices(budgets_ms: Sequence[float], accuracy_PS: Array, latency_PS: Array) -> list[int]:
    """The lookup table: per budget the plan with the highest mean accuracy that rarely violates it.

    Rarely is on at most `LOOKUP_VIOLATIONS` of the training samples.

    Args:
        accuracy_PS, latency_PS: accuracy and latency (ms) of every plan on every training sample, (plans, samples).

    Returns:
        One plan index per budget. Ties go to the faster plan; if every plan violates more often, the one that
        violates least, the fastest of those.
    """
    accuracy_P, mean_P = accuracy_PS.mean(axis=1), latency_PS.mean(axis=1)
    choices = []
    for budget in budgets_ms:
        violations_P = (latency_PS > budget).mean(axis=1)
        allowed = np.flatnonzero(violations_P <= LOOKUP_VIOLATIONS)
        if len(allowed):
            choices.append(int(allowed[np.lexsort((mean_P[allowed], -accuracy_P[allowed]))[0]]))
        else:
            choices.append(int(np.lexsort((mean_P, violations_P))[0]))
    return choices


BUDGET_HEADER = ("budget ms", "accuracy", "over", "mean ms", "p95 ms", "tiers %", "p/k/blocks")
METHOD_HEADER = ("method", "accuracy", "over", "mean ms", "p95 ms", "reward")
BUDGET_LEGEND = "tiers: low/medium/high; p/k/blocks: insertion position, experts per token, blocks kept"
FAMILY_HEADER = ("family", "rollouts", "accuracy", "over", "mean ms")


def budget_rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Cells under BUDGET_HEADER; a row without a budget is that of all budgets."""
    return [
        (
            "all" if pd.isna(line.budget_ms) else f"{line.budget_ms:.1f}",
            f"{line.accuracy:.3f}",
            f"{line.violations:.1%}",
            f"{line.latency_ms:.1f}",
            f"{line.latency_p95_ms:.1f}",
            "/".join(f"{100 * getattr(line, f'tier_{name}'):.0f}" for name in TIERS),
            f"{line.insertion:.1f}/{line.top_k:.1f}/{line.blocks:.1f}",
        )
        for line in table.itertuples()
    ]


def method_rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Cells under METHOD_HEADER."""
    return [
        (
            line.method,
            f"{line.accuracy:.3f} ± {line.accuracy_error:.3f}",
            f"{line.violations:.1%}",
            f"{line.latency_ms:.1f}",
            f"{line.latency_p95_ms:.1f}",
            f"{line.reward:+.3f}",
        )
        for line in table.itertuples()
    ]


def family_rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Cells under FAMILY_HEADER."""
    return [
        (line.family, str(line.rollouts), f"{line.accuracy:.3f}", f"{line.violations:.1%}", f"{line.latency_ms:.1f}")
        for line in table.itertuples()
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
