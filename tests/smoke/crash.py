"""Runs the command line and kills its own process at a chosen place: `crash.py PLACE CALL ARGUMENTS...`.

PLACE is where (`sampling`, `collecting` what other processes sampled, `update`, `checkpoint`), CALL which call of it,
counted from 1. The work of that call is done first: half an iteration is lost, half a checkpoint left.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from policies.grpo.algorithm import GRPO
from policies.grpo.env_runner import RolloutRunner
from policies.grpo.sampling import Sampler
from ray_ctrl.cli import main

PLACES = {
    "sampling": (RolloutRunner, "sample_shard"),
    "collecting": (Sampler, "collect"),
    "update": (GRPO, "_learn"),
    "checkpoint": (GRPO, "save_to_path"),
}


def deadly(method: Callable[..., Any], fatal: int) -> Callable[..., Any]:
    """`method`, whose call number `fatal` is the last thing this process does."""
    calls = 0

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = method(*args, **kwargs)
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


if __name__ == "__main__":
    if sys.argv[1] == "none":
        sys.exit(main(sys.argv[3:]))
    place, count, *arguments = sys.argv[1:]
    owner, name = PLACES[place]
    setattr(owner, name, deadly(getattr(owner, name), int(count)))
    sys.exit(main(arguments))
