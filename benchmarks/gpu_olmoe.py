"""Part of `benchmarks/gpu.py`: transformers' OLMoE, of the language part's shape, with each way to run experts."""

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

NEW_TOKENS = 10


def build(bench: "Bench", blocks: int, top_k: int) -> Any:
    """Random weights of the language part's shape."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = bench.config
    shape = OlmoeConfig(
        vocab_size=config.embedding_size, hidden_size=config.d_model, intermediate_size=config.expert_hidden,
        num_hidden_layers=blocks, num_attention_heads=config.n_heads, num_experts=config.n_experts,
        num_experts_per_tok=top_k, eos_token_id=None, pad_token_id=config.pad_token_id, norm_topk_prob=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.model.dtype)
    try:
        with torch.device(bench.device):
            return OlmoeForCausalLM(shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode(mode=False)
@torch.no_grad()
def olmoe(bench: "Bench") -> dict[str, Any]:
    """Milliseconds of `generate` over ten new tokens, prompt included, by size and by how experts are run."""
    found: dict[str, Any] = {}
    bench.results["olmoe"] = found
    # Compiling takes most of the time there is: one size, last.
    compiled = ("grouped_mm", {"cache_implementation": "static"})
    for tokens, blocks, top_k in ((1500, 16, 8), (600, 12, 4))[1 if bench.tiny else 0 :]:
        ways: list[tuple[str, dict[str, Any]]] = [("eager", {}), ("batched_mm", {})]
        if not bench.tiny:
            ways = [("grouped_mm", {}), ("batched_mm", {}), *([compiled] if blocks == 12 else [])]
        model = build(bench, blocks, top_k)
        ids = torch.randint(0, bench.config.vocab_size, (1, 40 if bench.tiny else tokens), device=bench.device)
        for way, more in ways:
            name = f"{tokens} {blocks}/{top_k} {way}{' static compiled' if more else ''}"
            try:
                found[name] = _generate(bench, model, ids, way, more)
            except TimeoutError:
                raise
            except Exception as error:
                found[name] = f"{type(error).__name__}: {str(error)[:200]}"
        del model
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _generate(bench: "Bench", model: Any, ids: torch.Tensor, way: str, more: dict[str, Any]) -> float:
    model.set_experts_implementation(way)
    spent = []
    for turn in range(2 if bench.tiny else 6):
        bench.wait()
        began = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **more
        )
        bench.wait()
        if turn >= (1 if bench.tiny else 2):
            spent.append((time.perf_counter() - began) * 1e3)
        if out.shape[1] != ids.shape[1] + NEW_TOKENS:
            raise RuntimeError(f"{out.shape[1] - ids.shape[1]} new tokens")
    return statistics.median(spent)
