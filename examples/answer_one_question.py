"""Answer one test question within a budget: python examples/answer_one_question.py RUN [BUDGET_MS]."""

import sys
from pathlib import Path

from policies.controller import Controller
from ray_ctrl.commands.answer import answer, sample_of_task
from ray_ctrl.commands.evaluate import controller_config, find_controller

folder, _ = find_controller(Path(sys.argv[1]))
budget_ms = float(sys.argv[2]) if len(sys.argv) > 2 else 50.0
controller, metadata = Controller.load(folder)
config = controller_config(metadata, folder)  # model, task and device of the training run
sample = sample_of_task(config, index=0)

# Stage 1 reads the question and the budget, stage 2 the latency token; the model then runs the chosen plan.
result = answer(config, metadata, controller, sample, budget_ms, repeats=2)

print(f"question  {sample.question}")
print(f"answer    {result.answer}  (reference: {sample.answers[0]})")
print(f"plan      {result.knobs}")
print(f"latency   {result.record.total:.1f} ms of {budget_ms:g} ms")
