"""Sampling: an iteration is cut into shards, shards are dispatched over env runners that may die, groups come back.

    Sampler.collect(iteration, weights)
      |  one Task per shard of each iteration ordered
      v
    Dispatcher            the life of a Task:

        submit            _dispatch            _poll: an answer
      ---------> waiting ----------> queued -----------------------> done ---> collect
                    ^                  |
                    +------------------+
                      its runner died or stalled, or it raised; UserError after MAX_ATTEMPTS

A task depends on (seed, iteration, shard) and on the weights it carries, never on the runner, so running it again
anywhere gives the same rollouts. Nothing runs in the driver's background: while the driver learns, runners work off
the queues that `fill` left them with.

With `max_policy_lag` k, iterations up to k ahead are ordered as soon as weights exist: iteration i is sampled under the
weights of max(0, i - k) updates, however fast anyone is. The weights of iterations under way are part of a checkpoint;
after a restore, or after an error, those iterations are sampled again under them, with the same result.
"""

import logging
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import ray

from envs.errors import UserError, first_line
from policies.grpo.env_runner import Rollouts
from policies.grpo.rllib_adapter import RunnerPool

logger = logging.getLogger(__name__)
MAX_ATTEMPTS: Final = 3
PAUSE_S: Final = 0.0005
MAX_PAUSE_S: Final = 0.2
IDLE_PAUSE_S: Final = 0.2
COUNTS: Final = ("shards_rerun", "policy_lag")


@dataclass(frozen=True)
class Failure:
    """An exception inside a runner, sent home as a value: RLlib would kill the runner and hide the cause."""

    error: UserError | None
    summary: str
    details: str


@dataclass(eq=False)
class Task:
    """One piece of work.

    Attributes:
        name: for messages.
        job: keyword arguments of the runner's method.
        answer: the pending call while queued on a runner.
        since: when it came to the head of that runner's queue, s.
        result: what the runner returned; None until then.
    """

    name: str
    job: Mapping[str, Any]
    failures: int = 0
    answer: Any = None
    since: float = 0.0
    result: Any = None


class Dispatcher:
    """Tasks over the runners of one pool; see the diagram above.

    Args:
        runners: remote ones, or none: then the local one works, when something is collected.
        method: what runners do, called with the job of each task.
        timeout_s: longest a call may take before its runner counts as stalled and is killed.
        restart_timeout_s: longest wait for a first runner to come back when all are dead.
    """

    def __init__(self, runners: RunnerPool, method: str, *, timeout_s: float, restart_timeout_s: float) -> None:
        self.runners, self.method = runners, method
        self.timeout_s, self.restart_timeout_s = timeout_s, restart_timeout_s
        self.waiting: deque[Task] = deque()
        self.queues: dict[int, deque[Task]] = {}
        self.rerun = 0
        self.last_cause = "they died before this iteration"

    def submit(self, tasks: Sequence[Task]) -> None:
        """Order tasks, behind all that wait."""
        self.waiting.extend(tasks)

    def drop(self) -> None:
        """Forget all tasks: what has not begun is cancelled, the results of what runs are ignored."""
        for queue in self.queues.values():
            for task in list(queue)[1:]:
                ray.cancel(task.answer)
        self.waiting.clear()
        self.queues.clear()

    def collect(self, tasks: Sequence[Task]) -> list[Any]:
        """Results of submitted tasks, in order, once all are done.

        Raises:
            UserError: raised by an environment, or all runners dead, or a task that failed too often.
        """
        if self.runners.local is not None:
            for task in tasks:
                self.waiting.remove(task)
                task.result = getattr(self.runners.local, self.method)(**task.job)
        idle_since = time.monotonic()
        while any(task.result is None for task in tasks):
            self._dispatch(1)
            if any(self.queues.values()):
                self._poll()
                idle_since = time.monotonic()
            elif not self.runners.revive():
                self._check_hope(idle_since)
                time.sleep(IDLE_PAUSE_S)
        return [task.result for task in tasks]

    def fill(self) -> None:
        """Hand all waiting tasks to the runners' own queues, evenly: for while the driver is busy elsewhere."""
        healthy = len(self.runners.healthy())
        if healthy and self.waiting:
            self._dispatch(-(-(len(self.waiting) + sum(map(len, self.queues.values()))) // healthy))

    def _dispatch(self, depth: int) -> None:
        """Queue waiting tasks on healthy runners, at most `depth` each, the idle ones first."""
        queues = [(runner, self.queues.setdefault(runner, deque())) for runner in self.runners.healthy()]
        for level in range(depth):
            for runner, queue in queues:
                if len(queue) > level:
                    continue
                if not self.waiting:
                    return
                task = self.waiting.popleft()
                task.answer = self.runners.call(runner, _guarded, method=self.method, job=task.job)
                task.since = time.monotonic()
                queue.append(task)

    def _poll(self) -> None:
        """Wait for a first answer, take all that have arrived, and give up on runners past the timeout."""
        heads = {queue[0].answer: runner for runner, queue in self.queues.items() if queue}
        oldest = min(queue[0].since for queue in self.queues.values() if queue)
        patience = max(0.0, oldest + self.timeout_s - time.monotonic())
        ray.wait(list(heads), num_returns=1, timeout=min(patience, 5.0))
        # Every look costs in proportion to the runners, so with many of them let a few more answers come.
        time.sleep(min(MAX_PAUSE_S, PAUSE_S * len(heads)))
        ready, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0)
        for answer in ready:
            self._receive(heads[answer], answer)
        now = time.monotonic()
        for runner, queue in list(self.queues.items()):
            if queue and now - queue[0].since > self.timeout_s:
                self.runners.kill(runner)
                self._lost(runner, f"runner {runner} gave no answer within {self.timeout_s:g} s")

    def _receive(self, runner: int, answer: Any) -> None:
        """Take the answer of a runner's first task; raise what the user has to fix."""
        try:
            value = ray.get(answer)
        except ray.exceptions.RayError as error:
            self._lost(runner, f"runner {runner} died: {first_line(error)}")
            return
        queue = self.queues[runner]
        task = queue.popleft()
        if queue:
            queue[0].since = time.monotonic()
        if not isinstance(value, Failure):
            task.result = value
        elif value.error is not None:
            raise value.error
        else:
            logger.warning("runner %s failed:\n%s", runner, value.details)
            self._again(task, f"runner {runner} failed: {value.summary}")

    def _lost(self, runner: int, cause: str) -> None:
        """A runner is gone: only its first task had begun, the others wait again behind it."""
        self.runners.mark_dead(runner)
        first, *others = self.queues.pop(runner)
        self.waiting.extendleft(reversed(others))
        self._again(first, cause)

    def _again(self, task: Task, cause: str) -> None:
        logger.warning("%s; its work is run again", cause)
        self.rerun += 1
        task.failures += 1
        self.last_cause = cause
        if task.failures >= MAX_ATTEMPTS:
            raise UserError(f"{task.name} failed {task.failures} times; the last cause: {cause}")
        self.waiting.appendleft(task)

    def _check_hope(self, idle_since: float) -> None:
        """With no runner in service: give up when none can come back or the wait is over."""
        waited = time.monotonic() - idle_since
        if self.runners.restarts and waited < self.restart_timeout_s:
            return
        dead = ", ".join(str(runner) for runner in self.runners.all())
        raise UserError(
            f"all {self.runners.kind} runners are dead (runners {dead}; waited {waited:.0f} s for a restart); last "
            f"cause: {self.runners.start_failure() or self.last_cause}; look at the runners' logs, then resume from "
            "the last checkpoint"
        )


def _guarded(runner: Any, method: str, job: Mapping[str, Any]) -> Any:
    """Run a job inside a runner and send exceptions home as values."""
    try:
        return getattr(runner, method)(**job)
    except UserError as error:
        return Failure(error, str(error), "")
    except Exception as error:
        return Failure(None, f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())


class BehaviorPolicy(NamedTuple):
    """The weights an iteration is sampled under, and how many updates had made them."""

    updates: int
    weights: Any


class Sampler:
    """Complete groups of rollouts, iteration by iteration.

    Args:
        shards: of one iteration; one shard is one reset of all environments of a runner.
        max_policy_lag: iterations that may be under way while an earlier one is learned from.
    """

    def __init__(self, dispatcher: Dispatcher, *, shards: int, group_size: int, max_policy_lag: int) -> None:
        self.dispatcher, self.shards, self.group_size, self.ahead = dispatcher, shards, group_size, max_policy_lag
        self.behavior: dict[int, BehaviorPolicy] = {}
        self.tasks: dict[int, list[Task]] = {}
        self.stats: dict[int, Mapping[str, float]] = {}

    def collect(self, iteration: int, weights: Any) -> tuple[Rollouts, list[Any], dict[str, float]]:
        """Rollouts of an iteration in shard order, RLlib's metrics of all shards, and `COUNTS`.

        Iterations not ordered yet, this one and those ahead of it, are ordered under `weights`, the latest. After any
        exception the next call samples them again, under the same weights.

        Raises:
            UserError: a group that is not complete, or what `Dispatcher.collect` raises.
        """
        rerun = self.dispatcher.rerun
        try:
            self._order(iteration, weights)
            parts = self.dispatcher.collect(self.tasks.pop(iteration))
            self.dispatcher.fill()
        except BaseException:
            self.forget()
            raise
        self.stats |= {part.runner: part.stats for part in parts}
        rollouts = Rollouts.concatenate(parts)
        check_groups(rollouts, self.group_size)
        counts = (self.dispatcher.rerun - rerun, iteration - self.behavior[iteration].updates)
        return rollouts, [part.metrics for part in parts], dict(zip(COUNTS, map(float, counts), strict=True))

    def forget(self) -> None:
        """Drop the tasks under way; the weights they run under are kept for the next `collect`."""
        self.dispatcher.drop()
        self.tasks.clear()

    def _order(self, iteration: int, weights: Any) -> None:
        self.behavior = {number: made for number, made in self.behavior.items() if number >= iteration}
        for number in range(iteration, iteration + self.ahead + 1):
            policy = self.behavior.setdefault(number, BehaviorPolicy(iteration, weights))
            if number in self.tasks:
                continue
            job = {"iteration": number, "shards": self.shards, "weights": policy.weights}
            self.tasks[number] = [
                Task(f"shard {shard} of iteration {number}", job | {"shard": shard}) for shard in range(self.shards)
            ]
            self.dispatcher.submit(self.tasks[number])

    def state(self, iteration: int) -> dict[int, tuple[int, Any]]:
        """What a checkpoint before `iteration` contains: updates and weights of it and the iterations ahead."""
        ahead = {number: made for number, made in self.behavior.items() if number >= iteration}
        return {number: (made.updates, _fetched(made.weights)) for number, made in ahead.items()}

    def restore(self, state: Mapping[int, tuple[int, Any]]) -> None:
        """Drop what is under way; iterations of `state` are sampled under their weights by the next `collect`.

        Those with more lag than allowed (saved with a larger bound) are left out, and so sampled under the latest ones.
        """
        self.forget()
        self.behavior = {
            number: BehaviorPolicy(updates, ray.put(weights) if ray.is_initialized() else weights)
            for number, (updates, weights) in state.items()
            if number - updates <= self.ahead
        }


def check_groups(rollouts: Rollouts, group_size: int) -> None:
    """Prove that consecutive rollouts are complete groups, each about one context.

    Raises:
        UserError: a group with rollouts of another context, or a context that comes twice.
    """
    contexts_NG = np.asarray(rollouts.infos["context"]).reshape(-1, group_size)
    mixed = (contexts_NG != contexts_NG[:, :1]).any(axis=1)
    if mixed.any() or len(np.unique(contexts_NG[:, 0])) < len(contexts_NG):
        raise UserError(
            f"{int(mixed.sum())} of {len(mixed)} groups of {group_size} rollouts are not complete, or a context comes "
            "twice: the environment must repeat each context group_size times in a row; check its group_size"
        )


def summed(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Counters of several engines, added up."""
    return {key: sum(one.get(key, 0.0) for one in stats) for key in sorted({key for one in stats for key in one})}


def _fetched(weights: Any) -> Any:
    return ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
