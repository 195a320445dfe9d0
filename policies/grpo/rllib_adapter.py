"""The only file that touches private names of Ray and RLlib. `PRIVATE_NAMES` lists them; a contract test checks each.

Ray has no public way to ask which runner actors are alive, to call one of them, to kill a learner, or to force older
weights on a learner. When a new Ray moves one of these names, the contract test says which and what it is needed for.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import ray
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

from envs.errors import UserError

T = TypeVar("T")
STOP_TIMEOUT_S: Final = 5.0
CALLBACKS: Final = (
    "on_episode_created",
    "on_episode_start",
    "on_episode_step",
    "on_episode_end",
    "on_sample_end",
)
ERROR_LOGGERS: Final = ("ray.rllib.utils.actor_manager", "ray.rllib.env.env_runner_group")
PRIVATE_NAMES: Final = (
    (EnvRunnerGroup, "_worker_manager", "to know which env runners live and to call one of them"),
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
)
"""(owner, name, what for) of every name used here that Ray does not promise to keep."""


class RunnerPool:
    """The env runners of one RLlib group, as the dispatcher sees them: numbered actors that come and go.

    Args:
        restarts: whether Ray starts dead runners again.
        restore: brings restarted runners back into service and returns their numbers.
    """

    def __init__(self, group: EnvRunnerGroup, *, restarts: bool, restore: Callable[[EnvRunnerGroup], Any]) -> None:
        self.group, self.restarts, self._restore = group, restarts, restore
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
        return bool(self._restore(self.group)) or bool(self.healthy())


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
    sources = [logging.getLogger(name) for name in ERROR_LOGGERS]
    for source in sources:
        source.addHandler(listener)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not causes:
            raise
        lines = [line.strip() for line in causes[0].splitlines() if line.strip()]
        # The last line of a Ray error names the exception, followed by Ray's own remark.
        raise UserError(f"no env runner could start: {lines[-1].split('), taking actor')[0]}") from error
    finally:
        for source in sources:
            source.removeHandler(listener)


class QuietAlgorithm(Algorithm):
    """RLlib's algorithm without a folder left in the user's home, and with evaluation runners whenever configured."""

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

    def make_callbacks(self, rollouts: Any) -> None:
        """Run the configured episode and sample callbacks on finished rollouts, in the order in which RLlib would.

        Episodes are only made when a callback is set. The observation after the last decision is that of the decision.
        """
        if not self._wants_callbacks():
            return
        episodes = [self._replayed(rollouts, row) for row in range(len(rollouts))]
        make_callback(
            "on_sample_end",
            callbacks_objects=self._callbacks,
            callbacks_functions=self.config.callbacks_on_sample_end,
            kwargs={"env_runner": self, "metrics_logger": self.metrics, "samples": episodes},
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
        return episode.to_numpy()

    def count_steps(self, steps: int, episodes: int) -> None:
        """Log environment steps and finished episodes under RLlib's usual keys."""
        self._increase_sampled_metrics(steps, episodes)
