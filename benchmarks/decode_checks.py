"""Full-size decoding: random weights and prompts made on the device, and whether the kernels are right."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.knobs import ExecutionPlan
from envs.model.config import AdaptiveMolmoEConfig
from envs.model.kernels.decode_step import KernelStep, Tuning
from envs.model.language import Block, Language
from envs.model.prefill import BlockCache, Prefilled
from envs.model.static import Cell, StaticDecoder

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TWELVE = (0, 1, 2, 3, 4, 5, 7, 9, 11, 12, 14, 15)
SIXTEEN = tuple(range(16))
PLANS = {"16/8": (SIXTEEN, 8), "16/4": (SIXTEEN, 4), "12/8": (TWELVE, 8), "12/4": (TWELVE, 4)}


def launches(language: Language, top_k: Sequence[int], length: int) -> Iterator[tuple[str, int]]:
    """Kernels of one step and the fewest bytes each moves: weights and cache read once, vectors between left out.

    Args:
        language: weights, or a model on `meta`.
        top_k: experts per token in each block, 0 where it is dropped.
        length: tokens in the cache.
    """
    size = language.wte.element_size()
    width, hidden = language.config.d_model, language.config.expert_hidden
    yield "embed", width * size
    for k in top_k:
        if k:
            yield "qkv", 3 * width * width * size
            yield "attention", 2 * (length + 1) * width * size
            yield "out", width * width * size
            yield "router", language.config.n_experts * width * size
            yield "gate_up", k * 2 * hidden * width * size
            yield "down", k * hidden * width * size
    yield "head", language.lm_head.numel() * size


def full_language(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Language:
    """The language part at its published size, random weights made on the device."""
    config = dataclasses.replace(
        AdaptiveMolmoEConfig.from_pretrained(GOLDEN), d_model=2048, n_heads=16, moe_num_experts=64,
        mlp_hidden_size=2048, vocab_size=50280, embedding_size=50304, additional_vocab_size=128, eos_token_id=50279,
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
