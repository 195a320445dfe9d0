"""Rollouts: what an env runner does with one chunk of work, and how chunks are spread over runners that may die.

A chunk is one reset of all of a runner's environments. Its contexts and its random draws are a function
of (seed, round, chunk) and of the weights that come with the request, never of the runner or its past:
a chunk lost with a dead runner is simply run again, anywhere, with the same result.
"""

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from envs.errors import UserError
from policies.baselines import Baseline
from policies.grpo.rl_module import BaselineModule

logger = logging.getLogger(__name__)
MAX_ATTEMPTS: Final = 3
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rollouts:
    """N finished two-step episodes as arrays: steps (N, 2, ...), final infos (N,)."""

    obs: Mapping[str, Array]
    actions: Array
    log_probs: Array
    logits: Array
    rewards: Array
    infos: Mapping[str, Array]
    metrics: Any = None

    def __len__(self) -> int:
        return len(self.actions)

    def take(self, rows: Array) -> "Rollouts":
        """Rows of these rollouts, in the order given."""
        return self._map(lambda array: array[rows])

    def _map(self, change: Callable[[Array], Array]) -> "Rollouts":
        return Rollouts(
            obs={key: change(value) for key, value in self.obs.items()},
            actions=change(self.actions),
            log_probs=change(self.log_probs),
            logits=change(self.logits),
            rewards=change(self.rewards),
            infos={key: change(value) for key, value in self.infos.items()},
        )

    @staticmethod
    def concatenate(parts: Sequence["Rollouts"]) -> "Rollouts":
        """All parts in one, in order."""
        return Rollouts(
            obs={key: np.concatenate([part.obs[key] for part in parts]) for key in parts[0].obs},
            actions=np.concatenate([part.actions for part in parts]),
            log_probs=np.concatenate([part.log_probs for part in parts]),
            logits=np.concatenate([part.logits for part in parts]),
            rewards=np.concatenate([part.rewards for part in parts]),
            infos={key: np.concatenate([part.infos[key] for part in parts]) for key in parts[0].infos},
        )


@dataclass(frozen=True)
class Failure:
    """An exception inside a runner, sent home as a value: RLlib would kill the runner and hide the cause."""

    error: UserError | None
    summary: str
    details: str


class RolloutRunner(SingleAgentEnvRunner):
    """RLlib's env runner, working in chunks."""

    module: Any

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        if kwargs.get("worker_index"):
            torch.set_num_threads(config.runner_threads)
        super().__init__(config=config, **kwargs)

    def load_weights(self, weights: Any) -> None:
        """Take the controller's weights, whatever their age.

        Args:
            weights: the module's state, or a reference to it in the object store.
        """
        state = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
        self.module.set_state(state)

    def sample_chunk(self, *, round_number: int, chunk: int, chunks: int, attempt: int, weights: Any) -> Rollouts:
        """Roll out one chunk of a training round under the given weights."""
        self.load_weights(weights)
        environment = self.env.unwrapped
        environment.set_worker(chunk, chunks)
        environment.set_round(round_number)
        torch.manual_seed(_seed(self.config.seed, round_number, chunk, attempt))
        return _pack(self.sample(explore=True), self.get_metrics())

    def run_contexts(
        self, *, contexts: Sequence[Any], first: int, weights: Any, baseline: Baseline | None
    ) -> list[dict[str, float]]:
        """Act greedily (or by a baseline) once in each context; one row of final infos per context.

        Args:
            contexts: at most as many as this runner has environments.
            first: index of the first of them in the whole evaluation, added to each row's `context`.
        """
        environment = self.env.unwrapped
        environment.set_contexts(list(contexts))
        environment.set_worker(0, 1)
        environment.set_round(0)
        trained = self.module
        try:
            if baseline is None:
                self.load_weights(weights)
            else:
                self.module = BaselineModule(baseline, (first,), trained)
            rollouts = _pack(self.sample(explore=False), self.get_metrics(), with_logits=False)
        finally:
            self.module = trained
        return _rows(rollouts, first, len(contexts))


def _seed(*parts: int | None) -> int:
    """A well mixed 63-bit seed from integers."""
    entropy = [int(part or 0) for part in parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _pack(episodes: Sequence[Any], metrics: Any, *, with_logits: bool = True) -> Rollouts:
    """RLlib's episodes as arrays; numeric scalars of the final infos are kept.

    Raises:
        RuntimeError: episodes that have not ended, or not after the same number of steps.
    """
    steps = {len(episode) for episode in episodes}
    if len(steps) != 1 or not all(episode.is_terminated for episode in episodes):
        raise RuntimeError(f"episodes of {sorted(steps)} steps: every rollout must end after the same number of steps")
    window = slice(0, steps.pop())
    observations = [episode.get_observations(window) for episode in episodes]
    finals = [episode.get_infos(-1) for episode in episodes]
    keys = [key for key, value in finals[0].items() if np.isscalar(value) or np.ndim(value) == 0]
    keys = [key for key in keys if np.issubdtype(np.asarray(finals[0][key]).dtype, np.number)]

    def outputs(column: str, width: tuple[int, ...]) -> Array:
        if not with_logits:
            return np.zeros((len(episodes), window.stop, *width), np.float32)
        return np.stack([episode.get_extra_model_outputs(column) for episode in episodes])

    return Rollouts(
        obs={key: np.stack([obs[key] for obs in observations]) for key in observations[0]},
        actions=np.stack([episode.get_actions() for episode in episodes]),
        log_probs=outputs(Columns.ACTION_LOGP, ()),
        logits=outputs(Columns.ACTION_DIST_INPUTS, (0,)),
        rewards=np.array([episode.get_return() for episode in episodes], np.float64),
        infos={key: np.array([final[key] for final in finals]) for key in keys},
        metrics=metrics,
    )


def _rows(rollouts: Rollouts, first: int, count: int) -> list[dict[str, float]]:
    """One dict per context 0..count-1 of the chunk, surplus and repeated environments dropped."""
    rows: dict[int, dict[str, float]] = {}
    for index, context in enumerate(rollouts.infos["context"].tolist()):
        if 0 <= context < count and context not in rows:
            row = {key: value[index].item() for key, value in rollouts.infos.items()}
            row["context"] = first + context
            row["log_ratio"] = float(rollouts.obs["budget"][index, 0, 0])
            row["reward"] = float(rollouts.rewards[index])
            rows[context] = row
    return [rows[context] for context in sorted(rows)]


@dataclass
class JobReport:
    """What happened while chunks were spread."""

    rerun: int = 0
    causes: tuple[str, ...] = ()


def run_jobs(
    group: EnvRunnerGroup,
    method: str,
    jobs: Sequence[Mapping[str, Any]],
    *,
    timeout_s: float,
    restart_timeout_s: float,
    restore: Callable[[EnvRunnerGroup], Sequence[int]],
) -> tuple[list[Any], JobReport]:
    """Call `method` once per job on the runners of a group, re-running what is lost; results in the order of the jobs.

    Args:
        jobs: keyword arguments of each call.
        timeout_s: longest a call may take before its runner counts as stalled and is killed.
        restart_timeout_s: longest to wait for a first runner to come back when all are dead.
        restore: brings restarted runners back into service, returns their ids.

    Raises:
        UserError: raised by an environment, or all runners dead, or one job failing too often.
    """
    if group.num_remote_env_runners() == 0:
        return [getattr(group.local_env_runner, method)(**job) for job in jobs], JobReport()
    return _Spread(group, method, jobs, (timeout_s, restart_timeout_s), restore).run()


class _Spread:
    """One pass of `run_jobs` over remote runners: each healthy runner holds one job at a time."""

    def __init__(
        self,
        group: EnvRunnerGroup,
        method: str,
        jobs: Sequence[Mapping[str, Any]],
        timeouts_s: tuple[float, float],
        restore: Callable[[EnvRunnerGroup], Sequence[int]],
    ) -> None:
        self.group, self.method, self.jobs = group, method, jobs
        self.timeout_s, self.restart_timeout_s = timeouts_s
        self.restore = restore
        self.manager = group._worker_manager
        self.waiting = deque(range(len(jobs)))
        self.running: dict[Any, tuple[int, int, float]] = {}
        self.results: dict[int, Any] = {}
        self.attempts = [0] * len(jobs)
        self.report = JobReport()

    def run(self) -> tuple[list[Any], JobReport]:
        idle_since = time.monotonic()
        while len(self.results) < len(self.jobs):
            self._dispatch()
            if self.running:
                self._collect()
                idle_since = time.monotonic()
            elif not self._revive(idle_since):
                time.sleep(0.2)
        return [self.results[index] for index in range(len(self.jobs))], self.report

    def _dispatch(self) -> None:
        """Give every idle healthy runner one waiting job."""
        busy = {runner for _, runner, _ in self.running.values()}
        actors = self.manager.actors()
        for runner in self.manager.healthy_actor_ids():
            if not self.waiting:
                return
            if runner in busy:
                continue
            index = self.waiting.popleft()
            self.attempts[index] += 1
            call = actors[runner].apply.remote(_guarded, method=self.method, job=self.jobs[index])
            self.running[call] = (index, runner, time.monotonic())

    def _collect(self) -> None:
        """Wait for a first answer, take all that are ready, and give up on runners past the timeout."""
        oldest = min(started for _, _, started in self.running.values())
        patience = max(0.0, oldest + self.timeout_s - time.monotonic())
        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=min(patience, 5.0))
        for call in ready:
            index, runner, _ = self.running.pop(call)
            try:
                answer = ray.get(call)
            except ray.exceptions.RayError as error:
                self.manager.set_actor_state(runner, healthy=False)
                self._lost(index, f"runner {runner} died: {_first_line(error)}")
                continue
            if not isinstance(answer, Failure):
                self.results[index] = answer
            elif answer.error is not None:
                raise answer.error
            else:
                logger.warning("runner %s failed:\n%s", runner, answer.details)
                self._lost(index, f"runner {runner} failed: {answer.summary}")
        now = time.monotonic()
        for call, (index, runner, started) in list(self.running.items()):
            if now - started > self.timeout_s:
                del self.running[call]
                ray.kill(self.manager.actors()[runner], no_restart=False)
                self.manager.set_actor_state(runner, healthy=False)
                self._lost(index, f"runner {runner} gave no answer within {self.timeout_s:g} s")

    def _lost(self, index: int, cause: str) -> None:
        logger.warning("%s; its work is run again", cause)
        self.report.rerun += 1
        self.report.causes = (*self.report.causes, cause)
        if self.attempts[index] >= MAX_ATTEMPTS:
            raise UserError(
                f"chunk {index} of {len(self.jobs)} failed {self.attempts[index]} times; the last cause: {cause}"
            )
        self.waiting.appendleft(index)

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
        last = self.report.causes[-1] if self.report.causes else "they died before this round"
        raise UserError(
            f"all env runners are dead (runners {dead}; waited {waited:.0f} s for a restart); last cause: {last}; "
            "look at the runners' logs, then resume from the last checkpoint"
        )


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
