"""Parts of `benchmarks/gpu.py` on rollouts: how many a second, where their time goes, what a new shape costs."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_requests import NEW_TOKENS, Drawn
from envs.data.sample import Sample
from envs.engine import RolloutEngine
from envs.engine.executor import Executor, Session
from envs.engine.prompts import Prompts
from envs.knobs import ExecutionPlan, KnobSpace
from envs.model.block_importance import PUBLISHED_IMPORTANCE
from envs.model.decode import DecodeBatch

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

Pairs = list[tuple[Sample, ExecutionPlan]]


def draw(bench: "Bench", groups: int, plans: int, seed: int) -> Pairs:
    """Samples with images of everyday sizes, each under random plans."""
    space, rng = KnobSpace(PUBLISHED_IMPORTANCE), random.Random(seed)
    sizes = [(1024, 768), (768, 1024), (1024, 683), (640, 480), (1024, 1024)]
    if bench.tiny:
        sizes = [(120, 90)]
    pairs = []
    for i in range(groups):
        image = Drawn(1000 * seed + i, *rng.choice(sizes))
        sample = Sample(id=f"{seed}-{i}", image=image, question=f"what is the number {i}", answers=("x",),
                        metric="exact")  # fmt: skip
        pairs += [(sample, space.plan(rng.choice(space.all))) for _ in range(plans)]
    return pairs


def run(bench: "Bench", engine: RolloutEngine, pairs: Pairs) -> tuple[float, int]:
    """Seconds that all took, and answer tokens."""
    bench.wait()
    began = time.perf_counter()
    outcomes = engine.outcomes([sample for sample, _ in pairs], [plan for _, plan in pairs])
    bench.wait()
    return time.perf_counter() - began, sum(outcome.n_tokens for outcome in outcomes)


def rollouts(bench: "Bench") -> dict[str, Any]:
    """64 samples under 8 random plans each, nothing known before; then where time goes, on fewer."""
    groups, plans, fewer = (3, 2, 2) if bench.tiny else (64, 8, 24)
    found: dict[str, Any] = {}
    bench.results["rollouts"] = found

    def engine() -> RolloutEngine:
        return RolloutEngine(bench.model, bench.processor, max_new_tokens=NEW_TOKENS)

    # Compiles what there is to compile; a training run does so once.
    found["first_s"], _ = run(bench, engine(), draw(bench, fewer, plans, 9))
    for name, seed in (("10 tokens", 1), ("10 tokens again", 2)):
        fresh = engine()
        spent, tokens = run(bench, fresh, draw(bench, groups, plans, seed))
        found[name] = {"rollouts_per_s": groups * plans / spent, "wall_s": spent, "tokens": tokens}
        found["memory plan"] = str(fresh.memory)
    found["stages"] = by_stage(bench, engine(), draw(bench, fewer, plans, 3))
    found["profile"] = profiled(bench, engine(), draw(bench, fewer, plans, 4))
    return found


def by_stage(bench: "Bench", engine: RolloutEngine, pairs: Pairs) -> dict[str, Any]:
    """Seconds in each stage, the device waited for at its end, and how often it ran. Stages contain each other."""
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            bench.wait()
            began = time.perf_counter()
            out = call(*args, **kwargs)
            bench.wait()
            spent[name].append(time.perf_counter() - began)
            return out

        return measured

    where = [(Prompts, "embed"), (Prompts, "_encode_together"), (Executor, "prefill"), (Executor, "_waves"),
             (Session, "_join"), (DecodeBatch, "step"), (DecodeBatch, "keep")]  # fmt: skip
    patches = [mock.patch.object(owner, name, timed(name, getattr(owner, name))) for owner, name in where]
    vision = type(bench.model.vision)
    patches.append(mock.patch.object(vision, "encode", timed("vision.encode", vision.encode)))
    for patch in patches:
        patch.start()
    try:
        total, _ = run(bench, engine, pairs)
    finally:
        for patch in patches:
            patch.stop()
    stages = {name: {"calls": len(each), "s": sum(each), "most_s": max(each)} for name, each in spent.items()}
    return {"rollouts": len(pairs), "total_s": total, **stages}


def profiled(bench: "Bench", engine: RolloutEngine, pairs: Pairs) -> dict[str, Any]:
    """The operators and kernels that take longest: of the host's own time, of the device's."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        total, _ = run(bench, engine, pairs)
    events = seen.key_averages()

    def top(key: str) -> dict[str, str]:
        first = sorted(events, key=lambda event: -getattr(event, key))[:25]
        return {event.key[:70]: f"{getattr(event, key) / 1e3:.2f} ms, {event.count} times" for event in first}

    tables = {"host": top("self_cpu_time_total")}
    if bench.device.type == "cuda":
        tables["device"] = top("self_device_time_total")
    busy = sum(getattr(event, "self_device_time_total", 0) for event in events) / 1e6
    return {"rollouts": len(pairs), "total_s": total, "device_busy_s": busy, **tables}


def attention(bench: "Bench") -> dict[str, Any]:
    """Milliseconds of attention at lengths not met before, then again, with and without cuDNN's plans."""
    found: dict[str, Any] = {}
    before = torch.backends.cuda.cudnn_sdp_enabled()
    lengths: Sequence[int] = (7, 9) if bench.tiny else (700, 701, 703, 707)
    for name, enabled in (("without cuDNN", False), ("with cuDNN", True)):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        try:
            for kind in ("decode", "decode masked", "causal"):
                times = []
                for length in (*lengths, *lengths):
                    query = bench.randn(4, 16, length if kind == "causal" else 1, 128)
                    key = bench.randn(4, 16, length, 128)
                    mask = torch.ones(4, 1, 1, length, dtype=torch.bool, device=bench.device)
                    bench.wait()
                    began = time.perf_counter()
                    F.scaled_dot_product_attention(
                        query, key, key, mask if kind == "decode masked" else None, is_causal=kind == "causal"
                    )
                    bench.wait()
                    times.append(round((time.perf_counter() - began) * 1e3, 3))
                found[f"{name}, {kind}"] = {"first": times[: len(lengths)], "again": times[len(lengths) :]}
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
    return found
