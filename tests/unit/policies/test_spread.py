"""Work over runners, without Ray: a world of runners that answer, hang or die when the test says so."""

import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from envs.errors import UserError
from policies.grpo import spread as module
from policies.grpo.spread import MAX_ATTEMPTS, Failure, Spread


class World:
    """Runners with queues of calls, in place of Ray's actors and of RLlib's group and manager of them."""

    def __init__(self, runners: int) -> None:
        self.healthy = set(range(1, runners + 1))
        self.queues: dict[int, deque[int]] = {runner: deque() for runner in self.healthy}
        self.calls: list[tuple[int, Any]] = []
        self.answers: dict[int, Any] = {}
        self.hung: set[int] = set()
        self.cancelled: list[Any] = []
        self.killed: list[int] = []
        self._worker_manager = self
        self._remote_config = SimpleNamespace(restart_failed_env_runners=True)

    # What Spread asks of group and manager.

    def num_remote_env_runners(self) -> int:
        return len(self.queues)

    def actors(self) -> dict[int, Any]:
        return {runner: SimpleNamespace(apply=SimpleNamespace(remote=self._caller(runner))) for runner in self.queues}

    def actor_ids(self) -> list[int]:
        return list(self.queues)

    def healthy_actor_ids(self) -> list[int]:
        return sorted(self.healthy)

    def num_healthy_actors(self) -> int:
        return len(self.healthy)

    def set_actor_state(self, runner: int, *, healthy: bool) -> None:
        self.healthy.discard(runner)

    def _caller(self, runner: int) -> Any:
        def remote(function: Any, *, method: str, job: Any) -> int:
            self.calls.append((runner, job["what"]))
            self.queues[runner].append(len(self.calls) - 1)
            return len(self.calls) - 1

        return remote

    # What Spread asks of Ray.

    def wait(self, calls: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        if timeout:
            time.sleep(0.01)
            for runner in self.healthy - self.hung:
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

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        self.killed.append(len(self.killed))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(3)
    stand_in = SimpleNamespace(
        wait=made.wait,
        get=made.get,
        kill=made.kill,
        cancel=lambda call: made.cancelled.append(made.calls[call][1]),
        exceptions=ray.exceptions,
    )
    monkeypatch.setattr(module, "ray", stand_in)
    return made


def spread(world: World, work: int, **changes: Any) -> Spread:
    settings: dict[str, Any] = {"timeout_s": 60.0, "restart_timeout_s": 0.0, "restore": lambda _: []}
    made = Spread(world, "sample", **(settings | changes))  # type: ignore[arg-type]
    for key in range(work):
        made.add(key, {"what": key})
    return made


def test_results_come_in_the_order_asked_for(world: World) -> None:
    made = spread(world, 7)
    assert made.collect([5, 0, 3]) == ["done 5", "done 0", "done 3"]
    assert made.collect([6, 1, 2, 4]) == ["done 6", "done 1", "done 2", "done 4"]
    assert sorted(what for _, what in world.calls) == list(range(7))
    assert made.rerun == 0
    assert not made.jobs


def test_waiting_work_is_handed_out_evenly_before_the_driver_leaves(world: World) -> None:
    made = spread(world, 7)
    made.fill()
    assert sorted(map(len, world.queues.values())) == [2, 2, 3]
    assert not made.waiting
    made.fill()
    assert len(world.calls) == 7


def test_of_a_dead_runners_queue_only_the_first_had_begun(world: World) -> None:
    made = spread(world, 9)
    made.fill()
    lost = [what for runner, what in world.calls if runner == 2]
    world.die(2)
    assert made.collect(list(range(9))) == [f"done {key}" for key in range(9)]
    again = [what for _, what in world.calls[9:]]
    assert again == lost
    assert made.rerun == 1
    assert dict(made.failures) == {lost[0]: 1}
    assert world.healthy == {1, 3}


def test_urgent_work_goes_first(world: World) -> None:
    made = spread(world, 6)
    made.add("urgent", {"what": "urgent"}, first=True)
    made.collect(["urgent"])
    assert world.calls[0][1] == "urgent"


def test_a_runner_that_hangs_is_killed_and_its_work_done_by_another(world: World) -> None:
    world.hung = {1}
    made = spread(world, 3, timeout_s=0.3)
    made.collect([0, 1, 2])
    assert world.killed
    assert 1 not in world.healthy
    assert "runner 1 gave no answer within 0.3 s" in made.last_cause


def test_work_that_always_fails_is_given_up_with_its_cause(world: World) -> None:
    made = spread(world, 1)
    for call in range(MAX_ATTEMPTS):
        world.answers[call] = Failure(None, "ValueError: a bug", "")
    with pytest.raises(UserError, match=r"^0 failed 3 times; the last cause: runner \d failed: ValueError: a bug$"):
        made.collect([0])


def test_what_is_the_users_to_mend_reaches_the_user(world: World) -> None:
    made = spread(world, 1)
    world.answers[0] = Failure(UserError("replace the image"), "", "")
    with pytest.raises(UserError, match="replace the image"):
        made.collect([0])


def test_dropped_work_is_cancelled_unless_it_runs_and_forgotten(world: World) -> None:
    made = spread(world, 9)
    made.fill()
    made.drop()
    assert sorted(world.cancelled) == [3, 4, 5, 6, 7, 8]
    made.add("new", {"what": "new"})
    assert made.collect(["new"]) == ["done new"]


def test_all_runners_dead_is_an_error_with_the_last_cause(world: World) -> None:
    made = spread(world, 3)
    made.fill()
    for runner in (1, 2, 3):
        world.die(runner)
    with pytest.raises(UserError, match=r"all env runners are dead \(runners 1, 2, 3.*last cause: runner \d died"):
        made.collect([0, 1, 2])
