"""Whether a long run leaks: resident memory of the driver and of each env runner over hundreds of iterations.

    python benchmarks/leak.py [--iterations 300] [--settled 50] [KEY=VALUE ...]

A run folder with everything on: validation every 10 iterations, checkpoints, TensorBoard. Medians of 10 iterations
after `--settled` and of the last 10 are compared; the exit status is 1 if any process grew by more than 2 %.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cluster.connect import connect
from ray_ctrl.load_config import load_config
from ray_ctrl.preflight import plan_layout
from ray_ctrl.provenance import hardware
from ray_ctrl.run_context import open_context
from ray_ctrl.run_folder import RunFolder
from ray_ctrl.trainer import Trainer

LIMIT = 0.02
WINDOW = 10


def resident_mib(_: Any = None) -> float:
    """Resident memory of this process, MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured(trainer: Trainer) -> list[float]:
    """MiB of the driver, then of each env runner."""
    runners = trainer.algorithm.env_runner_group.foreach_env_runner(resident_mib, local_env_runner=False)
    return [resident_mib(), *runners]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--settled", type=int, default=50)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    given = [f"run.iterations={args.iterations}", "run.checkpoint_every=10", "evaluation.every=10", "runners.count=2"]
    given += ["runners.cpus=0.5", f"store.path={root / 'outcomes.sqlite'}", *args.overrides]
    config = load_config("smoke", None, given)
    layout = plan_layout(config)
    with connect("local", layout.resources, timeout_s=120.0):
        folder = RunFolder.create(root / "run", config)
        trainer = Trainer(config, folder, open_context(config).with_profile(folder.root), layout)
        rows = []
        while trainer.done < args.iterations:
            trainer.step()
            rows.append(measured(trainer))
        trainer.stop()
    memory = np.array(rows)
    ends = range(args.settled + WINDOW, len(memory) + 1, max(WINDOW, (len(memory) - args.settled) // 5))
    marks = np.array([np.median(memory[end - WINDOW : end], axis=0) for end in (*ends, len(memory))])
    print(f"{args.iterations} iterations on {hardware()}; medians of {WINDOW}, the first after {args.settled}")
    for index, sizes in enumerate(marks.T):
        name, grown = f"runner {index}" if index else "driver", sizes[-1] / sizes[0] - 1
        print(f"{name}: " + ", ".join(f"{size:.1f}" for size in sizes) + f" MiB ({grown:+.2%})")
    before, after = marks[0], marks[-1]
    sys.exit(int((after > before * (1 + LIMIT)).any()))


if __name__ == "__main__":
    main()
