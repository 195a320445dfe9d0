"""What the controller costs, next to the requests that it decides, at batch 1.

    python benchmarks/controller.py RUN [--requests 100]

Lower quartiles over requests with different questions (other processes only add): microseconds of each part, then the
controller stage as a share of the cheapest plan's and of the full plan's latency.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from envs.knobs import ExecutionPlan
from envs.latency.measured import reference_sample
from ray_ctrl.pipeline import AdaptivePipeline
from ray_ctrl.serving import RequestController


def lower_quartile(values: Iterable[float]) -> float:
    """Of at least one value."""
    rising = sorted(values)
    return rising[len(rising) // 4]


def microseconds(part: Callable[[Any], Any], inputs: list[Any]) -> float:
    """Lower quartile of one call per input, after ten to warm up."""
    spent = []
    for turn, value in enumerate([*inputs[:10], *inputs]):
        began = time.perf_counter()
        part(value)
        if turn >= 10:
            spent.append((time.perf_counter() - began) * 1e6)
    return lower_quartile(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder or exported controller")
    parser.add_argument("--requests", type=int, default=100)
    arguments = parser.parse_args()
    pipe = AdaptivePipeline.from_pretrained(None, arguments.run)
    image = reference_sample(pipe.engine.model.config.vision.crop_size)
    samples = [replace(image, id=str(n), question=f"how many digits, {n}?") for n in range(arguments.requests)]
    budget_ms, model = pipe.reference_ms, pipe.engine.model
    feature_D = pipe.engine.language_features(samples[:1])[0]
    token_D = torch.randn(model.config.d_model)
    predictor = pipe.predictor
    deciding = RequestController(pipe.controller, pipe.space, budget_ms, pipe.reference_ms)
    parts: dict[str, Callable[[Any], Any]] = {
        "question feature": lambda s: model.language_feature(pipe.engine.processor.question_ids(s.question)).float(),
        "budget": lambda s: RequestController(pipe.controller, pipe.space, budget_ms, pipe.reference_ms),
        "guardrail": lambda s: None if predictor is None else predictor.predicted_ms(s) <= budget_ms,
        "stage 1": lambda s: deciding.decide_stage1(feature_D, True),
        "stage 2": lambda s: deciding.decide_stage2(token_D, deciding._first[1] + 1),
    }
    with torch.inference_mode():
        for name, part in parts.items():
            print(f"{name:<18}{microseconds(part, samples):9.1f} us")
    stage = lower_quartile(pipe.answer(sample, budget_ms).record.controller for sample in samples)
    print(f"{'controller stage':<18}{stage * 1e3:9.1f} us in a request")
    for name, plan in {"cheapest plan": pipe.space.plan(pipe.space.cheapest), "full plan": ExecutionPlan()}.items():
        total = lower_quartile(pipe.engine.run_measured(sample, plan)[1].total for sample in samples[:20])
        print(f"{name:<18}{total:9.2f} ms: the controller takes {stage / total:.1%} of it")


if __name__ == "__main__":
    main()
