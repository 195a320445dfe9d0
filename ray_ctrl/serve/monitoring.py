"""What a replica reports: metrics at Ray's Prometheus endpoint, and whether latencies leave the profile."""

import logging
import statistics
from collections import deque
from typing import Any, Final, Protocol

from ray_ctrl.pipeline import Answer

WINDOW: Final = 64
BOUNDARIES_MS: Final = [5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0, 2500.0, 10_000.0]
_log = logging.getLogger("ray.serve")


class DriftWatch:
    """Compares measured with predicted latency over the last requests; warns once each time it leaves the profile.

    Args:
        tolerance: the median ratio may differ from 1 by this factor either way.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.ratios: deque[float] = deque(maxlen=WINDOW)
        self.drifted = False

    @property
    def ratio(self) -> float:
        """Median of measured over predicted latency; 1 without requests."""
        return statistics.median(self.ratios) if self.ratios else 1.0

    def add(self, measured_ms: float, predicted_ms: float) -> None:
        """Adds one request, predicted for the true length of its answer."""
        self.ratios.append(measured_ms / predicted_ms)
        if len(self.ratios) < WINDOW:
            return
        outside = not 1 / (1 + self.tolerance) <= self.ratio <= 1 + self.tolerance
        if outside and not self.drifted:
            _log.warning(
                "measured latencies are %.2f times those of the profile over %d requests: budgets are not kept as "
                "promised; train a controller on this device as it is now",
                self.ratio,
                WINDOW,
            )
        self.drifted = outside


class Metrics(Protocol):
    """Receives what happens to requests."""

    def answered(self, answer: Answer, latency_ms: float, queue_ms: float, within_budget: bool) -> None: ...
    def refused(self, status: int) -> None: ...
    def state(self, pending: int, drift_ratio: float) -> None: ...
    def reload_failed(self) -> None: ...


class RayMetrics:
    """Metrics named `ray_ray_ctrl_serve_*`; `cluster/manifests/grafana.json` shows them."""

    def __init__(self) -> None:
        from ray.serve import metrics

        def make(kind: Any, name: str, about: str, **more: Any) -> Any:
            return kind(f"ray_ctrl_serve_{name}", description=about, **more)

        count, gauge, histogram = metrics.Counter, metrics.Gauge, metrics.Histogram
        self.requests = make(count, "requests", "Requests by status code.", tag_keys=("status",))
        self.violations = make(count, "violations", "Answers later than their budget, queueing included.")
        self.plans = make(count, "plans", "Plans chosen.", tag_keys=("tier", "insertion", "top_k", "blocks"))
        self.latency = make(
            histogram, "latency_ms", "From arrival at the replica to the answer.", boundaries=BOUNDARIES_MS
        )
        self.queue = make(histogram, "queue_ms", "From arrival to the start of the run.", boundaries=BOUNDARIES_MS)
        self.pending = make(gauge, "pending", "Requests accepted and not answered yet.")
        self.drift = make(gauge, "drift_ratio", "Median of measured over predicted latency.")
        self.reload_failures = make(count, "reload_failures", "Controllers that could not be loaded.")

    def answered(self, answer: Answer, latency_ms: float, queue_ms: float, within_budget: bool) -> None:
        knobs = answer.knobs
        self.requests.inc(tags={"status": "200"})
        if not within_budget:
            self.violations.inc()
        self.plans.inc(
            tags={
                "tier": knobs.tier,
                "insertion": str(knobs.insertion),
                "top_k": str(knobs.top_k),
                "blocks": str(knobs.blocks),
            }
        )
        self.latency.observe(latency_ms)
        self.queue.observe(queue_ms)

    def refused(self, status: int) -> None:
        self.requests.inc(tags={"status": str(status)})

    def state(self, pending: int, drift_ratio: float) -> None:
        self.pending.set(pending)
        self.drift.set(drift_ratio)

    def reload_failed(self) -> None:
        self.reload_failures.inc()
