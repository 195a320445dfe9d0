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

from envs.knobs import ExecutionPlan
from envs.model.config import MolmoEConfig
from envs.model.decode import DecodeBatch
from envs.model.kernels_step import KernelStep, Tuning, launches
from envs.model.language import Block, BlockCache, Language, Prefilled, attend
from envs.model.static import Cell, StaticDecoder

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TWELVE = (0, 1, 2, 3, 4, 5, 7, 9, 11, 12, 14, 15)
SIXTEEN = tuple(range(16))
PLANS = {"16/8": (SIXTEEN, 8), "16/4": (SIXTEEN, 4), "12/8": (TWELVE, 8), "12/4": (TWELVE, 4)}
CONTEXTS = (600, 1100, 1500)
STEPS = 40
# Candidates tried for each kernel, in the order of `Tuning`'s fields.
SWEEP: dict[str, tuple[tuple[int, ...], ...]] = {
    "gate_up": ((4, 4), (2, 4), (8, 8), (4, 8), (8, 4), (2, 8)),
    "down": ((128, 128, 8), (128, 64, 4), (64, 128, 4), (256, 64, 8), (128, 128, 4), (64, 256, 8), (256, 32, 4)),
    "qkv": ((4, 4), (2, 4), (8, 8), (4, 8), (8, 4), (16, 8)),
    "attention": ((16, 64, 4), (8, 64, 4), (16, 128, 8), (32, 64, 4), (32, 32, 4), (8, 128, 8)),
    "out": ((4, 4), (1, 4), (2, 4), (8, 8), (2, 8)),
    "router": ((1, 4), (1, 2), (2, 4), (1, 8)),
    "head": ((8, 2, 4), (8, 4, 4), (16, 1, 8), (16, 2, 8), (4, 4, 4), (8, 8, 4), (16, 4, 8)),
}


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


def full_language(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Language:
    """The language part at its published size, random weights made on the device."""
    config = dataclasses.replace(
        MolmoEConfig.from_pretrained(GOLDEN), d_model=2048, n_heads=16, n_experts=64, expert_hidden=1024,
        vocab_size=50280, embedding_size=50304, additional_vocab_size=128, eos_token_id=50279,
    )  # fmt: skip
    with torch.device("meta"):
        language = Language(config).to(dtype)
    language = language.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in language.named_parameters():
        if "norm" in name or name == "ln_f":
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = parameter.shape[-2 if name.endswith("down") else -1]
            shrink = 32**-0.5 if name.endswith(("attn_out", "down")) else 1.0
            parameter.normal_(0.0, 1.0 if name == "wte" else shrink * fan_in**-0.5, generator=generator)
    return language


def prefilled(language: Language, top_k: tuple[int, ...], length: int, seed: int = 0) -> Prefilled:
    """A prompt of `length` tokens with random caches."""
    config, like = language.config, language.wte
    generator = torch.Generator(like.device).manual_seed(seed)

    def cache() -> Tensor:
        shape = (1, length, config.n_heads, config.head_dim)
        return torch.randn(shape, device=like.device, generator=generator).to(like.dtype)

    caches = tuple(BlockCache(cache(), cache(), (0,)) if k else None for k in top_k)
    return Prefilled(like[:1], caches, None, (0,), (length,), (top_k,))


def top_k_of(blocks: tuple[int, ...], k: int) -> tuple[int, ...]:
    """Experts per token in each block."""
    return ExecutionPlan("high", 1, k, blocks).top_k_per_block


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error; not a number if any element is none."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# Correctness


def kernel_errors(language: Language, k: int = 6, length: int = 777, tuning: Tuning | None = None) -> dict[str, float]:
    """Each kernel against float64 on fresh random inputs, its outputs poisoned before."""
    config, index = language.config, 3
    cell = Cell(language, 2176, 64)
    step = KernelStep(language, cell, tuning)
    block = language.blocks[index]
    assert isinstance(block, Block)
    generator = torch.Generator(language.wte.device).manual_seed(time.time_ns() % 2**31)

    def fresh(tensor: Tensor, scale: float = 1.0) -> Tensor:
        return tensor.copy_(torch.randn(tensor.shape, device=tensor.device, generator=generator) * scale)

    def rounded(x: Tensor) -> Tensor:
        return x.to(language.wte.dtype).double()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rounded(F.rms_norm(x.double(), x.shape[-1:], weight.double(), config.norm_eps))

    found: dict[str, float] = {}
    cell.top_k.fill_(k)
    cell.position.fill_(length)
    cell.token.fill_(321)
    step.x.fill_(float("nan"))
    step.embed()
    found["embed"] = error(step.x, language.wte[321])

    fresh(step.x, 3.0)
    step.qkv.fill_(float("nan")), step.squares.fill_(float("nan"))
    step.project(block)
    wanted = block.qkv.double() @ norm(step.x, block.attn_norm)
    found["qkv"] = error(step.qkv, wanted)

    fresh(cell.keys[index]), fresh(cell.values[index])
    cell.keys[index, length:], cell.values[index, length:] = float("nan"), float("nan")
    step.mixed.fill_(float("nan")), step.partial.fill_(float("nan")), step.extremes.fill_(float("nan"))
    qkv = step.qkv.double().view(3, -1)
    step.attend(block, index)
    heads = F.rms_norm(qkv[:2], qkv.shape[-1:], None, config.norm_eps) * block.qk_norm.double()
    turns = cell.rotations[length].to(torch.complex128).view(-1)
    pairs = torch.view_as_complex(heads.view(2, config.n_heads, -1, 2)) * turns
    query, key = torch.view_as_real(pairs).flatten(-2)
    keys = torch.cat((cell.keys[index, :length].double(), rounded(key).view(1, -1))).view(-1, *query.shape)
    values = torch.cat((cell.values[index, :length].double(), rounded(qkv[2]).view(1, -1))).view(-1, *query.shape)
    scores = torch.einsum("hd,chd->hc", query, keys) * config.head_dim**-0.5
    found["attention"] = error(step.mixed, torch.einsum("hc,chd->hd", scores.softmax(-1), values).flatten())
    found["cache"] = error(cell.keys[index, length], key.flatten())

    fresh(step.x), fresh(step.mixed)
    wanted = step.x.double() + block.attn_out.double() @ step.mixed.double()
    step.output(block)
    found["out"] = error(step.x, wanted)

    fresh(step.x, 3.0)
    for tensor in (step.router_logits, step.shares, step.inner, step.down_partial):
        tensor.fill_(float("nan"))
    step.chosen.fill_(-1)
    step.route(block)
    normed = norm(step.x, block.ff_norm)
    logits = block.router.double() @ normed
    order = step.router_logits.sort(descending=True, stable=True).indices
    found["router"] = error(step.router_logits, logits)
    found["router order"] = float((step.chosen != order).sum())
    shares = logits.softmax(-1)[order]
    found["shares"] = error(step.shares, shares)

    step.expand(block, index)
    expert = block.gate_up[order[:k]].double() @ step.normed.double()
    gate, up = expert.chunk(2, -1)
    found["gate_up"] = error(step.inner[:k], F.silu(gate) * up * shares[:k, None])

    fresh(step.inner)
    wanted = step.x.double() + torch.einsum("kh,khd->d", step.inner[:k].double(), block.down[order[:k]].double())
    step.reduce(block, index)
    found["down"] = error(step.x, wanted)

    fresh(step.x, 3.0)
    cell.logits.fill_(float("nan")), step.best.fill_(float("nan")), cell.count.fill_(2)
    step.choose()
    wanted = language.lm_head.double() @ norm(step.x, language.ln_f)
    found["head"] = error(cell.logits, wanted)
    state = (int(cell.token) == int(cell.logits.argmax()) == int(cell.ids[2]), int(cell.count) == 3)
    found["head state wrong"] = float(not all(state) or int(cell.position) != length + 1)
    counters = (step.attention_arrived, step.route_arrived, step.down_arrived, step.head_arrived)
    found["counters left"] = float(sum(int(counter.abs().sum()) for counter in counters))
    return found


def same_in_graph(language: Language) -> dict[str, Any]:
    """Graph replays against eager kernels over plans: ids and logits bit for bit, and steps without synchronisation."""
    graph, eager = StaticDecoder(language), StaticDecoder(language, graphs=0)
    found: dict[str, Any] = {}
    for blocks, k in (*PLANS.values(), (TWELVE, 6), ((0, *range(2, 16)), 5)):
        top_k = top_k_of(blocks, k)
        start = prefilled(language, top_k, 300 + 7 * k, seed=k)
        ids = [decoder.decode(start, 0, 17, 8, stop_at_eos=False) for decoder in (graph, eager)]
        same = ids[0] == ids[1] and torch.equal(graph.cell.logits, eager.cell.logits)
        found[f"{len(blocks)}/{k}"] = {"same": same, "ids": ids[0]}
    torch.cuda.set_sync_debug_mode("error")
    graph.step(), eager.step()
    torch.cuda.set_sync_debug_mode("default")
    found["graphs"] = len(graph._graphs)
    return found


def teacher_forced(language: Language, tokens: int = 8) -> dict[str, Any]:
    """Logits over fixed tokens: error of kernels and of torch operators in bfloat16, both against float32 weights."""
    with torch.device("meta"):
        wide = Language(language.config)
    wide = wide.to_empty(device=language.wte.device).requires_grad_(False)
    for mine, theirs in zip(wide.parameters(), language.parameters(), strict=True):
        mine.copy_(theirs)
    top_k = top_k_of(SIXTEEN, 8)
    start = prefilled(language, top_k, 600, seed=5)
    reference = dataclasses.replace(
        start,
        caches=tuple(BlockCache(c.keys.float(), c.values.float(), c.places) if c else None for c in start.caches),
    )
    decoders = {
        "float32": (StaticDecoder(wide, kernels=False, graphs=0), reference),
        "plain": (StaticDecoder(language, kernels=False, graphs=0), start),
        "kernels": (StaticDecoder(language, graphs=0), start),
    }
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50000, (tokens,), generator=generator).tolist()
    logits: dict[str, list[Tensor]] = {name: [] for name in decoders}
    for name, (decoder, begin) in decoders.items():
        decoder.start(begin, 0, ids[0])
        for token in ids:
            decoder.cell.token.fill_(token)
            decoder.step()
            logits[name].append(decoder.cell.logits.clone())
    stacked = {name: torch.stack(rows) for name, rows in logits.items()}
    plain, kernels = (error(stacked[name], stacked["float32"]) for name in ("plain", "kernels"))
    agree = {n: float((stacked[n].argmax(-1) == stacked["float32"].argmax(-1)).float().mean()) for n in stacked}
    return {"plain": plain, "kernels": kernels, "ratio": kernels / plain, "same highest id": agree}


# Speed


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
            keys, values = batch.keys[index], batch.values[index]
            if keys is None or values is None:
                continue
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
    """Speed: whole steps first, then a sweep over tile sizes, then whole steps with the best of them."""
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
