"""The only file that touches private names of RLlib and Tune. `PRIVATE_NAMES` lists them; a contract test checks each.

They have no public way to ask which runner actors are alive, to call one of them, to kill a learner, to force older
weights on a learner, or to give a restored tuner new callbacks. When a new Ray moves one of these names, the contract
test says which and what it is needed for.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import ray
from ray.rllib.algorithms import algorithm as rllib_algorithm
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.tune import Tuner
from ray.tune.impl.tuner_internal import TunerInternal

from envs.errors import UserError

T = TypeVar("T")
STOP_TIMEOUT_S: Final = 5.0
CALLBACKS: Final = ("on_episode_created", "on_episode_start", "on_episode_step", "on_episode_end", "on_sample_end")
PRIVATE_NAMES: Final = (
    (EnvRunnerGroup, "_worker_manager", "to know which env runners live and to call one of them"),
    (rllib_algorithm, "EnvRunnerGroup", "to bound the time in which env runners start"),
    (EnvRunnerGroup, "_remote_config", "to know the timeouts of a group"),
    (EnvRunnerGroup, "_remote_config_obj_ref", "to send runners their configuration by value"),
    (FaultTolerantActorManager, "actors", "to call one env runner"),
    (FaultTolerantActorManager, "healthy_actor_ids", "to know which env runners live"),
    (FaultTolerantActorManager, "set_actor_state", "to take a dead env runner out of service"),
    (LearnerGroup, "_worker_manager", "to kill a learner that gives no answer"),
    (Learner, "_weights_seq_no", "to restore weights older than the learner's"),
    (Algorithm, "_storage", "to tell whether Tune keeps the results"),
    (Algorithm, "_logdir", "to log to a temporary folder without Tune"),
    (Algorithm, "_setup_logdir", "to log to a temporary folder without Tune"),
    (Algorithm, "_should_create_evaluation_env_runners", "to evaluate without an evaluation interval"),
    (SingleAgentEnvRunner, "_device", "to place observations on the runner's device"),
    (SingleAgentEnvRunner, "_callbacks", "to honour callbacks"),
    (SingleAgentEnvRunner, "_make_on_episode_callback", "to honour callbacks"),
    (SingleAgentEnvRunner, "_increase_sampled_metrics", "to count environment steps and episodes"),
    (Tuner, "_local_tuner", "to give a restored sweep its callbacks and scheduler"),
    (TunerInternal, "_tune_config", "to give a restored sweep its scheduler"),
    (TunerInternal, "get_run_config", "to give a restored sweep its callbacks"),
)
"""(owner, name, what for) of every name used here that Ray does not promise to keep."""


class RunnerPool:
    """The env runners of one RLlib group, as the dispatcher sees them: numbered actors that come and go.

    Args:
        kind: of the runners, for messages.
        restarts: whether Ray starts dead runners again.
    """

    def __init__(self, group: EnvRunnerGroup, kind: str, *, restarts: bool) -> None:
        self.group, self.kind, self.restarts = group, kind, restarts
        self._manager = group._worker_manager

    @property
    def local(self) -> Any:
        """The runner inside the driver when there are no remote ones, else None."""
        return None if self.group.num_remote_env_runners() else self.group.local_env_runner

    def all(self) -> list[int]:
        """Numbers of all remote runners, dead ones included."""
        return list(self._manager.actor_ids())

    def healthy(self) -> list[int]:
        """Numbers of the runners in service."""
        return list(self._manager.healthy_actor_ids())

    def call(self, runner: int, function: Callable[..., Any], **arguments: Any) -> ray.ObjectRef:
        """Queue `function(runner, **arguments)` on a runner."""
        return self._manager.actors()[runner].apply.remote(function, **arguments)

    def kill(self, runner: int) -> None:
        """Kill a runner that hangs; Ray starts it again where restarts are on."""
        ray.kill(self._manager.actors()[runner], no_restart=False)

    def mark_dead(self, runner: int) -> None:
        """Take a runner out of service until `revive` finds it again."""
        self._manager.set_actor_state(runner, healthy=False)

    def revive(self) -> bool:
        """Bring restarted runners back; True when any is in service."""
        # RLlib keeps restarted runners unhealthy until a call to them succeeds.
        return bool(self.group.probe_unhealthy_env_runners()) or bool(self.healthy())

    def start_failure(self) -> str | None:
        """The exception with which a runner started again, and is gone for good; None if there is no such runner."""
        calls = [actor.ping.remote() for actor in self._manager.actors().values()]
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=STOP_TIMEOUT_S)
        for call in ready:
            try:
                ray.get(call)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    return f"a runner could not start again: {cause_of(error)}"
        return None


def write_episodes(episodes: Sequence[SingleAgentEpisode], output: str, name: str) -> None:
    """Write episodes to `output`/`name`.parquet as RLlib records them: `input_read_episodes=True` reads them back.

    Args:
        output: folder, or an address that pyarrow knows, such as s3://bucket/folder.
    """
    import msgpack
    import msgpack_numpy
    import pyarrow as pa
    from pyarrow import fs, parquet

    packed = [msgpack.packb(episode.get_state(), default=msgpack_numpy.encode) for episode in episodes]
    system, folder = fs.FileSystem.from_uri(output if "://" in output else Path(output).absolute().as_uri())
    system.create_dir(folder)
    # Readers that look into the folder meanwhile find complete files only.
    parquet.write_table(pa.table({"item": packed}), f"{folder}/.{name}", filesystem=system)
    system.move(f"{folder}/.{name}", f"{folder}/{name}.parquet")


def stop_runners(group: EnvRunnerGroup | None) -> None:
    """End the remote runners of a group, after a moment to close their environments: RLlib waits for hung ones too."""
    if group is None:
        return
    group.foreach_env_runner(lambda runner: runner.stop(), local_env_runner=False, timeout_seconds=STOP_TIMEOUT_S)
    group._worker_manager.clear()


def kill_learners(group: LearnerGroup) -> None:
    """End all remote learners of a group."""
    for actor in group._worker_manager.actors().values():
        ray.kill(actor)


def each_learner(group: LearnerGroup, ask: Callable[[Any], T]) -> list[T]:
    """What every learner answers; RLlib alone would pass over those that died, or that failed at something earlier."""
    answers = []
    for answer in group.foreach_learner(ask, healthy_only=False, mark_healthy=True):
        if not answer.ok:
            raise answer.get()
        answers.append(answer.get())
    return answers


def force_next_weights(learner: TorchLearner) -> None:
    """Make a learner's next `set_state` take the weights given: RLlib skips those older than its own."""
    learner._weights_seq_no = 0


def replace_restored(tuner: Tuner, *, callbacks: list[Any], scheduler: Any) -> None:
    """Give a restored tuner callbacks and a scheduler in place of those that were pickled with it."""
    tuner._local_tuner.get_run_config().callbacks = callbacks
    tuner._local_tuner._tune_config.scheduler = scheduler


def cause_of(error: BaseException) -> str:
    """The line of a Ray error that names the cause: of an actor that could not start, the exception in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if getattr(error, "actor_init_failed", False):
        return lines[-1]
    named = [line for line in reversed(lines) if "exit" in line or "dead" in line]
    return (named or lines[-1:])[0].split(" Some common causes")[0]


class PromptRunnerGroup(EnvRunnerGroup):
    """RLlib's group, all of whose runners start within the configured timeouts, or the error says which did not.

    RLlib would wait indefinitely for a runner that dies while it starts, and continue without one that fails.
    """

    def add_workers(self, num_workers: int, validate: bool = False) -> None:
        # By value: from arguments lost from the object store Ray restarts no actor, and it warns of that each time.
        self._remote_config_obj_ref = self._remote_config
        super().add_workers(num_workers, validate=False)
        try:
            timeouts = self._remote_config.timeouts
            self._await_start(max(timeouts.sample_timeout_s, timeouts.restart_timeout_s))
        except BaseException:
            for actor in self._worker_manager.actors().values():
                ray.kill(actor)
            raise

    def _await_start(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        calls = {actor.ping.remote(): number for number, actor in self._worker_manager.actors().items()}
        while calls:
            ready, _ = ray.wait(list(calls), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise UserError(
                    f"env runners {', '.join(map(str, sorted(calls.values())))} did not start within {timeout_s:g} s: "
                    "look at the logs of their processes and the cluster's free resources, or raise sample_timeout_s"
                )
            number = calls.pop(ready[0])
            try:
                ray.get(ready[0])
            except ray.exceptions.RayError as error:
                raise UserError(f"env runner {number} could not start: {cause_of(error)}") from error


class QuietAlgorithm(Algorithm):
    """RLlib's algorithm without a folder left in the user's home, and with evaluation runners whenever configured."""

    def setup(self, config: Any) -> None:
        # RLlib does not let an algorithm choose the class of its groups.
        original, rllib_algorithm.EnvRunnerGroup = rllib_algorithm.EnvRunnerGroup, PromptRunnerGroup
        try:
            super().setup(config)
        finally:
            rllib_algorithm.EnvRunnerGroup = original

    def restore_env_runners(self, env_runner_group: EnvRunnerGroup) -> list[int]:
        # RLlib would also send its own state, for up to half an hour; these runners are sent weights with each task.
        return env_runner_group.probe_unhealthy_env_runners()

    @classmethod
    def _should_create_evaluation_env_runners(cls, eval_config: Any) -> bool:
        # `evaluate()` is called by hand as well, so runners for it exist whenever their environment is configured.
        return eval_config.has_evaluation_runners or super()._should_create_evaluation_env_runners(eval_config)

    def _setup_logdir(self) -> None:
        # RLlib would leave an empty folder in the user's home for every algorithm built.
        if self._storage:
            super()._setup_logdir()
        else:
            self._logdir = tempfile.mkdtemp(prefix="grpo-")

    def cleanup(self) -> None:
        for name in ("env_runner_group", "eval_env_runner_group"):
            stop_runners(getattr(self, name, None))
        super().cleanup()
        if not self._storage:
            shutil.rmtree(self._logdir, ignore_errors=True)


class EnvRunnerBase(SingleAgentEnvRunner):
    """RLlib's env runner, with the parts of it that have no public name."""

    @property
    def device(self) -> Any:
        """Where the module is."""
        return self._device

    def is_successor(self) -> bool:
        """Whether Ray started this runner in place of one that died."""
        return bool(self.worker_index) and bool(ray.get_runtime_context().was_current_actor_reconstructed)

    def hand_out_episodes(self, rollouts: Any, name: str) -> None:
        """Finished rollouts as RLlib's episodes: to the configured callbacks, in RLlib's order, and to `output`.

        Episodes are only made when someone asks for them. The observation after the last decision is that of the
        decision.

        Args:
            name: of the file in `output`, the same if these rollouts are made again.
        """
        wanted = self._wants_callbacks()
        if not wanted and not self.config.output:
            return
        episodes = [self._replayed(rollouts, row) for row in range(len(rollouts))]
        if self.config.output:
            write_episodes(episodes, self.config.output, name)
        if wanted:
            make_callback(
                "on_sample_end",
                callbacks_objects=self._callbacks,
                callbacks_functions=self.config.callbacks_on_sample_end,
                kwargs={
                    "env_runner": self,
                    "metrics_logger": self.metrics,
                    "samples": [episode.to_numpy() for episode in episodes],
                },
            )

    def _wants_callbacks(self) -> bool:
        functions = [getattr(self.config, f"callbacks_{name}") for name in CALLBACKS]
        methods = [getattr(type(one), name) for one in self._callbacks for name in CALLBACKS]
        return any(functions) or any(method is not getattr(RLlibCallback, method.__name__) for method in methods)

    def _replayed(self, rollouts: Any, row: int) -> SingleAgentEpisode:
        """One rollout as an RLlib episode, with its callbacks run on the way."""
        spaces = self.env.single_observation_space, self.env.single_action_space
        episode = SingleAgentEpisode(observation_space=spaces[0], action_space=spaces[1])
        place = {row: episode}
        steps = rollouts.actions.shape[1]

        def observation(step: int) -> dict[str, Any]:
            return {key: value[row, min(step, steps - 1)] for key, value in rollouts.obs.items()}

        self._make_on_episode_callback("on_episode_created", row, place)
        episode.add_env_reset(observation(0), {})
        self._make_on_episode_callback("on_episode_start", row, place)
        for step in range(steps):
            last = step == steps - 1
            episode.add_env_step(
                observation(step + 1),
                rollouts.actions[row, step],
                float(rollouts.rewards[row]) if last else 0.0,
                infos={key: value[row] for key, value in rollouts.infos.items()} if last else {},
                terminated=last,
                extra_model_outputs={Columns.ACTION_LOGP: rollouts.log_probs[row, step]},
            )
            self._make_on_episode_callback("on_episode_step", row, place)
        self._make_on_episode_callback("on_episode_end", row, place)
        return episode

    def count_steps(self, steps: int, episodes: int) -> None:
        """Log environment steps and finished episodes under RLlib's usual keys."""
        self._increase_sampled_metrics(steps, episodes)
