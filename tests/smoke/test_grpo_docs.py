"""The code of docs/rllib.md runs, as it is printed, on the toy environment."""

import re
from pathlib import Path
from typing import Any

import grpo_toy
import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "rllib.md"
MAX_LINES = 25


def test_the_page_runs(tmp_path: Path) -> None:
    grpo_toy.share_ray()
    first, tuning, ppo = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    code = [line for line in first.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    assert len(code) <= MAX_LINES
    names: dict[str, Any] = {
        "name": grpo_toy.ENVIRONMENT,
        "make_environment": grpo_toy.ToyVectorEnv,
        "env_config": {"seed": 1},
        "held_out": {"group_size": 1},
        "contexts": [(sample, 50.0) for sample in range(10)],
        "folder": tmp_path / "checkpoint",
        "storage": tmp_path / "trials",
    }
    exec(compile(first, "rllib.md", "exec"), names)
    assert names["result"]["grpo"]["updates"] == 2.0
    exec(compile(tuning, "rllib.md", "exec"), names)
    assert names["best"].config["lr"] in (1e-3, 1e-4)
    assert np.isfinite(names["best"].metrics["env_runners"]["episode_return_mean"])
    exec(compile(ppo, "rllib.md", "exec"), names)
