"""Latency of the model at batch 1 under its plans and expert kernels.

    python benchmarks/model.py [--model embedded] [--threads 2]

Gives milliseconds by stage and the ratio to the full plan with the default kernel.
"""

import argparse
import statistics
import time

import torch

from envs.engine import RolloutEngine
from envs.knobs import ExecutionPlan, KnobSpace
from envs.latency.measured import reference_sample
from envs.model import AdaptiveMolmoE
from envs.model.block_importance import read_importance
from envs.processing import MolmoEProcessor

KERNELS = ("auto", "grouped", "dense")


def stages(engine: RolloutEngine, plan: ExecutionPlan, repeats: int) -> dict[str, float]:
    """Median milliseconds of each stage over `repeats` requests, two more warm up."""
    sample = reference_sample(engine.model.config.vision.crop_size)
    records = [engine.run_measured(sample, plan)[1] for _ in range(repeats + 2)][2:]
    names = ("processor", "vision", "prefix", "suffix", "decode", "total")
    return {name: statistics.median(getattr(record, name) for record in records) for name in names}


def plans(space: KnobSpace) -> dict[str, ExecutionPlan]:
    """The full and the cheapest plan, and each knob alone at its cheapest."""
    kept = space.plan(space.cheapest).blocks
    return {
        "full": ExecutionPlan(),
        "low tier": ExecutionPlan("low"),
        "top-k 4": ExecutionPlan(top_k=4),
        "12 blocks": ExecutionPlan(blocks=kept),
        "cheapest": space.plan(space.cheapest),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = AdaptiveMolmoE.from_pretrained(args.model), MolmoEProcessor.from_pretrained(args.model)
    space = KnobSpace(read_importance(args.model))
    reference = 0.0
    print(f"{args.model}, {args.threads} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"{'plan':10} {'kernel':8} processor vision prefix suffix decode  total  ratio")
    for kernel in KERNELS:
        model.experts = kernel
        engine = RolloutEngine(model, processor, max_new_tokens=4)
        for name, plan in plans(space).items():
            found = stages(engine, plan, args.repeats)
            reference = reference or found["total"]
            figures = " ".join(f"{value:6.2f}" for value in found.values())
            print(f"{name:10} {kernel:8}    {figures} {found['total'] / reference:6.2f}")


if __name__ == "__main__":
    main()
