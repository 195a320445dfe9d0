"""Part of `benchmarks/gpu.py`: complete requests at batch 1, stage by stage, and with a loop over experts."""

import hashlib
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.ledger import plan_of
from envs.data.sample import ImageRef, Sample
from envs.engine import RolloutEngine
from envs.model.single_row import SingleRow

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

NEW_TOKENS = 10


@dataclass(frozen=True)
class Drawn(ImageRef):
    """Smooth random colors with noise, of a given size."""

    seed: int
    width: int
    height: int

    @property
    def digest(self) -> str:  # type: ignore[override]
        return hashlib.sha256(f"{self}".encode()).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def load(self) -> Image.Image:
        rng = np.random.default_rng(self.seed)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        return coarse.resize(self.size, Image.Resampling.BICUBIC)


def padded(bench: "Bench", tokens: int, tier: str, size: tuple[int, int]) -> Sample:
    """A sample whose prompt has `tokens` tokens, by the length of its question."""
    question = "what"
    for words in range(tokens):
        question = "what" + " is" * words
        if bench.processor.shape(size, tier, question, None).prompt_tokens >= tokens:
            break
    image = Drawn(0, *size)
    return Sample(id=f"padded-{tokens}", image=image, question=question, answers=("x",), metric="exact")


def request(bench: "Bench") -> dict[str, Any]:
    """Complete requests, ten answer tokens, stage by stage; the first after load; and with a loop over experts."""
    engine = RolloutEngine(bench.model, bench.processor, max_new_tokens=NEW_TOKENS)
    found: dict[str, Any] = {}
    usual = SingleRow(bench.model, static=False)
    wide, square = ((200, 60), (90, 90)) if bench.tiny else ((900, 300), (1024, 768))
    for name, tokens, tier, size, blocks, top_k in (
        ("600 12/4", 40 if bench.tiny else 600, "low", wide, 12, 4),
        ("1500 16/8", 50 if bench.tiny else 1500, "high", square, 16, 8),
    ):
        sample = padded(bench, tokens, tier, size)
        shape = engine.shape(sample, tier)
        base = plan_of(blocks, top_k)
        plan = type(base)(tier, base.insertion, base.top_k, base.blocks)
        entry: dict[str, Any] = {"prompt_tokens": shape.prompt_tokens, "views": shape.crops}
        began = time.perf_counter()
        engine.run_measured(sample, plan)
        entry["first_ms"] = (time.perf_counter() - began) * 1e3
        entry |= _request(engine, sample, plan, 2 if bench.tiny else 15)
        with mock.patch.object(type(bench.model), "single_row", usual):
            entry["as a batch"] = _request(engine, sample, plan, 2 if bench.tiny else 9)
            with mock.patch("envs.model.language.mixture", loop):
                entry["loop over experts"] = _request(engine, sample, plan, 1 if bench.tiny else 3)
        found[name] = bench.results.setdefault("request", {})[name] = entry
    return found


def _request(engine: RolloutEngine, sample: Sample, plan: Any, repeats: int) -> dict[str, Any]:
    engine.run_measured(sample, plan)
    records = [engine.run_measured(sample, plan) for _ in range(repeats)]
    names = ("processor", "vision", "prefix", "suffix", "decode", "total")
    stage = {name: statistics.median(getattr(record, name) for _, record in records) for name in names}
    ids = records[-1][0].token_ids
    return {
        **stage, "without_processor": stage["total"] - stage["processor"], "new_tokens": len(ids), "ids": str(ids)
    }  # fmt: skip


def loop(
    x_ND: Tensor, logits_NE: Tensor, gate_up_EGD: Tensor, down_EHD: Tensor, top_k: Any, *_: Any,
    residual_ND: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The mixture as the published code computes it: expert by expert, each asking which tokens are its own."""
    most = top_k if isinstance(top_k, int) else top_k.maximum
    weights, chosen = logits_NE.float().softmax(-1).topk(most, -1)
    out = torch.zeros_like(x_ND)
    for expert in range(len(gate_up_EGD)):
        token, slot = torch.where(chosen == expert)
        if len(token):
            gate, up = F.linear(x_ND[token], gate_up_EGD[expert]).chunk(2, -1)
            part = (F.silu(gate) * up) @ down_EHD[expert] * weights[token, slot, None].to(x_ND.dtype)
            out.index_add_(0, token, part)
    return out if residual_ND is None else residual_ND + out
