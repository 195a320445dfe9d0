"""The rollout engine against one `generate` per rollout at batch 1, on the same samples, kernels and threads.

    python benchmarks/rollout_engine.py [--model embedded] [--groups 16] [--plans 8] [--pairs 2000] [--threads 2]

Prints: cold ratio next to the ratio of operations that sharing alone gives (no bound: larger batches also run closer to
the processor's peak), and what share of that peak each way reaches; the ratio for the same samples under new
budgets, observations of both stages included; disagreements with the naive way and their logit gaps; peak memory of a
large batch next to the stated bound. `--fresh` runs untrained weights of the embedded shape.
"""

import argparse
import json
import platform
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from envs.data import load_task
from envs.data.sample import Sample
from envs.engine import RolloutEngine
from envs.knobs import ExecutionPlan, KnobSpace
from envs.model import AdaptiveMolmoE, AdaptiveMolmoEConfig
from envs.model.block_importance import read_importance
from envs.model.execution_tree import build_execution_tree
from envs.processing import MolmoEProcessor
from recipes.embedded_model.fresh_weights import initialise

Pair = tuple[Sample, ExecutionPlan]


def load(args: argparse.Namespace) -> tuple[AdaptiveMolmoE, MolmoEProcessor, tuple[float, ...]]:
    """Model, processor and block importance."""
    if not args.fresh:
        processor = MolmoEProcessor.from_pretrained(args.model)
        return AdaptiveMolmoE.from_pretrained(args.model), processor, read_importance(args.model)
    from envs.model.block_importance import PUBLISHED_IMPORTANCE
    from recipes.embedded_model.shape import build_config, build_processor

    processor = build_processor()
    model = initialise(build_config(len(processor.tokenizer))).eval().requires_grad_(False)
    return model, processor, PUBLISHED_IMPORTANCE


def draw(samples: Sequence[Sample], space: KnobSpace, groups: int, plans: int, seed: int) -> list[Pair]:
    """`groups` samples, each under `plans` random plans."""
    rng = random.Random(seed)
    chosen = rng.sample(range(len(samples)), groups)
    return [(samples[i], space.plan(rng.choice(space.all))) for i in chosen for _ in range(plans)]


def naive(
    model: AdaptiveMolmoE, processor: MolmoEProcessor, pairs: Sequence[Pair], limit: int
) -> list[tuple[int, ...]]:
    """One request after another, nothing shared."""
    answers = []
    for sample, plan in pairs:
        inputs = processor(sample.image, sample.question, plan.tier, sample.style)
        answers.append(tuple(model.generate(inputs, plan, limit)[0]))
    return answers


def vision_operations(config: AdaptiveMolmoEConfig, crops: int) -> float:
    """Multiplications and additions of the image encoder and connector for `crops` crops."""
    v = config.vision
    tokens, inner = v.patches + 1, v.heads * v.head_dim
    block = tokens * (8 * v.width * inner + 4 * v.width * v.mlp_dim) + 4 * tokens**2 * inner
    pool = v.patches * 4 * v.feature_dim * inner + v.tokens * 2 * inner * (v.feature_dim + v.width)
    project = v.tokens * 2 * config.expert_hidden * (2 * v.width + config.d_model)
    return crops * (v.patches * 2 * v.pixels * v.width + v.depth * block + pool + project)


def block_operations(config: AdaptiveMolmoEConfig, tokens: int, queries: int, top_k: int) -> float:
    """Of one language block over `tokens` keys, computed on for the last `queries` of them."""
    width = config.d_model
    experts = 2 * width * config.n_experts + top_k * 6 * width * config.expert_hidden
    attention = 4 * width * (queries * tokens - queries * (queries - 1) / 2)
    return tokens * 4 * width**2 + queries * (4 * width**2 + experts) + attention


def execution_operations(
    config: AdaptiveMolmoEConfig, tokens: int, top_k: Sequence[tuple[int, ...]], new: int
) -> float:
    """Of one prompt under several executions that share what they can, `new` steps of decoding each."""
    levels = build_execution_tree((0,) * len(top_k), tuple(top_k))
    total = 0.0
    for level in levels:
        total += sum(block_operations(config, tokens, tokens, ks[-1]) for _, ks in level.run)
        total += sum(block_operations(config, tokens, 1, ks[-1]) for _, ks in level.final)
    for ks in top_k:
        total += new * sum(block_operations(config, 1, 1, k) + 4 * config.d_model * tokens for k in ks if k)
    return total


def operations(engine: RolloutEngine, pairs: Sequence[Pair], answers: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Operations of the naive way, and of the same rollouts when everything equal is computed once."""
    config = engine.model.config
    plain, images, prompts = 0.0, {}, {}
    steps = {}
    for (sample, plan), answer in zip(pairs, answers, strict=True):
        shape, prompt = engine.shape(sample, plan.tier), engine.prompts.prompt(sample, plan.tier)
        new = min(len(answer), engine.max_new_tokens - 1)
        plain += vision_operations(config, shape.crops)
        plain += execution_operations(config, shape.prompt_tokens, [plan.top_k_per_block], new)
        images[prompt.key.image, prompt.key.tiling] = vision_operations(config, shape.crops)
        prompts.setdefault(prompt.key, (shape.prompt_tokens, {}))[1][plan.top_k_per_block] = new
    shared = sum(images.values())
    for tokens, executions in prompts.values():
        steps = sum(executions.values()) / len(executions)
        shared += execution_operations(config, tokens, list(executions), steps)
    return plain, shared


def logit_gap(
    model: AdaptiveMolmoE, processor: MolmoEProcessor, pair: Pair, one: tuple[int, ...], other: tuple[int, ...]
):
    """The naive way's gap between its two best tokens where two answers part."""
    sample, plan = pair
    eos = (model.config.eos_token_id,)
    place = next(i for i, (a, b) in enumerate(zip(one + eos, other + eos, strict=False)) if a != b)
    inputs = processor(sample.image, sample.question, plan.tier, sample.style)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([one[:place]], dtype=torch.long)), 1)
    best = model(inputs, plan)[0, -1].topk(2).values
    return float(best[0] - best[1])


def peak_rate(size: int = 1024, repeats: int = 20) -> float:
    """Operations a second of a square float32 product, the fastest that these threads do."""
    one, other = torch.randn(size, size), torch.randn(size, size)
    seconds = [timed(lambda: one @ other)[1] for _ in range(repeats)]
    return 2 * size**3 / min(seconds)


class PeakMemory:
    """Highest resident memory above the start, sampled in a thread."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self._now()
        self._going = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going = False
        self._thread.join()

    def _watch(self) -> None:
        while self._going:
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    @staticmethod
    def _now() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * 4096


def timed(call, clock=time.perf_counter):
    """Result and seconds."""
    began = clock()
    return call(), clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--fresh", action="store_true", help="untrained weights of the embedded shape")
    parser.add_argument("--task", default="scenes")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--plans", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=2000, help="pairs compared with the naive way; 0 to skip")
    parser.add_argument("--limit", type=int, default=16, help="new tokens at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time: for a machine that is not quiet")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    model, processor, importance = load(args)
    samples, space = load_task(args.task, "test"), KnobSpace(importance)

    def engine(**settings) -> RolloutEngine:
        return RolloutEngine(model, processor, importance=importance, max_new_tokens=args.limit, **settings)

    pairs = draw(samples, space, args.groups, args.plans, args.seed)
    chosen, plans = [s for s, _ in pairs], [p for _, p in pairs]
    naive(model, processor, pairs[:4], args.limit)
    slow, fast, warm = [], [], []
    for turn in range(args.repeats):
        answers, seconds = timed(lambda: naive(model, processor, pairs, args.limit), clock)
        slow.append(seconds)
        cold = engine()
        found, seconds = timed(lambda cold=cold: cold.outcomes(chosen, plans), clock)
        fast.append(seconds)
        cold.latency_tokens(chosen, [plan.tier for plan in plans], [0] * len(plans))
        levels = [(5 * turn + row + 1) % 16 for row in range(len(plans))]
        rng = random.Random(turn)
        known = [plans[row - row % args.plans + rng.randrange(args.plans)] for row in range(len(plans))]

        def again(cold=cold, levels=levels, known=known):
            cold.language_features(chosen)
            cold.latency_tokens(chosen, [plan.tier for plan in known], levels)
            outcomes = cold.outcomes(chosen, known)
            return [cold.accuracy(s, o) for s, o in zip(chosen, outcomes, strict=True)]

        warm.append(timed(again, clock)[1])
    plain, shared = operations(cold, pairs, answers)
    ratio, peak = min(slow) / min(fast), peak_rate()
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "rollouts": len(pairs),
        "naive_rollouts_per_second": len(pairs) / min(slow),
        "engine_rollouts_per_second": len(pairs) / min(fast),
        "cold_ratio": ratio,
        "operations_naive": plain,
        "operations_after_sharing": shared,
        "operations_ratio": plain / shared,
        "peak_gflops": peak / 1e9,
        "naive_share_of_peak": plain / min(slow) / peak,
        "engine_share_of_peak": shared / min(fast) / peak,
        "new_budgets_ratio": min(slow) / min(warm),
        "equal": sum(tuple(a) == o.token_ids for a, o in zip(answers, found, strict=True)),
    }
    if args.pairs:
        report["agreement"] = compare(engine(), model, processor, samples, space, args)
    report["memory"] = memory(model, processor, samples, space, args)
    print(json.dumps(report, indent=1))


def compare(engine, model, processor, samples, space, args) -> dict[str, object]:
    """Outcomes of random pairs next to naive ones; each mismatch with its logit gap."""
    rng = random.Random(args.seed + 1)
    pairs = [(rng.choice(samples), space.plan(rng.choice(space.all))) for _ in range(args.pairs)]
    found = engine.outcomes([s for s, _ in pairs], [p for _, p in pairs])
    wanted = naive(model, processor, pairs, args.limit)
    gaps = [
        logit_gap(model, processor, pair, one, outcome.token_ids)
        for pair, one, outcome in zip(pairs, wanted, found, strict=True)
        if one != outcome.token_ids
    ]
    return {
        "pairs": len(pairs),
        "mismatches": len(gaps),
        "logit_gaps": gaps,
        "all_below_1e-3": all(g < 1e-3 for g in gaps),
    }


def memory(model, processor, samples, space, args) -> dict[str, float]:
    """Peak memory of one large call next to what the token budget promises."""
    engine = RolloutEngine(model, processor, max_new_tokens=args.limit)
    pairs = draw(samples, space, min(128, len(samples)), args.plans, args.seed + 2)
    with PeakMemory() as peak:
        engine.outcomes([s for s, _ in pairs], [p for _, p in pairs])
    stated = engine.memory.working_bytes + engine.prompts.held_bytes + engine.prefixes.currsize
    return {"rollouts": len(pairs), "peak_mib": (peak.peak - peak.start) / 2**20, "bound_mib": stated / 2**20}


if __name__ == "__main__":
    main()
