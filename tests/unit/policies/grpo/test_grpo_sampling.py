"""Tasks over runners, without Ray: runners that answer, hang or die when the test says so."""

import time
from collections import Counter, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from envs.errors import UserError
from policies.grpo import sampling as module
from policies.grpo.env_runner import Rollouts
from policies.grpo.sampling import MAX_ATTEMPTS, BehaviorPolicy, Dispatcher, Failure, Sampler, Task, check_groups


class Runners:
    """Runners with queues of calls, in place of the pool of RLlib's actors."""

    local = None
    kind = "env"
    restarts = True

    def __init__(self, runners: int) -> None:
        self.in_service = set(range(1, runners + 1))
        self.queues: dict[int, deque[int]] = {runner: deque() for runner in self.in_service}
        self.calls: list[tuple[int, Any]] = []
        self.answers: dict[int, Any] = {}
        self.hung: set[int] = set()
        self.cancelled: list[Any] = []
        self.killed: list[int] = []

    # What the dispatcher asks of the pool.

    def all(self) -> list[int]:
        return list(self.queues)

    def healthy(self) -> list[int]:
        return sorted(self.in_service)

    def call(self, runner: int, function: Any, *, method: str, job: Any) -> int:
        self.calls.append((runner, job["what"]))
        self.queues[runner].append(len(self.calls) - 1)
        return len(self.calls) - 1

    def kill(self, runner: int) -> None:
        self.killed.append(runner)

    def mark_dead(self, runner: int) -> None:
        self.in_service.discard(runner)

    def revive(self) -> bool:
        return bool(self.in_service)

    def start_failure(self) -> None:
        return None

    # What the dispatcher asks of Ray.

    def wait(self, calls: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        if timeout:
            time.sleep(0.01)
            for runner in self.in_service - self.hung:
                self.work(runner)
        ready = [call for call in calls if call in self.answers]
        return ready, [call for call in calls if call not in self.answers]

    def work(self, runner: int) -> None:
        """The runner answers its first call."""
        if self.queues[runner]:
            call = self.queues[runner].popleft()
            self.answers.setdefault(call, f"done {self.calls[call][1]}")

    def die(self, runner: int) -> None:
        """All that is in the runner's queue is lost."""
        for call in self.queues[runner]:
            self.answers[call] = ray.exceptions.RayActorError()
        self.queues[runner].clear()

    def get(self, call: int) -> Any:
        answer = self.answers[call]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> Runners:
    made = Runners(3)
    stand_in = SimpleNamespace(
        wait=made.wait,
        get=made.get,
        cancel=lambda call: made.cancelled.append(made.calls[call][1]),
        exceptions=ray.exceptions,
    )
    monkeypatch.setattr(module, "ray", stand_in)
    return made


def dispatched(runners: Runners, work: int, **changes: Any) -> tuple[Dispatcher, list[Task]]:
    settings: dict[str, Any] = {"timeout_s": 60.0, "restart_timeout_s": 0.0}
    dispatcher = Dispatcher(runners, "sample", **(settings | changes))  # type: ignore[arg-type]
    tasks = [Task(f"task {number}", {"what": number}) for number in range(work)]
    dispatcher.submit(tasks)
    return dispatcher, tasks


def test_results_come_in_the_order_asked_for(runners: Runners) -> None:
    dispatcher, tasks = dispatched(runners, 7)
    assert dispatcher.collect([tasks[index] for index in (5, 0, 3)]) == ["done 5", "done 0", "done 3"]
    assert dispatcher.collect([tasks[index] for index in (6, 1, 2, 4)]) == ["done 6", "done 1", "done 2", "done 4"]
    assert sorted(what for _, what in runners.calls) == list(range(7))
    assert dispatcher.rerun == 0


def test_waiting_tasks_are_handed_out_evenly_before_the_driver_leaves(runners: Runners) -> None:
    dispatcher, _ = dispatched(runners, 7)
    dispatcher.fill()
    assert sorted(map(len, runners.queues.values())) == [2, 2, 3]
    assert not dispatcher.waiting
    dispatcher.fill()
    assert len(runners.calls) == 7


def test_of_a_dead_runners_queue_only_the_first_had_begun(runners: Runners) -> None:
    dispatcher, tasks = dispatched(runners, 9)
    dispatcher.fill()
    lost = [what for runner, what in runners.calls if runner == 2]
    runners.die(2)
    assert dispatcher.collect(tasks) == [f"done {number}" for number in range(9)]
    again = [what for _, what in runners.calls[9:]]
    assert again == lost
    assert dispatcher.rerun == 1
    assert Counter(task.failures for task in tasks) == {0: 8, 1: 1}
    assert tasks[lost[0]].failures == 1
    assert runners.in_service == {1, 3}


def test_a_runner_that_hangs_is_killed_and_its_work_done_by_another(runners: Runners) -> None:
    runners.hung = {1}
    dispatcher, tasks = dispatched(runners, 3, timeout_s=0.3)
    dispatcher.collect(tasks)
    assert runners.killed == [1]
    assert 1 not in runners.in_service
    assert "runner 1 gave no answer within 0.3 s" in dispatcher.last_cause


def test_work_that_always_fails_is_given_up_with_its_cause(runners: Runners) -> None:
    dispatcher, tasks = dispatched(runners, 1)
    for call in range(MAX_ATTEMPTS):
        runners.answers[call] = Failure(None, "ValueError: a bug", "")
    cause = r"^task 0 failed 3 times; the last cause: runner \d failed: ValueError: a bug$"
    with pytest.raises(UserError, match=cause):
        dispatcher.collect(tasks)


def test_what_the_user_has_to_fix_reaches_the_user(runners: Runners) -> None:
    dispatcher, tasks = dispatched(runners, 1)
    runners.answers[0] = Failure(UserError("replace the image"), "", "")
    with pytest.raises(UserError, match="replace the image"):
        dispatcher.collect(tasks)


def test_dropped_work_is_cancelled_unless_it_runs_and_forgotten(runners: Runners) -> None:
    dispatcher, _ = dispatched(runners, 9)
    dispatcher.fill()
    dispatcher.drop()
    assert sorted(runners.cancelled) == [3, 4, 5, 6, 7, 8]
    new = Task("new", {"what": "new"})
    dispatcher.submit([new])
    assert dispatcher.collect([new]) == ["done new"]


def test_all_runners_dead_is_an_error_with_the_last_cause(runners: Runners) -> None:
    dispatcher, tasks = dispatched(runners, 3)
    dispatcher.fill()
    for runner in (1, 2, 3):
        runners.die(runner)
    with pytest.raises(UserError, match=r"all env runners are dead \(runners 1, 2, 3.*last cause: runner \d died"):
        dispatcher.collect(tasks)


def rollouts(contexts: list[int]) -> Rollouts:
    zeros = np.zeros(len(contexts))
    return Rollouts({}, zeros, zeros, zeros, zeros, {"context": np.array(contexts)})


class Recorder:
    """In place of a dispatcher: records what is ordered, and raises once when asked to."""

    def __init__(self) -> None:
        self.rerun, self.dropped, self.ordered = 0, 0, []
        self.error: BaseException | None = None

    def submit(self, tasks: list[Task]) -> None:
        self.ordered += [(task.job["iteration"], task.job["shard"], task.job["weights"]) for task in tasks]

    def collect(self, tasks: list[Task]) -> list[Rollouts]:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return [rollouts([2 * task.job["shard"], 2 * task.job["shard"]]) for task in tasks]

    def fill(self) -> None:
        pass

    def drop(self) -> None:
        self.dropped += 1


def sampler(lag: int) -> tuple[Sampler, Recorder]:
    recorder = Recorder()
    return Sampler(recorder, shards=1, group_size=2, max_policy_lag=lag), recorder  # type: ignore[arg-type]


def test_iterations_ahead_are_sampled_under_the_weights_of_their_order() -> None:
    made, recorder = sampler(lag=1)
    lags = [made.collect(number, f"weights {number}")[2]["policy_lag"] for number in range(3)]
    assert lags == [0.0, 1.0, 1.0]
    assert recorder.ordered == [
        (0, 0, "weights 0"), (1, 0, "weights 0"), (2, 0, "weights 1"), (3, 0, "weights 2"),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [UserError("broken image"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_after_an_error_the_same_iterations_are_ordered_again_under_the_same_weights(error: BaseException) -> None:
    made, recorder = sampler(lag=1)
    made.collect(0, "weights 0")
    recorder.error = error
    with pytest.raises(type(error)):
        made.collect(1, "weights 1")
    recorder.ordered.clear()
    made.collect(1, "weights 1")
    assert recorder.dropped == 1
    assert recorder.ordered == [(1, 0, "weights 0"), (2, 0, "weights 1")]


def test_an_iteration_can_be_collected_again_under_its_weights() -> None:
    made, recorder = sampler(lag=1)
    made.collect(0, "weights 0")
    made.collect(1, "weights 1")
    made.collect(1, "weights 1")
    assert recorder.ordered[-1] == (1, 0, "weights 0")


def test_a_checkpoint_contains_the_weights_of_iterations_under_way() -> None:
    made, recorder = sampler(lag=1)
    made.collect(0, "weights 0")
    assert made.state(1) == {1: (0, "weights 0")}
    again, recorder = sampler(lag=1)
    again.restore(made.state(1))
    again.collect(1, "weights 1")
    assert recorder.ordered == [(1, 0, "weights 0"), (2, 0, "weights 1")]
    synchronous, _ = sampler(lag=0)
    synchronous.restore({1: (0, "weights 0"), 2: (2, "weights 2")})
    assert synchronous.behavior == {2: BehaviorPolicy(2, "weights 2")}


@pytest.mark.parametrize("contexts", [[1, 1, 2, 3], [1, 1, 1, 1], [1, 2, 1, 2]])
def test_groups_that_are_not_complete_are_refused(contexts: list[int]) -> None:
    check_groups(rollouts([1, 1, 2, 2]), 2)
    with pytest.raises(UserError, match="groups of 2 rollouts are not complete"):
        check_groups(rollouts(contexts), 2)
