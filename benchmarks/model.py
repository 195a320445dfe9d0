"""Latency of the model at batch 1 under its plans and expert kernels, and the memory that loading takes.

    python benchmarks/model.py [--model embedded] [--threads 2]

The first table gives milliseconds by stage and the ratio to the full plan with the default kernel; the second the peak
of resident memory while a sharded checkpoint of untrained weights is read, beside model plus one shard.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from envs.engine import RolloutEngine
from envs.knobs import ExecutionPlan, KnobSpace
from envs.latency.measured import reference_sample
from envs.model import AdaptiveMolmoE, MolmoEConfig, MolmoEProcessor
from envs.model.importance import read_importance

KERNELS = ("auto", "grouped", "dense")
LOADER = """
import sys
import torch
from envs.model import AdaptiveMolmoE

def peak():
    with open("/proc/self/status") as file:
        return int(file.read().split("VmHWM:")[1].split()[0])

AdaptiveMolmoE.from_pretrained("embedded")  # code and libraries come first
before = peak()
model = AdaptiveMolmoE.from_pretrained(sys.argv[1])
print(peak() - before)
"""


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


def loading_memory(config: MolmoEConfig, shard_mib: int) -> dict[str, float]:
    """Peak resident memory while a sharded checkpoint is read, in another process."""
    with tempfile.TemporaryDirectory() as folder:
        model = AdaptiveMolmoE.initialise(config)
        size = sum(parameter.numel() * 4 for parameter in model.parameters())
        model.save_pretrained(folder, max_shard_size=shard_mib * 2**20)
        shards = len(list(Path(folder).glob("*.safetensors")))
        del model
        done = subprocess.run([sys.executable, "-c", LOADER, folder], capture_output=True, text=True, check=True)
    return {
        "shards": shards,
        "model_mib": size / 2**20,
        "peak_mib": int(done.stdout) / 1024,
        "bound_mib": size / 2**20 + shard_mib,
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
    shape = model.config.to_published()
    shape.update(d_model=256, mlp_hidden_size=512, n_heads=4)
    print(json.dumps({"loading": loading_memory(MolmoEConfig.from_published(shape), 32)}, indent=1))


if __name__ == "__main__":
    main()
