"""The profiled clock against requests that it was not fitted to: other samples, any plan.

    python benchmarks/profiled_clock.py [--requests 80] [--repeats 3] [--threads 1] [--device cpu]

Profiles training samples, then serves test samples under random plans at batch 1, each several times, the fastest of
which counts as its time on a quiet machine. Prints the median and the 90th percentile of the absolute relative error.
"""

import argparse
import json
import random

import numpy as np
import torch

from envs.engine import RolloutEngine
from envs.knobs import KnobSpace
from envs.latency import ProfiledClock
from envs.latency.profiler import profile
from envs.model import AdaptiveMolmoE, MolmoEProcessor
from envs.model.importance import read_importance
from envs.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--task", default="scenes")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    importance = read_importance(args.model)
    model = AdaptiveMolmoE.from_pretrained(args.model, device=args.device)
    engine = RolloutEngine(model, MolmoEProcessor.from_pretrained(args.model), importance=importance)
    clock = ProfiledClock(profile(engine, load_task(args.task, "train", 200, 0), repeats=5, per_tiling=8))
    space, draw = KnobSpace(importance), random.Random(args.seed)
    errors, measured = [], []
    for sample in load_task(args.task, "test", args.requests, args.seed):
        plan = space.plan(draw.choice(space.distinct))
        runs = [engine.run_measured(sample, plan) for _ in range(args.repeats)]
        served = min(record.total for _, record in runs)
        told = clock.latency(engine.shape(sample, plan.tier), plan, runs[0][0].n_tokens).total
        measured.append(served)
        errors.append(abs(told - served) / served)
    figures = {
        "requests": len(errors),
        "threads": args.threads,
        "median_ms": float(np.median(measured)),
        "median_error_percent": 100 * float(np.median(errors)),
        "p90_error_percent": 100 * float(np.quantile(errors, 0.9)),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
