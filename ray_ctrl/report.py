"""From rollouts to tables: arithmetic and text, no model and no Ray."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from envs.errors import UserError
from envs.knobs import TIERS

Array = npt.NDArray[Any]
COLUMNS = (
    "context",
    "sample",
    "budget_ms",
    "accuracy",
    "latency_ms",
    "reward",
    "tier",
    "insertion",
    "top_k",
    "blocks",
)


@dataclass(frozen=True)
class Rollouts:
    """One method's rollouts, a column each (N,), ordered by context; `tier` is an index into
    TIERS.
    """

    name: str
    columns: Mapping[str, Array]

    def __post_init__(self) -> None:
        missing = [name for name in COLUMNS if name not in self.columns]
        lengths = {len(self.columns[name]) for name in COLUMNS if name in self.columns}
        if missing or len(lengths) != 1 or 0 in lengths:
            raise UserError(
                f"rollouts of {self.name!r} are not a table: columns missing {missing}, lengths {sorted(lengths)}"
            )

    @classmethod
    def of(cls, name: str, rows: Sequence[Mapping[str, Any]]) -> "Rollouts":
        """From one mapping a rollout (an environment's final infos and `reward`), ordered by
        context.

        Raises:
            UserError: a context that is there twice, or no rollout at all.
        """
        ordered = sorted(rows, key=lambda row: int(row["context"]))
        columns = {c: np.array([row[c] for row in ordered]) for c in COLUMNS}
        contexts = columns["context"]
        if len(np.unique(contexts)) != len(contexts):
            raise UserError(f"rollouts of {name!r} hold a context more than once")
        return cls(name, columns)

    def __len__(self) -> int:
        return len(self.columns["context"])

    def __getitem__(self, column: str) -> Array:
        return self.columns[column]

    @property
    def violated(self) -> Array:
        """(N,) bool: the request took longer than its budget."""
        return self["latency_ms"] > self["budget_ms"]

    def select(self, mask: Array) -> "Rollouts":
        """The rollouts under a boolean mask (N,)."""
        return Rollouts(self.name, {c: self[c][mask] for c in COLUMNS})


@dataclass(frozen=True)
class Line:
    """One line of a table: a method at one budget, or over all budgets (`budget_ms` None)."""

    method: str
    budget_ms: float | None
    rollouts: int
    reward: float
    reward_error: float
    accuracy: float
    latency_ms: float
    latency_p95_ms: float
    violations: float
    tier_low: float
    tier_medium: float
    tier_high: float
    insertion: float
    top_k: float
    blocks: float


def summarise(rollouts: Rollouts, budget_ms: float | None = None) -> Line:
    """Means, 95th percentile, shares and the standard error of the mean reward (over samples)."""
    by_sample = [rollouts["reward"][rollouts["sample"] == sample].mean() for sample in np.unique(rollouts["sample"])]
    error = np.std(by_sample, ddof=1) / np.sqrt(len(by_sample)) if len(by_sample) > 1 else 0.0
    tiers = [float((rollouts["tier"] == index).mean()) for index in range(len(TIERS))]
    return Line(
        rollouts.name,
        budget_ms,
        len(rollouts),
        float(rollouts["reward"].mean()),
        float(error),
        float(rollouts["accuracy"].mean()),
        float(rollouts["latency_ms"].mean()),
        float(np.percentile(rollouts["latency_ms"], 95)),
        float(rollouts.violated.mean()),
        tiers[0],
        tiers[1],
        tiers[2],
        float(rollouts["insertion"].mean()),
        float(rollouts["top_k"].mean()),
        float(rollouts["blocks"].mean()),
    )


def per_budget(rollouts: Rollouts) -> list[Line]:
    """A line for every budget, smallest first."""
    return [
        summarise(rollouts.select(rollouts["budget_ms"] == budget), float(budget))
        for budget in np.unique(rollouts["budget_ms"])
    ]


def budget_rank_correlation(rollouts: Rollouts) -> float:
    """Spearman correlation of budget and chosen latency; 0 where either is constant."""
    budgets, latencies = rollouts["budget_ms"], rollouts["latency_ms"]
    if len(np.unique(budgets)) < 2 or len(np.unique(latencies)) < 2:
        return 0.0
    return float(spearmanr(budgets, latencies).statistic)


def request_rank_correlation(rollouts: Rollouts) -> float:
    """The same within each sample, averaged: what more budget buys one request, whatever its image's size."""
    samples = np.unique(rollouts["sample"])
    return float(np.mean([budget_rank_correlation(rollouts.select(rollouts["sample"] == s)) for s in samples]))


def lookup_choices(
    budgets_ms: Sequence[float],
    accuracy_PS: Array,
    latency_PS: Array,
    most_violations: float = 0.05,
) -> list[int]:
    """The lookup table: per budget the plan with the highest mean accuracy that violates it rarely
    enough.

    Args:
        budgets_ms: the budgets to fill in.
        accuracy_PS: accuracy of every plan on every training sample, (plans, samples).
        latency_PS: their latencies, ms.
        most_violations: highest share of training samples on which a plan may overrun.

    Returns:
        One plan index a budget. Ties go to the faster plan; where every plan violates more often,
        the one that
        violates least, the fastest of those.
    """
    accuracy_P, mean_P = accuracy_PS.mean(axis=1), latency_PS.mean(axis=1)
    choices = []
    for budget in budgets_ms:
        violations_P = (latency_PS > budget).mean(axis=1)
        allowed = np.flatnonzero(violations_P <= most_violations)
        if len(allowed):
            order = np.lexsort((mean_P[allowed], -accuracy_P[allowed]))
            choices.append(int(allowed[order[0]]))
        else:
            choices.append(int(np.lexsort((mean_P, violations_P))[0]))
    return choices


def to_csv(lines: Sequence[Line]) -> str:
    """All lines as CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(asdict(lines[0])), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: _cell(v) for k, v in asdict(line).items()})
    return out.getvalue()


def rollouts_csv(methods: Sequence[Rollouts]) -> str:
    """Every rollout of every method as CSV, for analyses of one's own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", *COLUMNS])
    for method in methods:
        for row in zip(*(method[c].tolist() for c in COLUMNS), strict=True):
            writer.writerow([method.name, *(_cell(v) for v in row)])
    return out.getvalue()


BUDGET_HEADER = ("budget ms", "accuracy", "mean ms", "p95 ms", "over", "tiers %", "p", "top-k", "blocks", "reward")
METHOD_HEADER = ("method", "reward", "accuracy", "mean ms", "p95 ms", "over")


def budget_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Cells under BUDGET_HEADER."""
    return [
        (
            f"{line.budget_ms:.1f}" if line.budget_ms is not None else "all",
            f"{line.accuracy:.3f}",
            f"{line.latency_ms:.1f}",
            f"{line.latency_p95_ms:.1f}",
            f"{line.violations:.1%}",
            "/".join(f"{100 * t:.0f}" for t in (line.tier_low, line.tier_medium, line.tier_high)),
            f"{line.insertion:.1f}",
            f"{line.top_k:.1f}",
            f"{line.blocks:.1f}",
            f"{line.reward:.3f}",
        )
        for line in lines
    ]


def method_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Cells under METHOD_HEADER."""
    return [
        (
            line.method,
            f"{line.reward:.3f} ± {line.reward_error:.3f}",
            f"{line.accuracy:.3f}",
            f"{line.latency_ms:.1f}",
            f"{line.latency_p95_ms:.1f}",
            f"{line.violations:.1%}",
        )
        for line in lines
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    return "\n".join([*lines, *(_row(row) for row in rows)]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
