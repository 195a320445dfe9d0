"""Decoding one token at full size on one GPU: are the kernels right, and how near the memory's speed do they run.

    python3 -m benchmarks.gpu_decode --out DIR [--seconds 150]

Random bfloat16 weights are made on the device. Results go to DIR/decode.json as they come; a part that fails leaves its
traceback there, and parts that would start too late are left out and named.
"""

import argparse
import dataclasses
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decode_checks import (
    PLANS,
    SIXTEEN,
    full_language,
    kernel_errors,
    launches,
    prefilled,
    same_in_graph,
    teacher_forced,
    top_k_of,
)
from envs.model.decode import DecodeBatch
from envs.model.kernels.decode_step import KernelStep, Tuning
from envs.model.language import Block, Language, attend
from envs.model.static import Cell, StaticDecoder

CONTEXTS = (600, 1100, 1500)
STEPS = 40
# Candidates tried for each kernel, in the order of `Tuning`'s fields.
SWEEP: dict[str, tuple[tuple[int, ...], ...]] = {
    "gate_up": ((2, 8), (2, 4), (1, 4), (4, 8)),
    "down": ((256, 32, 4), (128, 32, 4), (256, 32, 2), (512, 32, 4), (512, 32, 8), (256, 16, 2), (128, 64, 4),
             (512, 64, 8), (1024, 16, 4)),
    "qkv": ((4, 4), (2, 4), (4, 8)),
    "attention": ((32, 64, 4), (32, 64, 8), (64, 32, 4), (64, 32, 2), (32, 32, 2), (16, 128, 8), (64, 64, 4)),
    "out": ((8, 8), (4, 4), (2, 4)),
    "router": ((1, 8), (1, 4)),
    "head": ((8, 2, 4), (4, 4, 4), (4, 2, 4), (8, 1, 4)),
}  # fmt: skip


class Results:
    """A dictionary that is written to `path` after every part."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.values = path, dict[str, Any]()
        self.start, self.seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds until no part may start."""
        return self.seconds - (time.monotonic() - self.start)

    def part(self, name: str, work: Callable[[], Any], needs: float = 5.0) -> Any:
        """Run `work` and keep what it returns, or why it did not."""
        began = time.monotonic()
        value = None
        try:
            value = work() if self.left > needs else {"left_out": f"{self.left:.0f} s were left"}
        except Exception:
            value = {"error": traceback.format_exc()}
            torch.cuda.set_sync_debug_mode("default")
        self.values[name] = value
        self.values.setdefault("seconds", {})[name] = round(time.monotonic() - began, 2)
        self.path.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        print(f"{name} ({time.monotonic() - began:.1f} s): {json.dumps(value)[:1500]}", flush=True)
        return value


def timed(work: Callable[[], Any], calls: int, repeats: int = 7, before: Callable[[], Any] | None = None) -> float:
    """Median milliseconds of one of `calls` calls in a row, by events."""
    taken = []
    for _ in range(repeats):
        if before:
            before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / calls)
    return statistics.median(taken[1:])


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of `work`, run once before."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def copy_bandwidth() -> float:
    """TB/s of a large copy on the device, bytes read and written."""
    source = torch.randint(0, 255, (4 * 2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / timed(lambda: target.copy_(source), 3) / 1e9


def kernel_speed(language: Language, name: str, tuning: Tuning, length: int = 1100, k: int = 8) -> dict[str, float]:
    """Microseconds a launch of one kernel over all 16 blocks' weights in turn, in a graph, and TB/s."""
    cell = Cell(language, 2176, 64)
    cell.keys.normal_(), cell.values.normal_(), cell.top_k.fill_(k), cell.position.fill_(length)
    step = KernelStep(language, cell, tuning)
    step.x.normal_(), step.inner.normal_(), step.qkv.normal_(), step.squares.fill_(4.0), step.normed.normal_()
    # Other experts in every block, as tokens have: one expert list a launch would stay the same anyway.
    step.chosen.copy_(torch.randperm(len(step.chosen), device="cuda"))
    methods: dict[str, Callable[[Block, int], None]] = {
        "qkv": lambda block, _: step.project(block),
        "attention": step.attend,
        "out": lambda block, _: step.output(block),
        "router": lambda block, _: step.route(block),
        "gate_up": step.expand,
        "down": step.reduce,
    }

    def work() -> None:
        if name == "head":
            step.choose()
            return
        for index, block in enumerate(language.blocks):
            assert isinstance(block, Block)
            methods[name](block, index)

    graph = captured(work)
    calls = 1 if name == "head" else 16
    reset: Callable[[], Any] = lambda: (cell.count.fill_(0), cell.position.fill_(length))  # noqa: E731
    micros = timed(graph.replay, 20, 5, reset) * 1000 / calls
    moved = next(size for found, size in launches(language, top_k_of(SIXTEEN, k), length) if found == name)
    return {"us": round(micros, 2), "TB/s": round(moved / micros / 1e6, 3)}


def sweep(language: Language, results: Results, best: dict[str, Any]) -> dict[str, Any]:
    """Every candidate of every kernel; the fastest go into `best`."""
    found: dict[str, Any] = {}
    for name, candidates in SWEEP.items():
        for values in candidates:
            if results.left < 25:
                return found
            try:
                speed = kernel_speed(language, name, dataclasses.replace(Tuning(), **{name: values}))
            except Exception as problem:
                found[f"{name} {values}"] = repr(problem)[:300]
                continue
            found[f"{name} {values}"] = speed
            if name not in best or speed["us"] < best[name][1]:
                best[name] = (values, speed["us"])
    return found


def decode_speed(language: Language, decoder: StaticDecoder, length: int, plans: Iterable[str] = PLANS) -> dict:
    """Milliseconds a token for each plan at `length` tokens of context."""
    found = {}
    for name in plans:
        top_k = top_k_of(*PLANS[name])
        decoder.start(prefilled(language, top_k, length), 0, 17)
        found[name] = round(timed(decoder.step, STEPS, 6, lambda: decoder.place(17, length)), 4)
    return found


def dynamic_speed(language: Language, length: int, experts: str, plan: str = "16/8") -> float:
    """The same with `DecodeBatch`, or with a loop over the experts."""
    top_k = top_k_of(*PLANS[plan])
    batch = DecodeBatch(language, [(prefilled(language, top_k, length), [0])])
    if experts != "loop":
        return timed(lambda: batch.step([17], experts), 5, 4)
    x = language.embed(torch.tensor([17], device="cuda")).unsqueeze(1)

    def step() -> Tensor:
        state = x
        for index, block in enumerate(language.blocks):
            own = batch.blocks[index]
            if own is None:
                continue
            keys, values = own.keys, own.values
            assert isinstance(block, Block)
            query, key, value = block.project(state, language.rope(length + 1)[length : length + 1])
            keys[:, length : length + 1], values[:, length : length + 1] = key, value
            mixed = attend(query, keys[:, : length + 1], values[:, : length + 1])
            state = state + F.linear(mixed.transpose(1, 2).reshape(1, 1, -1), block.attn_out)
            state = state + _looped(
                F.rms_norm(state, state.shape[-1:], block.ff_norm, block.eps)[0], block, top_k[index]
            )
        return language.logits(language.final_norm(state)).argmax(-1).cpu()

    return timed(step, 2, 4)


def _looped(x_ND: Tensor, block: Block, k: int) -> Tensor:
    """Experts as the research code runs them: one after the other, each asked which tokens are its own."""
    shares, chosen = F.linear(x_ND, block.router).float().softmax(-1).topk(k, -1)
    out = torch.zeros_like(x_ND)
    for expert in range(len(block.router)):
        tokens, slots = torch.where(chosen == expert)
        if not len(tokens):
            continue
        gate, up = F.linear(x_ND[tokens], block.gate_up[expert]).chunk(2, -1)
        mixed = (F.silu(gate) * up) @ block.down[expert]
        out.index_add_(0, tokens, mixed * shares[tokens, slots, None].to(x_ND.dtype))
    return out


def profile(decoder: StaticDecoder) -> dict[str, Any]:
    """Microseconds of each kernel in place, from one profiled stretch of replays."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    decoder.place(17, 1100)
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(10):
            decoder.step()
        torch.cuda.synchronize()
    return {
        event.key[:60]: {"n": event.count, "us": round(event.device_time_total / event.count, 2)}
        for event in seen.key_averages()
        if event.device_time_total
    }


def check(results: Results, language: Language) -> None:
    """Correctness, each part on its own."""
    results.part("decode kernel errors", lambda: {k: kernel_errors(language, k, length) for k, length in
                                                  ((8, 1100), (4, 37), (6, 777))})  # fmt: skip
    results.part("decode graph = eager", lambda: same_in_graph(language))
    results.part("decode teacher-forced", lambda: teacher_forced(language), needs=15)
    torch.cuda.empty_cache()


def measure(results: Results, language: Language) -> None:
    """Speed: complete steps first, then a sweep over tile sizes, then complete steps with the best of them."""
    results.part("copy TB/s", copy_bandwidth)
    torch.cuda.empty_cache()
    decoder = StaticDecoder(language)
    for length in CONTEXTS:
        results.part(f"decode ms graph {length}", lambda length=length: decode_speed(language, decoder, length))
    some = ("16/8", "12/4")
    results.part("decode ms others 1100", lambda: {
        "kernels, no graph": decode_speed(language, StaticDecoder(language, graphs=0), 1100, some),
        "torch operators, graph": decode_speed(language, StaticDecoder(language, kernels=False), 1100, some),
        "torch operators": decode_speed(language, StaticDecoder(language, kernels=False, graphs=0), 1100, ["16/8"]),
        "DecodeBatch": {plan: dynamic_speed(language, 1100, "auto", plan) for plan in PLANS},
        "loop over experts": {plan: dynamic_speed(language, 1100, "loop", plan) for plan in some},
    })  # fmt: skip
    results.part("decode profile", lambda: _profiled(language, Tuning()))
    best: dict[str, Any] = {}
    results.part("decode sweep", lambda: sweep(language, results, best), needs=30)
    results.values["decode best"] = best
    tuned = dataclasses.replace(Tuning(), **{name: values for name, (values, _) in best.items()})
    for name, tuning in (("best", tuned), ("best, no pdl", dataclasses.replace(tuned, pdl=False))):
        results.part(
            f"decode ms {name} 1100",
            lambda tuning=tuning: decode_speed(language, StaticDecoder(language, tuning=tuning), 1100),
        )
    results.part("decode profile best", lambda: _profiled(language, tuned))
    results.part("decode kernel errors best", lambda: kernel_errors(language, tuning=tuned))


def _profiled(language: Language, tuning: Tuning) -> dict[str, Any]:
    decoder = StaticDecoder(language, tuning=tuning)
    decoder.start(prefilled(language, top_k_of(SIXTEEN, 8), 1100), 0, 17)
    return profile(decoder)


@torch.inference_mode()
def main() -> None:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "decode.json", options.seconds)
    results.part("device", lambda: {"name": torch.cuda.get_device_name(), "torch": torch.__version__})
    language: Language = full_language()
    check(results, language)
    measure(results, language)


if __name__ == "__main__":
    main()
