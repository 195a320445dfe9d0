"""The environment: two decisions about one request, then its answer, its latency and a reward.

Step 1 picks tier and insertion position before the image is encoded, step 2 picks top-k and blocks from the latency
token that the first blocks produced. The vector environment is the real one: all its episodes are in step, and every
step makes one batched call to the engine. The single environment is a vector of one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.env_resources import World, WorldConfig
from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, HEAD_SIZES, INSERTIONS, TIERS, TOP_KS
from envs.latency_token import budget_level
from envs.schedule import Context, Listed, ListedSchedule, Schedule, TrainingSchedule, listed
from envs.scoring_step import Finished, finish

Array = npt.NDArray[Any]
Observation = dict[str, Array]
Step = tuple[Observation, Array, Array, Array, dict[str, Any]]
_CONFIG_KEYS: Final = ("world", "num_envs", "group_size", "seed", "contexts")
_HEADS: Final = ("tier", "insertion", "top-k", "blocks")
_OPTIONS: Final[tuple[Sequence[Any], ...]] = (TIERS, INSERTIONS, TOP_KS, BLOCK_COUNTS)
_STARTS: Final = np.cumsum((0, *HEAD_SIZES[:-1]))
_STAGE_HEADS: Final = ((0, 1), (2, 3))


class AdaptiveVQAVectorEnv(VectorEnv):
    """`num_envs` requests at once, in groups that share a (sample, budget) context.

    Episodes have two steps and all end together; the step after the end resets (gymnasium's NEXT_STEP). Values in the
    heads of the other stage are ignored.

    Args:
        config: a plain mapping, as Ray hands it to a worker, with
            `world`: a `World`, a `WorldConfig`, or a function of no arguments that makes a world;
            `num_envs`: 1 or more (default 1);
            `group_size`: environments per context, a divisor of `num_envs` (default 1);
            `seed`: of the training schedule (default 0);
            `contexts`: explicit ones as `envs.schedule.listed` takes them, each run once by one environment; None
            trains.

    Raises:
        UserError: an unknown or missing key, or numbers that do not fit together.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}

    def __init__(self, config: Mapping[str, Any]) -> None:
        unknown = sorted(set(config) - set(_CONFIG_KEYS))
        if unknown or "world" not in config:
            wrong = f"unknown environment setting {unknown[0]!r}" if unknown else "no `world` to run in"
            raise UserError(f"{wrong}: an environment takes {', '.join(_CONFIG_KEYS)}")
        self.world = _world(config["world"])
        self.num_envs = int(config.get("num_envs", 1))
        self.group_size = int(config.get("group_size", 1))
        self.seed = int(config.get("seed", 0))
        self._check_sizes()
        self.single_observation_space = observation_space(self.world.d_model)
        self.single_action_space = gym.spaces.MultiDiscrete(HEAD_SIZES)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._worker, self._workers, self._round = 0, 1, 0
        self._stage: int | None = None
        self._contexts: list[Context] = []
        self._choices = np.zeros((self.num_envs, len(HEAD_SIZES)), np.int64)
        self.schedule: Schedule = self._training_schedule()
        if config.get("contexts") is not None:
            self.set_contexts(config["contexts"])

    # What a runner sets.

    def set_worker(self, index: int, count: int) -> None:
        """Say which of `count` equal shares of a round this environment runs, from 0.

        Raises:
            UserError: an index outside the count.
        """
        if not 0 <= index < count:
            raise UserError(f"worker {index} of {count} is not allowed: workers count from 0 to {count - 1}")
        self._worker, self._workers = index, count

    def set_round(self, round_index: int) -> None:
        """Make the next reset run round `round_index`; the resets after it go on from there.

        Raises:
            UserError: a negative round.
        """
        if round_index < 0:
            raise UserError(f"round {round_index} is not allowed: rounds count from 0")
        self._round = int(round_index)

    def set_contexts(self, contexts: Sequence[Listed] | None) -> None:
        """Serve explicit contexts, one environment each, from round 0 on; None goes back to training.

        Raises:
            UserError: an empty list, an unknown sample or an impossible budget.
        """
        self._round = 0
        if contexts is None:
            self.schedule = self._training_schedule()
        else:
            self.schedule = listed(contexts, len(self.world.samples))

    def restart(self, seed: int) -> None:
        """Begin the training schedule of another seed at round 0."""
        self.seed = seed
        self._round = 0
        if not isinstance(self.schedule, ListedSchedule):
            self.schedule = self._training_schedule()

    @property
    def rounds(self) -> int | None:
        """Rounds that cover all explicit contexts; None when training."""
        if isinstance(self.schedule, ListedSchedule):
            return self.schedule.rounds(self.num_envs * self._workers)
        return None

    # Gymnasium's interface.

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start the next round.

        Args:
            seed: seeds `np_random` alone. Contexts follow the schedule: RLlib passes the same seed every time.
            options: `{"contexts": [...]}` serves these instead, this once.
        """
        super().reset(seed=seed)
        given = (options or {}).get("contexts")
        if given is None:
            self._contexts = self._draw(self.schedule, self._round)
            self._round += 1
        else:
            self._contexts = self._draw(listed(given, len(self.world.samples)), 0)
        self._stage = 0
        self._choices[:] = 0
        reference = self.world.clock.reference_ms
        self._log_ratios = [math.log(context.shown_ms / reference) for context in self._contexts]
        return self._observe_question(), {}

    def step(self, actions: Any) -> Step:
        """Take actions (num_envs, 4): indices into tier, insertion, top-k and blocks.

        Raises:
            UserError: an action that the mask of this stage forbids.
        """
        if self._stage is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        running = np.zeros(self.num_envs, np.bool_)
        if self._stage == 2:
            observation, infos = self.reset()
            return observation, np.zeros(self.num_envs), running, running.copy(), infos
        self._take(self._checked(actions))
        self._stage += 1
        if self._stage == 1:
            self._observation = self._observe_latency_token()
            return self._observation, np.zeros(self.num_envs), running, running.copy(), {}
        finished = finish(self.world, self._contexts, self._choices)
        ended = np.ones(self.num_envs, np.bool_)
        return self._observation, finished.rewards, ended, running, _infos(finished)

    def stats(self) -> dict[str, float]:
        """The engine's cumulative counters."""
        return dict(self.world.engine.stats())

    # Contexts.

    def _check_sizes(self) -> None:
        if self.num_envs < 1 or self.group_size < 1:
            raise UserError(
                f"{self.num_envs} environments in groups of {self.group_size} are not allowed: give 1 or more of each"
            )
        if self.num_envs % self.group_size:
            raise UserError(
                f"groups of {self.group_size} do not divide {self.num_envs} environments: make the environments a "
                f"multiple of the group size, {self.num_envs // self.group_size * self.group_size or self.group_size} "
                f"for instance"
            )

    def _training_schedule(self) -> TrainingSchedule:
        return TrainingSchedule(self.seed, len(self.world.samples), self.world.budgets)

    def _draw(self, schedule: Schedule, round_index: int) -> list[Context]:
        """This worker's contexts of a round, one per environment."""
        size = 1 if isinstance(schedule, ListedSchedule) else self.group_size
        here = self.num_envs // size
        groups = range(self._worker * here, (self._worker + 1) * here)
        drawn = schedule.draw(round_index, groups, here * self._workers)
        return [context for context in drawn for _ in range(size)]

    # Observations.

    def _blank(self, stage: int) -> Observation:
        width = self.world.d_model
        return {
            "stage": np.full((self.num_envs, 1), stage, np.float32),
            "budget": np.array(self._log_ratios, np.float32)[:, None],
            "language_feature": np.zeros((self.num_envs, width), np.float32),
            "latency_token": np.zeros((self.num_envs, width), np.float32),
            "insertion": np.zeros((self.num_envs, 1), np.float32),
            "action_mask": np.zeros((self.num_envs, sum(HEAD_SIZES)), np.float32),
        }

    def _observe_question(self) -> Observation:
        observation = self._blank(0)
        distinct, rows = np.unique([context.sample for context in self._contexts], return_inverse=True)
        samples = [self.world.samples[int(index)] for index in distinct]
        features = self.world.engine.language_features(samples).numpy()
        masks = np.stack([self.world.space.stage1_mask(has_image=s.image is not None) for s in samples])
        observation["language_feature"][:] = features[rows]
        observation["action_mask"][:] = masks[rows]
        self._observation = observation
        return observation

    def _observe_latency_token(self) -> Observation:
        observation = self._blank(1)
        insertions = self._choices[:, 1] + 1
        keys = [
            (context.sample, TIERS[tier], budget_level(log_ratio))
            for context, tier, log_ratio in zip(
                self._contexts, self._choices[:, 0].tolist(), self._log_ratios, strict=True
            )
        ]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        samples, tiers, levels = zip(*places, strict=True)
        tokens = self.world.engine.latency_tokens([self.world.samples[s] for s in samples], tiers, levels)
        rows = np.array([places[key] for key in keys])
        observation["latency_token"][:] = tokens.numpy()[rows, insertions - 1]
        observation["insertion"][:, 0] = insertions
        masks = np.stack([self.world.space.stage2_mask(position) for position in INSERTIONS])
        observation["action_mask"][:] = masks[insertions - 1]
        return observation

    # Actions.

    def _checked(self, actions: Any) -> Array:
        """Actions (num_envs, 4) whose heads of this stage are legal."""
        chosen = np.asarray(actions)
        if chosen.shape != self._choices.shape or not np.issubdtype(chosen.dtype, np.integer):
            raise UserError(
                f"actions of shape {chosen.shape} and type {chosen.dtype} are not allowed: give whole numbers of shape "
                f"{self._choices.shape}"
            )
        masks = self._observation["action_mask"]
        for head in _STAGE_HEADS[self._stage or 0]:
            values = chosen[:, head]
            inside = (values >= 0) & (values < HEAD_SIZES[head])
            places = _STARTS[head] + np.where(inside, values, 0)
            legal = inside & (masks[np.arange(self.num_envs), places] > 0)
            if not legal.all():
                raise self._illegal(head, int(np.argmin(legal)), chosen)
        return chosen

    def _illegal(self, head: int, row: int, chosen: Array) -> UserError:
        options, value = _OPTIONS[head], int(chosen[row, head])
        start = _STARTS[head]
        mask = self._observation["action_mask"][row, start : start + HEAD_SIZES[head]]
        allowed = [f"{index} ({options[index]})" for index in np.flatnonzero(mask).tolist()]
        meant = f" ({options[value]})" if 0 <= value < len(options) else ""
        return UserError(
            f"action {value}{meant} of head {_HEADS[head]} is not allowed in environment {row}: choose one of "
            f"{', '.join(allowed)}"
        )

    def _take(self, actions: Array) -> None:
        heads = list(_STAGE_HEADS[self._stage or 0])
        self._choices[:, heads] = actions[:, heads]


class AdaptiveVQAEnv(gym.Env[Observation, Array]):
    """One request at a time: a vector of one, for tools that want a plain `gymnasium.Env`.

    Args:
        config: as for `AdaptiveVQAVectorEnv`; it has one environment, so groups have size 1.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.vector = AdaptiveVQAVectorEnv({**config, "num_envs": 1, "group_size": 1})
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self._ended = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: restarts the training schedule under this seed.
            options: `{"sample": index, "budget_ms": budget}` chooses the context; both or neither.

        Raises:
            UserError: one option without the other, an unknown option, sample or an impossible budget.
        """
        super().reset(seed=seed)
        if seed is not None:
            self.vector.restart(seed)
        chosen = options or {}
        if chosen and set(chosen) != {"sample", "budget_ms"}:
            raise UserError(f"reset options {sorted(chosen)} are not understood: give both sample and budget_ms")
        contexts = {"contexts": [(chosen["sample"], chosen["budget_ms"])]} if chosen else None
        observation, infos = self.vector.reset(options=contexts)
        self._ended = False
        return _first(observation), infos

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take four indices, as in the vector environment."""
        if self._ended:
            raise gym.error.ResetNeeded("the episode is over: call reset() before step()")
        observation, rewards, ended, _, infos = self.vector.step(np.asarray(action)[None])
        self._ended = bool(ended[0])
        info = {key: value[0] for key, value in infos.items() if not key.startswith("_")}
        return _first(observation), float(rewards[0]), self._ended, False, info


def observation_space(d_model: int) -> gym.spaces.Dict:
    """What one environment shows: float32 boxes, see the fields of `AdaptiveVQAVectorEnv._blank`.

    `budget` is log(budget / latency of the full plan on the reference request); `insertion` is 0 at stage 1, then the
    chosen position; `action_mask` holds 1 for each legal option of the heads [3, 5, 5, 5].
    """

    def box(low: float, high: float, width: int) -> gym.spaces.Box:
        return gym.spaces.Box(low, high, (width,), np.float32)

    return gym.spaces.Dict(
        {
            "stage": box(0.0, 1.0, 1),
            "budget": box(-np.inf, np.inf, 1),
            "language_feature": box(-np.inf, np.inf, d_model),
            "latency_token": box(-np.inf, np.inf, d_model),
            "insertion": box(0.0, float(max(INSERTIONS)), 1),
            "action_mask": box(0.0, 1.0, sum(HEAD_SIZES)),
        }
    )


def _world(given: World | WorldConfig | Callable[[], World]) -> World:
    if isinstance(given, World):
        return given
    return given.build() if isinstance(given, WorldConfig) else given()


def _infos(finished: Finished) -> dict[str, Any]:
    """Gymnasium's vector infos: an array per key, and under `_key` which environments have it."""
    infos: dict[str, Any] = {}
    for key, values in finished.infos.items():
        infos[key] = values
        infos[f"_{key}"] = np.ones(len(values), np.bool_)
    return infos


def _first(observation: Observation) -> Observation:
    return {key: value[0] for key, value in observation.items()}
