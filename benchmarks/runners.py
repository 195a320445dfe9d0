"""Rollouts per second from one to two env runners, and an iteration with and without overlap, on the real engine.

    python benchmarks/runners.py [--repeats 3] [--groups 32] [--iterations 6] [KEY=VALUE ...]

Runners have one thread each and no outcome store, and no sample comes twice, so that every rollout is computed. The two
counts of runners take turns, and so do the two modes. Prints medians and the ratios; one run, one machine.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.connect import connect
from ray_ctrl.load_config import load_config
from ray_ctrl.preflight import plan_layout
from ray_ctrl.provenance import hardware
from ray_ctrl.rllib_setup import build_algorithm
from ray_ctrl.run_context import open_context

CONTEXTS = 4  # of the evaluation runners, which stay idle


def build(overrides: Sequence[str]) -> Any:
    """The training algorithm of the shipped preset, on the roofline clock (which measures nothing by itself)."""
    config = load_config("laptop", None, ["latency.source=roofline", "store.path=null", "runners.cpus=0.5", *overrides])
    context = open_context(config).with_profile(Path(tempfile.mkdtemp()))
    return build_algorithm(context, plan_layout(config).envs, CONTEXTS)


def sampling(algorithm: Any, repeats: int) -> list[float]:
    """Rollouts per second of each of the next iterations."""
    speeds = []
    for _ in range(repeats):
        started = time.perf_counter()
        rollouts, *_ = algorithm._sample()
        speeds.append(len(rollouts) / (time.perf_counter() - started))
        algorithm.updates += 1
    return speeds


def compare_runners(args: argparse.Namespace) -> None:
    """One against two runners, in turns, on samples of their own."""
    samples = args.groups * (args.repeats + 1)
    given = [f"grpo.groups_per_iteration={args.groups}", f"task.train_samples={samples}", *args.overrides]
    algorithms = {count: build([*given, f"runners.count={count}"]) for count in (1, 2)}
    speeds: dict[int, list[float]] = {count: [] for count in algorithms}
    for algorithm in algorithms.values():
        sampling(algorithm, 1)  # the first calls of every kernel
    for _ in range(args.repeats):
        for count, algorithm in algorithms.items():
            speeds[count] += sampling(algorithm, 1)
    for algorithm in algorithms.values():
        algorithm.stop()
    medians = {count: float(np.median(found)) for count, found in speeds.items()}
    for count, found in speeds.items():
        listed = ", ".join(f"{speed:.1f}" for speed in found)
        print(f"{count} runner(s): {medians[count]:.1f} rollouts/s, cold store (iterations: {listed})")
    print(f"ratio {medians[2] / medians[1]:.2f}")


def compare_modes(args: argparse.Namespace) -> None:
    """An iteration with rollouts and learning in turns, then overlapping, then in turns again; one runner."""
    groups = f"grpo.groups_per_iteration={args.groups}"
    given = [groups, f"task.train_samples={args.groups}", "runners.count=1", *args.overrides]
    seconds: dict[int, list[float]] = {0: [], 1: []}
    rows: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for lag in (0, 1, 0, 1):
        algorithm = build([*given, f"grpo.max_policy_lag={lag}"])
        for iteration in range(args.iterations + 2):
            started = time.perf_counter()
            row = algorithm.train()["grpo"]
            if iteration >= 2:  # the first fill the caches and the pipeline
                seconds[lag].append(time.perf_counter() - started)
                rows[lag].append(row)
        algorithm.stop()
    for lag, name in ((0, "in turns"), (1, "overlapping")):
        means = {key: np.median([row[key] for row in rows[lag]]) for key in ("seconds_sample", "seconds_learn")}
        print(
            f"{name}: {np.median(seconds[lag]):.2f} s an iteration (waits {means['seconds_sample']:.2f} s for "
            f"rollouts, learns {means['seconds_learn']:.2f} s; {len(seconds[lag])} iterations)"
        )
    print(f"ratio {np.median(seconds[0]) / np.median(seconds[1]):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="iterations timed for each count of runners")
    parser.add_argument("--groups", type=int, default=32, help="groups of an iteration")
    parser.add_argument("--iterations", type=int, default=6, help="timed in each of two passes of each mode")
    parser.add_argument("overrides", nargs="*", help="settings laid over the preset")
    args = parser.parse_args()
    print(f"{hardware()}")
    plan = plan_layout(load_config("laptop", None, ["runners.count=2", *args.overrides])).resources
    with connect("local", plan, timeout_s=60.0):
        compare_runners(args)
    with connect("local", plan, timeout_s=60.0):
        compare_modes(args)
    ray.shutdown()


if __name__ == "__main__":
    main()
