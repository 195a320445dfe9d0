"""Noise of the profiled latency source: what repeats of one request differed by, drawn per (sample, plan)."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from envs.knobs import ExecutionPlan


@dataclass(frozen=True)
class LatencyNoise:
    """Multiplies predicted latencies by ratios that the profile measured.

    Attributes:
        ratios: latency of single repeats over the median of their profile entry, rising; see
            `ProfiledClock.repeat_ratios`.
        seed: other seeds give other draws.
    """

    ratios: tuple[float, ...]
    seed: int

    def factor(self, sample_id: str, plan: "ExecutionPlan") -> float:
        """A measured ratio drawn for (sample, plan): the same in every process; equal executions share it."""
        key = f"{self.seed}|{sample_id}|{plan.tier}|{plan.insertion}|".encode() + bytes(plan.top_k_per_block)
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        return self.ratios[draw % len(self.ratios)]
