"""The full-size path on one GPU, checked and measured in under 8 minutes: torch, triton and transformers alone.

    python3 -m benchmarks.gpu --out DIR [--parts ceilings,kernels,prefill] [--tiny]

Weights are random bfloat16 of the published shape, made on the device; nothing is fetched. Every part has a time limit
and fails alone; results are written to DIR/gpu.json as they come, a table is printed last. `--tiny` runs every part on
the embedded shape, on a CPU too: it finds the mistakes that need no GPU.
"""

import argparse
import json
import platform
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from envs.model.config import AdaptiveMolmoEConfig
from envs.model.molmoe import AdaptiveMolmoE
from envs.processing.image_processor import AdaptiveMolmoEImageProcessor, ImageGeometry
from envs.processing.processor import MolmoEProcessor
from recipes.embedded_model.fresh_weights import deviation

# Seconds each part may take; together under 8 minutes.
LIMITS = {
    "ceilings": 20, "kernels": 45, "decode": 90, "prefill": 45, "request": 60, "attention": 20, "rollouts": 80,
    "numerics": 30, "syncs": 20, "olmoe": 120,
}  # fmt: skip


@dataclass
class Bench:
    """What the parts share: model, processor, timing, results."""

    device: torch.device
    config: AdaptiveMolmoEConfig
    tiny: bool
    out: Path
    results: dict[str, Any] = field(default_factory=dict)

    @cached_property
    @torch.inference_mode(mode=False)
    def model(self) -> AdaptiveMolmoE:
        """Random weights, alike in every run."""
        with torch.device("meta"):
            model = AdaptiveMolmoE(self.config)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model = model.to(dtype).to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name.rsplit(".", 2)[-1] or "norm." in name or "pre_ln." in name or name.endswith("ln_f"):
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, deviation(name, parameter, self.config), generator=generator)
        return model.eval().requires_grad_(False)

    @cached_property
    def processor(self) -> MolmoEProcessor:
        """The embedded tokenizer; crops as published."""
        embedded = MolmoEProcessor.from_pretrained("embedded")
        if self.tiny:
            return embedded
        mean, std = embedded.geometry.mean, embedded.geometry.std
        geometry = ImageGeometry(336, 14, (4, 4), (12, 12), mean, std)
        images = AdaptiveMolmoEImageProcessor(prompt_styles=False, **geometry.to_config())
        return MolmoEProcessor(images, embedded.tokenizer)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, call: Callable[[], Any], repeats: int = 10, warm: int = 3) -> float:
        """Median milliseconds, by events on a GPU."""
        for _ in range(1 if self.tiny else warm):
            call()
        spent = []
        for _ in range(2 if self.tiny else repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                spent.append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                call()
                spent.append((time.perf_counter() - began) * 1e3)
        return statistics.median(spent)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.model.dtype)


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after `seconds`."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"over {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def ceilings(bench: Bench) -> dict[str, float]:
    """What the card gives: a large copy, a large product."""
    size = 2**20 if bench.tiny else 2**31
    source, target = bench.randn(size // 4, dtype=torch.float32), torch.empty(size // 4, device=bench.device)
    copy = bench.time(lambda: target.copy_(source))
    n = 256 if bench.tiny else 8192
    a, b = bench.randn(n, n), bench.randn(n, n)
    product = bench.time(lambda: a @ b)
    return {"copy_tb_s": 2 * size / copy / 1e9, "gemm_tflop_s": 2 * n**3 / product / 1e9}


def parts() -> dict[str, Callable[[Bench], Any]]:
    from benchmarks import gpu_olmoe, gpu_parts, gpu_requests, gpu_rollouts

    return {
        "ceilings": ceilings,
        "kernels": gpu_parts.kernels,
        "decode": gpu_parts.decode,
        "prefill": gpu_parts.prefill,
        "request": gpu_requests.request,
        "attention": gpu_rollouts.attention,
        "rollouts": gpu_rollouts.rollouts,
        "numerics": gpu_parts.numerics,
        "syncs": gpu_parts.syncs,
        "olmoe": gpu_olmoe.olmoe,
    }


def run(bench: Bench, chosen: Sequence[str], total: float) -> None:
    """Every part, one after another; a part that fails or runs over says so and the next begins."""
    began = time.perf_counter()
    known = parts()
    for name in chosen:
        left = int(total - (time.perf_counter() - began))
        if left < 5:
            bench.results[name] = {"error": "no time left"}
            continue
        started = time.perf_counter()
        try:
            # Random weights need no name, and hashing 14 GB takes longer than most parts.
            unnamed = mock.patch.object(AdaptiveMolmoE, "fingerprint", "random")
            with limit(min(LIMITS[name], left)), torch.inference_mode(), unnamed:
                found = known[name](bench)
        except Exception as error:
            traceback.print_exc()
            found = {**bench.results.get(name, {}), "error": f"{type(error).__name__}: {str(error)[:300]}"}
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        bench.results[name] = found | {"seconds": time.perf_counter() - started}
        write(bench)
        print(f"-- {name}: {bench.results[name]['seconds']:.1f} s", flush=True)


def write(bench: Bench) -> None:
    """Results so far, complete or not at all."""
    part = bench.out / "gpu.json.part"
    part.write_text(json.dumps(bench.results, indent=1) + "\n", encoding="utf-8")
    part.replace(bench.out / "gpu.json")


def flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their dotted names."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json")
    parser.add_argument("--parts", default=",".join(LIMITS), help="some of " + ", ".join(LIMITS))
    parser.add_argument("--tiny", action="store_true", help="the embedded shape: a rehearsal")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=480, help="seconds in all")
    args = parser.parse_args(arguments)
    chosen = args.parts.split(",")
    if unknown := set(chosen) - set(LIMITS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose of {', '.join(LIMITS)}")
    if args.device == "cpu" and not args.tiny:
        parser.error("no GPU here: add --tiny for a rehearsal on the CPU")
    config = (
        AdaptiveMolmoEConfig.from_pretrained(Path("envs/embedded/weights")) if args.tiny else AdaptiveMolmoEConfig()
    )
    bench = Bench(torch.device(args.device), config, args.tiny, args.out)
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "CPU"
    args.out.mkdir(parents=True, exist_ok=True)
    bench.results["machine"] = {"card": card, "torch": torch.__version__, "python": sys.version.split()[0]}
    run(bench, chosen, args.limit)
    for name, value in flat(bench.results):
        print(f"{name:60} {value:.4g}" if isinstance(value, float) else f"{name:60} {value}")
    return int(any("error" in found for found in bench.results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
