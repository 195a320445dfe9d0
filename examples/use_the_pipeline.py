"""Answer a question about an image within a budget: python examples/use_the_pipeline.py RUN IMAGE QUESTION [BUDGET_MS].

RUN is a run folder, an exported controller or a hub id. Needs no Ray.
"""

import sys

from ray_ctrl.pipeline import AdaptivePipeline

run, image, question = sys.argv[1:4]
budget_ms = float(sys.argv[4]) if len(sys.argv) > 4 else 50.0

pipe = AdaptivePipeline.from_pretrained(None, run)  # None: the model that the controller was trained on
pipe(image, question, budget_ms)  # the first request warms the device up
result = pipe(image, question, budget_ms)

print(f"answer    {result.answer}")
print(f"plan      {result.knobs}")
print(f"latency   {result.record.total:.1f} ms of {budget_ms:g} ms, within budget: {result.within_budget}")
for stage, ms in result.record.to_dict().items():
    predicted = "" if result.predicted is None else f", predicted {result.predicted.to_dict()[stage]:.2f}"
    print(f"  {stage:<11}{ms:6.2f} ms{predicted}")
