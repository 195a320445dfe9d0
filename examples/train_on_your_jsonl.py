"""Train a controller on your own questions: python examples/train_on_your_jsonl.py DATA.jsonl RUN_FOLDER [KEY=VALUE]...

Each line of DATA.jsonl is {"image": "a.png", "question": "what is this?", "answers": ["a cat"]}. Images are found
relative to the file, and lines are split by image into train, validation and test (docs/data.md).
"""

import sys

from ray_ctrl.cli import main

data, run, *overrides = sys.argv[1:]
status = main(["train", "--task", data, "--run-dir", run, *overrides])
if status == 0:
    print(f"answer with: python examples/use_the_pipeline.py {run} IMAGE QUESTION")
sys.exit(status)
