"""How chunks of work are spread over env runners that may die: each chunk is done once, whatever happens to runners.

A `Spread` holds the work that was ordered: waiting, in the queues of the runners, or done and not yet collected.
Nothing runs in the driver's background: while it learns, runners work off the queues it left them with (`fill`).
"""

import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from envs.errors import UserError

logger = logging.getLogger(__name__)
MAX_ATTEMPTS: Final = 3
STOP_TIMEOUT_S: Final = 5.0
PAUSE_S: Final = 0.0005
MOST_PAUSE_S: Final = 0.2


@dataclass(frozen=True)
class Failure:
    """An exception inside a runner, sent home as a value: RLlib would kill the runner and hide the cause."""

    error: UserError | None
    summary: str
    details: str


@dataclass
class _Call:
    """One piece of work in a runner's queue; `since` is when it came to the head of it, seconds."""

    key: Hashable
    answer: Any
    since: float


class Spread:
    """Work over the runners of one group.

    Args:
        group: remote runners, or none: then the local one works, when something is collected.
        method: what runners do, called with the keyword arguments of each piece of work.
        timeout_s: longest a call may take before its runner counts as stalled and is killed.
        restart_timeout_s: longest to wait for a first runner to come back when all are dead.
        restore: brings restarted runners back into service, returns their ids.
    """

    def __init__(
        self,
        group: EnvRunnerGroup,
        method: str,
        *,
        timeout_s: float,
        restart_timeout_s: float,
        restore: Callable[[EnvRunnerGroup], Sequence[int]],
    ) -> None:
        self.group, self.method, self.restore = group, method, restore
        self.timeout_s, self.restart_timeout_s = timeout_s, restart_timeout_s
        self.manager = group._worker_manager
        self.drop()

    def drop(self) -> None:
        """Forget all work: what has not begun is cancelled, what runs ends for nobody."""
        for queue in getattr(self, "queues", {}).values():
            for call in list(queue)[1:]:
                ray.cancel(call.answer)
        self.jobs: dict[Hashable, Mapping[str, Any]] = {}
        self.waiting: deque[Hashable] = deque()
        self.queues: dict[int, deque[_Call]] = {}
        self.results: dict[Hashable, Any] = {}
        self.failures: Counter[Hashable] = Counter()
        self.rerun = 0
        self.last_cause = "they died before this round"

    def add(self, key: Hashable, job: Mapping[str, Any], *, first: bool = False) -> None:
        """Order one piece of work; with `first` before all that waits."""
        self.jobs[key] = job
        (self.waiting.appendleft if first else self.waiting.append)(key)

    def collect(self, keys: Sequence[Hashable]) -> list[Any]:
        """Results of `keys`, in their order, once all are there; what is lost on the way is run again.

        Raises:
            UserError: raised by an environment, or all runners dead, or one piece of work failing too often.
        """
        if self.group.num_remote_env_runners() == 0:
            self.waiting.clear()
            return [getattr(self.group.local_env_runner, self.method)(**self.jobs.pop(key)) for key in keys]
        idle_since = time.monotonic()
        while any(key not in self.results for key in keys):
            self._dispatch(1)
            if any(self.queues.values()):
                self._gather()
                idle_since = time.monotonic()
            elif not self._revive(idle_since):
                time.sleep(0.2)
        for key in keys:
            del self.jobs[key]
        return [self.results.pop(key) for key in keys]

    def fill(self) -> None:
        """Hand all waiting work to the runners' own queues, evenly: for while the driver is busy elsewhere."""
        alive = self.manager.num_healthy_actors()
        if alive and self.waiting:
            self._dispatch(-(-(len(self.waiting) + sum(map(len, self.queues.values()))) // alive))

    def _dispatch(self, depth: int) -> None:
        """Queue waiting work on healthy runners, at most `depth` each, the idle ones first."""
        actors, now = self.manager.actors(), time.monotonic()
        queues = [(runner, self.queues.setdefault(runner, deque())) for runner in self.manager.healthy_actor_ids()]
        for level in range(depth):
            for runner, queue in queues:
                if len(queue) > level:
                    continue
                if not self.waiting:
                    return
                key = self.waiting.popleft()
                answer = actors[runner].apply.remote(_guarded, method=self.method, job=self.jobs[key])
                queue.append(_Call(key, answer, now))

    def _gather(self) -> None:
        """Wait for a first answer, take all that are there, and give up on runners past the timeout."""
        heads = {queue[0].answer: runner for runner, queue in self.queues.items() if queue}
        oldest = min(queue[0].since for queue in self.queues.values() if queue)
        patience = max(0.0, oldest + self.timeout_s - time.monotonic())
        ray.wait(list(heads), num_returns=1, timeout=min(patience, 5.0))
        # Every look costs in proportion to the runners, so with many of them let a few more answers come.
        time.sleep(min(MOST_PAUSE_S, PAUSE_S * len(heads)))
        ready, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0)
        for answer in ready:
            self._receive(heads[answer], answer)
        now = time.monotonic()
        for runner, queue in list(self.queues.items()):
            if queue and now - queue[0].since > self.timeout_s:
                ray.kill(self.manager.actors()[runner], no_restart=False)
                self._lost(runner, f"runner {runner} gave no answer within {self.timeout_s:g} s")

    def _receive(self, runner: int, answer: Any) -> None:
        """Take the answer of a runner's first call; raise what is the user's to mend."""
        try:
            value = ray.get(answer)
        except ray.exceptions.RayError as error:
            self._lost(runner, f"runner {runner} died: {_first_line(error)}")
            return
        queue = self.queues[runner]
        key = queue.popleft().key
        if queue:
            queue[0].since = time.monotonic()
        if not isinstance(value, Failure):
            self.results[key] = value
        elif value.error is not None:
            raise value.error
        else:
            logger.warning("runner %s failed:\n%s", runner, value.details)
            self._again(key, f"runner {runner} failed: {value.summary}")

    def _lost(self, runner: int, cause: str) -> None:
        """A runner is gone: only its first piece of work had begun, the others wait again behind it."""
        self.manager.set_actor_state(runner, healthy=False)
        first, *others = [call.key for call in self.queues.pop(runner)]
        self.waiting.extendleft(reversed(others))
        self._again(first, cause)

    def _again(self, key: Hashable, cause: str) -> None:
        logger.warning("%s; its work is run again", cause)
        self.rerun += 1
        self.failures[key] += 1
        self.last_cause = cause
        if self.failures[key] >= MAX_ATTEMPTS:
            raise UserError(f"{key} failed {self.failures[key]} times; the last cause: {cause}")
        self.waiting.appendleft(key)

    def _revive(self, idle_since: float) -> bool:
        """With no runner at work: bring restarted ones back, or give up when none can or the wait is over."""
        if self.restore(self.group):
            return True
        # RLlib keeps restarted runners unhealthy until a call to them succeeds.
        if self.manager.healthy_actor_ids():
            return True
        waited = time.monotonic() - idle_since
        if self.group._remote_config.restart_failed_env_runners and waited < self.restart_timeout_s:
            return False
        dead = ", ".join(str(runner) for runner in self.manager.actor_ids())
        raise UserError(
            f"all env runners are dead (runners {dead}; waited {waited:.0f} s for a restart); last cause: "
            f"{self.last_cause}; look at the runners' logs, then resume from the last checkpoint"
        )


def stop_runners(group: EnvRunnerGroup | None) -> None:
    """End the remote runners of a group, after a moment to close their environments: RLlib waits for hung ones too."""
    if group is None:
        return
    group.foreach_env_runner(lambda runner: runner.stop(), local_env_runner=False, timeout_seconds=STOP_TIMEOUT_S)
    group._worker_manager.clear()


@contextmanager
def startup_errors() -> Iterator[None]:
    """Say why no runner could start: RLlib only logs it, then stumbles over the empty group.

    Raises:
        UserError: with the first cause RLlib logged.
    """
    causes: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            causes.append(record.getMessage())

    listener = Listener(logging.ERROR)
    sources = [logging.getLogger(f"ray.rllib.{name}") for name in ("utils.actor_manager", "env.env_runner_group")]
    for source in sources:
        source.addHandler(listener)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not causes:
            raise
        raise UserError(f"no env runner could start: {_last_line(causes[0])}") from error
    finally:
        for source in sources:
            source.removeHandler(listener)


def _guarded(runner: Any, method: str, job: Mapping[str, Any]) -> Any:
    """Run a job inside a runner and send exceptions home as values."""
    try:
        return getattr(runner, method)(**job)
    except UserError as error:
        return Failure(error, str(error), "")
    except Exception as error:
        return Failure(None, f"{type(error).__name__}: {_first_line(error)}", traceback.format_exc())


def _last_line(text: str) -> str:
    """The line of a Ray error that names the exception, without Ray's trailing remark."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].split("), taking actor")[0]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
