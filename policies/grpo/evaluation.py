"""Evaluation through RLlib's own: every explicit context exactly once, acting by argmax, one row each.

`evaluate_with_runners` is the configuration's `custom_evaluation_function`; `evaluate_contexts` asks RLlib's
`Algorithm.evaluate()` for a given list of contexts and returns the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS

from envs.errors import UserError
from policies.baselines import Baseline
from policies.grpo.env_runner import STEPS
from policies.grpo.metrics import as_runner_results, episode_metrics
from policies.grpo.rllib_adapter import RunnerPool
from policies.grpo.sampling import Dispatcher, Task

if TYPE_CHECKING:
    from policies.grpo.algorithm import GRPO

Row = dict[str, float]


@dataclass(frozen=True)
class EvaluationRequest:
    """What the next `evaluate()` runs: contexts as the environment's `set_contexts` takes them, and who acts."""

    contexts: tuple[Any, ...]
    baseline: Baseline | None = None


def evaluate_contexts(algorithm: "GRPO", contexts: Sequence[Any], *, baseline: Baseline | None = None) -> list[Row]:
    """Run every context once on the evaluation runners.

    Args:
        contexts: (sample index, budget in ms), indices into the evaluation environment's samples; a third number is
            the budget in the observation, ms, if that is to differ.
        baseline: who acts instead of the trained controller.

    Returns:
        One row per context, in order: final infos, `context` (its index in `contexts`), `log_ratio` (of the budget
        observed), `reward`.

    Raises:
        UserError: no contexts, no evaluation runners configured, all of them dead, or a bad context.
    """
    algorithm.evaluation_request = EvaluationRequest(tuple(contexts), baseline)
    try:
        algorithm.evaluate()
        return list(algorithm.evaluation_rows)
    finally:
        algorithm.evaluation_request = None


def evaluate_with_runners(algorithm: "GRPO", group: EnvRunnerGroup | None) -> tuple[dict[str, float], int, int]:
    """RLlib's hook: distribute the requested contexts over the evaluation runners and log their means."""
    request = algorithm.evaluation_request or EvaluationRequest(standing_contexts(algorithm))
    if group is None:
        raise UserError(
            "no evaluation runners: give .evaluation(evaluation_config=...) with the evaluation environment"
        )
    if not request.contexts:
        raise UserError("no contexts to evaluate: give at least one (sample index, budget in ms)")
    width = algorithm.evaluation_config.num_envs_per_env_runner
    weights = None if request.baseline else algorithm.evaluated_weights()
    config = algorithm.evaluation_config
    runners = RunnerPool(group, "evaluation", restarts=config.restart_failed_env_runners)
    dispatcher = Dispatcher(
        runners,
        "run_contexts",
        timeout_s=config.evaluation_sample_timeout_s,
        restart_timeout_s=config.timeouts.restart_timeout_s,
    )
    tasks = []
    for first in range(0, len(request.contexts), width):
        contexts = request.contexts[first : first + width]
        job = {"contexts": contexts, "first": first, "weights": weights, "baseline": request.baseline}
        tasks.append(Task(f"evaluation of contexts {first} to {first + len(contexts) - 1}", job))
    dispatcher.submit(tasks)
    parts = dispatcher.collect(tasks)
    rows = [row for part in parts for row in part]
    missing = sorted(set(range(len(request.contexts))) - {int(row["context"]) for row in rows})
    if missing:
        raise UserError(
            f"contexts {missing[:5]} of {len(request.contexts)} gave no result: check the evaluation environment"
        )
    algorithm.evaluation_rows = rows
    means = summary(rows)
    # RLlib reads evaluation results from its metrics, and only such as a runner could have sent.
    numbers = means | episode_metrics(np.array([row["reward"] for row in rows]), STEPS)
    algorithm.metrics.aggregate([as_runner_results(numbers)], key=(EVALUATION_RESULTS, ENV_RUNNER_RESULTS))
    return numbers, STEPS * len(rows), STEPS * len(rows)


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Means over rows: reward, accuracy, latency and violation rate."""
    means = {
        f"{key}_mean": float(np.mean([row[key] for row in rows]))
        for key in ("reward", "accuracy", "latency_ms")
        if key in rows[0]
    }
    means["violation_rate"] = float(np.mean([row["latency_ms"] > row["budget_ms"] for row in rows]))
    means["contexts"] = float(len(rows))
    return means


def standing_contexts(algorithm: "GRPO") -> tuple[Any, ...]:
    """Contexts of `algorithm.evaluate()`: `evaluation_duration` of those configured, else of the environment's own.

    Raises:
        UserError: there are none.
    """
    config, group = algorithm.config, algorithm.eval_env_runner_group
    contexts = config.evaluation_contexts
    if not contexts and group is not None:
        local = not group.num_remote_env_runners()
        answers = group.foreach_env_runner(
            lambda runner: runner.held_out_contexts(),
            local_env_runner=local,
            timeout_seconds=config.evaluation_sample_timeout_s,
        )
        contexts = tuple(next((answer for answer in answers if answer), ()))
        if not contexts:
            raise UserError(
                "no contexts to evaluate, and the environment has no held_out_contexts(): give evaluation_contexts="
                "[(sample, budget in ms), ...] to .evaluation()"
            )
    steps = STEPS if config.evaluation_duration_unit == "timesteps" else 1
    return contexts[: max(1, config.evaluation_duration // steps)]
