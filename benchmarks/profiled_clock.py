"""The profiled latency source on requests that it was not fitted to: other samples, other plans, batch 1.

    python benchmarks/profiled_clock.py [--requests 80] [--repeats 5] [--threads 1] [--device cpu]

Profiles training samples and measures test samples. Prints the median and the 90th percentile of the absolute relative
error; run it on an idle machine.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from envs.data import load_task
from envs.engine import RolloutEngine
from envs.latency import ProfiledClock, profile
from envs.latency.profiler import Measurement, draw_requests
from envs.model import AdaptiveMolmoE
from envs.model.block_importance import read_importance
from envs.processing import MolmoEProcessor


def hold_out(
    clock: ProfiledClock,
    engine: Any,
    samples: Sequence[Any],
    *,
    requests: int = 48,
    repeats: int = 3,
    seed: int = 1,
    controller: Any = None,
) -> tuple[float, ...]:
    """|predicted / measured - 1| of requests, each the median of `repeats` runs; give samples that were not profiled.

    Args:
        controller: as for the profile; without one, its time is excluded on both sides.
    """
    rng = np.random.default_rng(seed)
    every = draw_requests(engine, samples, requests, rng)
    measurement = Measurement(engine, [every[i] for i in rng.permutation(len(every))[:requests]], controller)
    measurement.run(repeats, rng, None)
    errors = []
    for cell in measurement.cells():
        predicted = clock.latency(cell.shape, cell.plan, cell.new_tokens)
        expected = predicted.total - (predicted.controller if controller is None else 0.0)
        errors.append(abs(expected / float(np.median(cell.totals_ms)) - 1.0))
    return tuple(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--task", default="scenes")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AdaptiveMolmoE.from_pretrained(args.model, device=args.device)
    processor = MolmoEProcessor.from_pretrained(args.model)
    engine = RolloutEngine(model, processor, importance=read_importance(args.model), max_new_tokens=64)
    clock = ProfiledClock(profile(engine, load_task(args.task, "train", 200, 0), repeats=args.repeats))
    held_out = load_task(args.task, "test", 2 * args.requests, 0)
    errors = hold_out(clock, engine, held_out, requests=args.requests, repeats=args.repeats)
    figures = {
        "requests": len(errors),
        "threads": args.threads,
        "median_error_percent": 100 * float(np.median(errors)),
        "p90_error_percent": 100 * float(np.quantile(errors, 0.9)),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
