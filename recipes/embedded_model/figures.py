"""Figures of a model from a table of outcomes (samples x plans): pure functions, no model involved.

Letters: N samples, K knob settings (the distinct ones of a KnobSpace).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.knobs import Knobs

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OutcomeTable:
    """Accuracy of every sample under every distinct combination of knobs, and its latency.

    Args:
        knobs: K settings.
        families: N question families.
        accuracy: (N, K) in 0..1.
        latency: (N, K) in ms; None where it was not measured.
    """

    knobs: tuple[Knobs, ...]
    families: tuple[str, ...]
    accuracy: FloatArray
    latency: FloatArray | None = None

    def column(self, tier: str, top_k: int, blocks: int) -> FloatArray:
        """Accuracies (N,) under knobs with insertion position 1 (or the first listed that executes the same)."""
        wanted = Knobs(tier, 1, top_k, blocks)
        return self.accuracy[:, self.knobs.index(wanted)]


def knob_figures(table: OutcomeTable) -> dict[str, Any]:
    """Accuracies of the ends of the range, what each knob costs between its ends, and chance, overall and by family."""
    full, cheapest = table.column("high", 8, 16), table.column("low", 4, 12)
    ends = {
        "full": full,
        "cheapest": cheapest,
        "low_tier": table.column("low", 8, 16),
        "medium_tier": table.column("medium", 8, 16),
        "top_k_4": table.column("high", 4, 16),
        "blocks_12": table.column("high", 8, 12),
    }
    return {name: by_family(table.families, values) for name, values in ends.items()}


def by_family(families: Sequence[str], values: FloatArray) -> dict[str, float]:
    """Means in percent, overall and of each family."""
    means = {"overall": 100 * float(values.mean())}
    for family in sorted(set(families)):
        chosen = [index for index, name in enumerate(families) if name == family]
        means[family] = 100 * float(values[chosen].mean())
    return means


def chance(families: Sequence[str], questions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Percent right without looking at the image: the commonest answer to a question of that wording.

    Colours named in comparisons are choices of the question: there one of the two is right half the time.
    """
    totals: dict[str, list[float]] = {}
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for family, question, answer in zip(families, questions, answers, strict=True):
        counts = groups.setdefault((family, "" if family != "count" else question), {})
        counts[answer] = counts.get(answer, 0) + 1
    for (family, _), counts in groups.items():
        total = totals.setdefault(family, [0.0, 0.0])
        total[0] += max(counts.values())
        total[1] += sum(counts.values())
    shares = {family: 100 * right / count for family, (right, count) in sorted(totals.items())}
    return shares | {"compare": 50.0} if "compare" in shares else shares


def headroom(table: OutcomeTable, budgets_ms: Sequence[float]) -> list[dict[str, float]]:
    """At each budget the accuracy in percent of one plan for all, of one plan per family, and of the best per sample.

    All three choose among the same plans: those whose latency, meaned over all samples, is within the budget.
    """
    assert table.latency is not None
    families = np.array(table.families)
    rows = []
    for budget in budgets_ms:
        allowed = table.accuracy[:, table.latency.mean(0) <= budget]
        if not allowed.shape[1]:
            allowed = np.zeros((len(families), 1))
        per_family = [
            allowed[families == f].mean(0).max() * (families == f).mean() for f in sorted(set(table.families))
        ]
        rows.append(
            {
                "budget_ms": float(budget),
                "one_plan": 100 * float(allowed.mean(0).max()),
                "per_family": 100 * float(sum(per_family)),
                "per_sample": 100 * float(allowed.max(1).mean()),
            }
        )
    return rows


def markdown_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Nested figures as a table, one row each, one decimal."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(f"{row[c]:.1f}" for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines)
