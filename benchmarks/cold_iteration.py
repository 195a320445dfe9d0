"""What RLlib and the learner cost in a cold iteration: CPU time outside the environment, one process, no store.

    python benchmarks/cold_iteration.py [KEY=VALUE ...]

Every outcome is computed, by the embedded model at the settings of the `laptop` preset. CPU time of the process is
counted, which other work on the machine does not change much. The environment's part is its reset and its two steps.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.connect import connect
from ray_ctrl.load_config import load_config
from ray_ctrl.preflight import plan_layout
from ray_ctrl.provenance import hardware
from ray_ctrl.rllib_setup import build_algorithm
from ray_ctrl.run_context import open_context


class Counter:
    """CPU seconds of the process spent in the functions it watches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    overrides = parser.parse_args().overrides
    config = load_config("laptop", None, ["latency.source=roofline", "store.path=null", *overrides])
    layout = plan_layout(config)
    with connect("local", layout.resources, timeout_s=120.0):
        context = open_context(config).with_profile(Path(tempfile.mkdtemp()))
        algorithm = build_algorithm(context, layout.envs, contexts=4)
        environment, counter = algorithm.env_runner.env.unwrapped, Counter()
        environment.reset = counter.watch(environment.reset)
        environment.step = counter.watch(environment.step)
        started = time.process_time()
        row = algorithm.train()["grpo"]
        spent = time.process_time() - started
        algorithm.stop()
    rest = spent - counter.seconds
    print(f"cold iteration of {row['rollouts']:.0f} rollouts on {hardware()}: {spent:.1f} s of CPU time")
    print(f"environment {counter.seconds:.1f} s; RLlib, controller and learner {rest:.2f} s: {rest / spent:.1%}")


if __name__ == "__main__":
    main()
