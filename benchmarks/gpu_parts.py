"""Parts of `benchmarks/gpu.py` that look at this package: kernels, stages, numbers, waits."""

import importlib
import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ledger import count, full_model, plan_of, stages
from envs.model import fused
from envs.model.decode import DecodeBatch

if TYPE_CHECKING:
    from benchmarks.gpu import Bench


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def kernels(bench: "Bench") -> dict[str, Any]:
    """Fused operators at full size: error against float64, milliseconds, share of the copy ceiling."""
    config = bench.config
    tokens, experts, hidden, width = (
        (64 if bench.tiny else 2000),
        config.n_experts,
        config.expert_hidden,
        config.d_model,
    )
    block = bench.model.language.blocks[0]
    x, logits = bench.randn(tokens, width), bench.randn(tokens, experts, dtype=torch.float32)
    weights, chosen = fused.route(logits, 8, None)
    sort = fused.sort_pairs(weights, chosen, experts, 8 * tokens)
    rows, shares, inverse, ends = sort
    right = torch.ops.ray_ctrl.sort_pairs(weights.cpu(), chosen.cpu(), experts, 8 * tokens)
    gate_up, pairs = bench.randn(8 * tokens, 2 * hidden), bench.randn(8 * tokens, width)
    turns = torch.view_as_real(bench.model.language.rope(tokens)[:tokens]).reshape(tokens, -1, 2)
    qkv = bench.randn(tokens, 3, width)
    inner = bench.randn(8 * tokens, hidden)
    pre = bench.randn(13 * 577 if not bench.tiny else 65, config.vision.mlp_dim)
    turned = block.gate_up.transpose(1, 2)
    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "silu_mul": (fused.silu_mul, (gate_up, shares)),
        "combine": (fused.combine, (pairs, inverse, x)),
        "norm_rope": (fused.norm_rope, (qkv[:, :2], block.qk_norm, turns, 1e-5)),
        "quick_gelu": (fused.quick_gelu, (pre,)),
        "triton gate_up": (fused.grouped_mm, (x, turned, ends, rows, 8 * tokens)),
        "triton down": (fused.grouped_mm, (inner, block.down, ends, None, 8 * tokens)),
    }
    found: dict[str, Any] = {
        "sort_pairs": {"equal": all(torch.equal(a.cpu(), b) for a, b in zip(sort, right, strict=True))},
        "route ms": bench.time(lambda: fused.route(logits, 8, None)),
        "sort_pairs ms": bench.time(lambda: fused.sort_pairs(weights, chosen, experts, 8 * tokens)),
    }
    for name, (operator, args) in cases.items():
        ms = bench.time(lambda operator=operator, args=args: operator(*args))
        found[name] = {"error": _checked(operator, args), "ms": ms}
        bench.results["kernels"] = found
    if x.is_cuda and x.dtype == torch.bfloat16 and fused._native_grouped(x.device):
        found["torch gate_up ms"] = bench.time(lambda: fused.grouped_product(x, turned, ends, rows, 8 * tokens))
        found["torch down ms"] = bench.time(lambda: fused.grouped_product(inner, block.down, ends, None, 8 * tokens))
    return found


def _checked(operator: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Error against the torch version in float64 on the CPU; the result's memory held NaN before."""
    shape = operator(*args).shape
    poison = torch.full(shape, torch.nan, dtype=args[0].dtype, device=args[0].device)
    del poison
    found = operator(*args)
    if operator is fused.grouped_mm:
        x, weight, ends, rows, _ = args
        counts = [int(n) for n in ends.diff(prepend=ends.new_zeros(1))]
        source = x if rows is None else x[rows.long()]
        # On the device, float32 sums of products rounded nowhere else: float64 of 0.5 TFLOP would take a minute.
        parts = zip(source.float().split(counts), weight, strict=True)
        return error(found, torch.cat([part @ matrix.float() for part, matrix in parts]))
    wide = [
        a.cpu().double() if isinstance(a, Tensor) and a.is_floating_point() else a.cpu() if isinstance(a, Tensor) else a
        for a in args
    ]
    return error(found.cpu(), _in_double(operator, wide))


def _in_double(operator: Callable[..., Any], args: list[Any]) -> Tensor:
    """The definitions, without their own casts to float32."""
    if operator is fused.silu_mul:
        gate, up = args[0].chunk(2, -1)
        return F.silu(gate) * up * args[1].unsqueeze(1)
    if operator is fused.combine:
        return args[0][args[1].long()].sum(1) + args[2]
    if operator is fused.quick_gelu:
        return args[0] * torch.sigmoid(1.702 * args[0])
    x, weight, turns, eps = args
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    pairs = torch.view_as_complex(normed.view(*x.shape[:2], -1, turns.shape[1], 2).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(turns)[:, None, None]).reshape(x.shape)


def decode(bench: "Bench") -> dict[str, Any]:
    """The static step, see `benchmarks/gpu_decode.py`."""
    if bench.device.type != "cuda" or importlib.util.find_spec("benchmarks.gpu_decode") is None:
        return {"skipped": "needs a GPU and benchmarks/gpu_decode.py"}
    module = importlib.import_module("benchmarks.gpu_decode")
    results = module.Results(bench.out / "decode.json", 80)
    module.check(results, bench.model.language)
    module.measure(results, bench.model.language)
    found: dict[str, Any] = results.values
    return found


def prefill(bench: "Bench") -> dict[str, Any]:
    """Vision and prefill, stage by stage: milliseconds and what arithmetic and weights take at the ceilings."""
    card = bench.results.get("ceilings", {})
    rate, bandwidth = card.get("gemm_tflop_s", 750.0) * 1e9, card.get("copy_tb_s", 3.0) * 1e9
    sizes = ((2, 3), (40, 50, 60)) if bench.tiny else ((4, 13), (600, 1500, 2000))
    counted = stages(full_model(bench.model.dtype, bench.config), *sizes)
    found: dict[str, Any] = {}
    for name, call in stages(bench.model, *sizes).items():
        # A call made of operators that only the card has is counted on meta, outside inference mode.
        with torch.inference_mode(mode=False):
            ledger = count(counted[name])
        ms = bench.time(call)
        arithmetic, traffic = ledger.flops / rate, ledger.bytes / bandwidth
        found[name] = {
            "ms": ms, "arithmetic_ms": arithmetic, "traffic_ms": traffic, "kernels": ledger.kernels,
            "host_ms": _host_ms(bench, call), "times_floor": ms / max(arithmetic, traffic),
            "unfused_ms": _unfused_ms(bench, call),
        }  # fmt: skip
        bench.results["prefill"] = found
    return found


def _unfused_ms(bench: "Bench", call: Callable[[], Any]) -> float:
    with plain():
        return bench.time(call, repeats=5)


def _host_ms(bench: "Bench", call: Callable[[], Any]) -> float:
    """Median milliseconds until a call returns, the device still at work: what dispatching alone costs."""
    spent = []
    for _ in range(5):
        bench.wait()
        began = time.perf_counter()
        call()
        spent.append((time.perf_counter() - began) * 1e3)
    return statistics.median(spent)


@contextmanager
def plain() -> Iterator[None]:
    """Without fused operators, router logits rounded."""
    with mock.patch.object(fused, "available", return_value=False), mock.patch.object(fused, "router_logits", F.linear):
        yield


def numerics(bench: "Bench") -> dict[str, Any]:
    """Logits of one prompt against float32 arithmetic on the same weights: fused and plain bfloat16."""
    tokens = 40 if bench.tiny else 600
    ids = torch.randint(0, bench.config.vocab_size, (1, tokens), device=bench.device)
    inputs = {"input_ids": ids}
    model, plan = bench.model, plan_of(16, 8)
    ours = model(inputs, plan).float().cpu()
    with plain():
        usual = model(inputs, plan).float().cpu()
        wide = _float32(model)
        wide.load_state_dict(model.state_dict())
        wide.experts = "dense"
        right = wide(inputs, plan).float().cpu()
    found = {"fused_error": error(ours, right), "plain_error": error(usual, right)}
    found["ratio"] = found["fused_error"] / max(found["plain_error"], 1e-12)
    for name, logits in (("fused", ours), ("plain", usual)):
        found[f"{name}_same_token"] = float((logits.argmax(-1) == right.argmax(-1)).double().mean())
    return found


@torch.inference_mode(mode=False)
def _float32(model: Any) -> Any:
    with torch.device("meta"):
        wide = type(model)(model.config)
    return wide.float().to_empty(device=model.device)


def syncs(bench: "Bench") -> dict[str, Any]:
    """Whether vision, prefill and a decode step ever wait for the device."""
    model, found = bench.model, {}
    language, config = model.language, model.config
    x = bench.randn(1, 64, config.d_model)
    prefilled = language.prefill(x, [64], [0], [plan_of(16, 8).top_k_per_block])
    batch = DecodeBatch(language, [(prefilled, [0])])
    images = torch.rand(1, 2, config.vision.patches, config.vision.pixels)
    masks = torch.ones(1, 2, config.vision.patches)
    calls: dict[str, Callable[[], Any]] = {
        "vision": lambda: model.vision(images, masks),
        "prefill": lambda: language.prefill(x, [64], [0], [plan_of(12, 4).top_k_per_block]),
        "dynamic step": lambda: batch.step([1]),
    }
    for name, call in calls.items():
        call()
        bench.wait()
        found[name] = "none"
        if bench.device.type != "cuda":
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            frames = [line for line in traceback.format_exc().splitlines() if "envs/" in line]
            found[name] = frames[-1].strip() if frames else "somewhere"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found
