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

from envs.env_resources import EnvConfig, World
from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, HEAD_SIZES, INSERTIONS, STAGE1_PAIRS, TIERS, TOP_KS, head_masks, nearest_legal
from envs.observation import Observation, observation_bounds, observe_latency_token, observe_question, plans_that_fit
from envs.schedule import Context, Listed, ListedSchedule, Schedule, TrainingSchedule, listed
from envs.scoring_step import Finished, finish

Array = npt.NDArray[Any]
Step = tuple[Observation, Array, Array, Array, dict[str, Any]]
_CONFIG_KEYS: Final = ("world", "num_envs", "group_size", "seed", "contexts", "illegal_actions")
ILLEGAL_ACTIONS: Final = ("error", "project")
_HEADS: Final = ("tier", "insertion", "top-k", "blocks")
_OPTIONS: Final[tuple[Sequence[Any], ...]] = (TIERS, INSERTIONS, TOP_KS, BLOCK_COUNTS)
_STAGE_HEADS: Final = ((0, 1), (2, 3))


class AdaptiveVQAVectorEnv(VectorEnv):
    """`num_envs` requests at once, in groups that share a (sample, budget) context.

    Episodes have two steps and all end together; the step after the end resets (gymnasium's NEXT_STEP). Values in the
    heads of the other stage are ignored.

    Args:
        config: a plain mapping, as Ray hands it to a worker, with
            `world`: a `World`, a `EnvConfig`, or a function of no arguments that makes a world;
            `num_envs`: 1 or more (default 1);
            `group_size`: environments per context, a divisor of `num_envs` (default 1);
            `seed`: of the training schedule (default 0);
            `contexts`: explicit ones as `envs.schedule.listed` takes them, each run once by one environment; None
            trains;
            `illegal_actions`: `error` (default) refuses a pair of choices that the mask forbids, `project` takes the
            nearest legal pair instead (`envs.knobs.nearest_legal`).

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
        self.illegal_actions = str(config.get("illegal_actions", "error"))
        self._check_sizes()
        self.set_multipliers(None)
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

    def set_multipliers(self, values: npt.ArrayLike | None) -> None:
        """Penalty multipliers of the next rewards, one per budget bin; None takes the constant one of the settings.

        Raises:
            UserError: another number of values than budget bins.
        """
        bins = self.world.budgets.bins
        given = np.full(bins, self.world.reward.penalty) if values is None else np.array(values, np.float64)
        if given.shape != (bins,):
            raise UserError(
                f"{given.size} penalty multipliers are not allowed: give one for each of {bins} budget bins"
            )
        self.multipliers = given

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
        self._fits = plans_that_fit(self.world, self._contexts)
        self._observation = observe_question(self.world, self._contexts, self._log_ratios, self._fits)
        return self._observation, {}

    def step(self, actions: Any) -> Step:
        """Take actions (num_envs, 4): indices into tier, insertion, top-k and blocks.

        Raises:
            UserError: an index outside its head, or, unless projected, a pair that the mask of this stage forbids.
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
            self._observation = observe_latency_token(
                self.world, self._contexts, self._log_ratios, self._fits, self._choices
            )
            return self._observation, np.zeros(self.num_envs), running, running.copy(), {}
        feasible = np.array([fits is None or bool(fits.any()) for fits in self._fits])
        finished = finish(self.world, self._contexts, self._choices, self.multipliers, feasible)
        ended = np.ones(self.num_envs, np.bool_)
        return self._observation, finished.rewards, ended, running, _infos(finished)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Options (num_envs, 18) of each head that some legal pair has, as MaskablePPO takes them.

        Which pairs are legal is in `action_mask` of the observation; two options allowed here may not go together.
        """
        return head_masks(self._observation["action_mask"] > 0)

    def current(self) -> Context:
        """What the first environment's running episode is about.

        Raises:
            ResetNeeded: there is none.
        """
        if not self._contexts:
            raise gym.error.ResetNeeded("call reset() first")
        return self._contexts[0]

    def stats(self) -> dict[str, float]:
        """The engine's cumulative counters."""
        return dict(self.world.engine.stats())

    # Contexts.

    def _check_sizes(self) -> None:
        if self.num_envs < 1 or self.group_size < 1:
            raise UserError(
                f"{self.num_envs} environments in groups of {self.group_size} are not allowed: give 1 or more of each"
            )
        if self.illegal_actions not in ILLEGAL_ACTIONS:
            raise UserError(
                f"illegal_actions {self.illegal_actions!r} is not known: choose one of {', '.join(ILLEGAL_ACTIONS)}"
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

    # Actions.

    def _checked(self, actions: Any) -> Array:
        """Actions (num_envs, 4) whose heads of this stage are legal."""
        chosen = np.asarray(actions)
        if chosen.shape != self._choices.shape or not np.issubdtype(chosen.dtype, np.integer):
            raise UserError(
                f"actions of shape {chosen.shape} and type {chosen.dtype} are not allowed: give whole numbers of shape "
                f"{self._choices.shape}"
            )
        heads = list(_STAGE_HEADS[self._stage or 0])
        outside = [(head, int(row)) for head in heads for row in np.flatnonzero(_outside(chosen[:, head], head))]
        if outside:
            raise self._illegal(outside[0][1], chosen)
        # Heads of the other stage are ignored, whatever they hold.
        mine = np.zeros_like(self._choices)
        mine[:, heads] = chosen[:, heads]
        legal = nearest_legal(mine, self._observation["action_mask"] > 0)
        wrong = np.flatnonzero((legal != mine)[:, heads].any(axis=1))
        if wrong.size and self.illegal_actions == "error":
            raise self._illegal(int(wrong[0]), chosen)
        return legal

    def _illegal(self, row: int, chosen: Array) -> UserError:
        first, second = _STAGE_HEADS[self._stage or 0]
        mask = self._observation["action_mask"][row] > 0
        pairs = np.flatnonzero(mask[STAGE1_PAIRS:] if self._stage else mask[:STAGE1_PAIRS])
        shown = [divmod(int(pair), HEAD_SIZES[second]) for pair in pairs]
        allowed = [f"{a}, {b} ({_OPTIONS[first][a]}, {_OPTIONS[second][b]})" for a, b in shown]
        given = f"{chosen[row, first]}, {chosen[row, second]}"
        return UserError(
            f"actions {given} of heads {_HEADS[first]} and {_HEADS[second]} are not allowed together in environment "
            f"{row}: choose one of {'; '.join(allowed)}"
        )

    def _take(self, actions: Array) -> None:
        heads = list(_STAGE_HEADS[self._stage or 0])
        self._choices[:, heads] = actions[:, heads]


class AdaptiveVQAEnv(gym.Env[Observation, Array]):
    """One request at a time: a vector of one, for tools that want a plain `gymnasium.Env`.

    Args:
        config: as for `AdaptiveVQAVectorEnv`; it has one environment, so groups have size 1, and projects illegal
            actions unless told otherwise, so that `env.step(env.action_space.sample())` works.
        render_mode: `rgb_array`: `render()` shows image, question, budget, choices and answer.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 1}

    def __init__(self, config: Mapping[str, Any], render_mode: str | None = None) -> None:
        self.vector = AdaptiveVQAVectorEnv({"illegal_actions": "project", **config, "num_envs": 1, "group_size": 1})
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render mode {render_mode!r} is not known: choose rgb_array or None")
        self.render_mode = render_mode
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
        self._info: dict[str, Any] = {}
        return _first(observation), infos

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take four indices, as in the vector environment."""
        if self._ended:
            raise gym.error.ResetNeeded("the episode is over: call reset() before step()")
        observation, rewards, ended, _, infos = self.vector.step(np.asarray(action)[None])
        self._ended = bool(ended[0])
        info = {key: value[0] for key, value in infos.items() if not key.startswith("_")}
        self._info = info
        return _first(observation), float(rewards[0]), self._ended, False, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Options (18,) of each head that some legal pair has; see `AdaptiveVQAVectorEnv.action_masks`."""
        return self.vector.action_masks()[0]

    def render(self) -> Array | None:
        """The request as an image (height, width, 3) uint8, in render mode `rgb_array`."""
        if self.render_mode is None:
            return None
        from envs.rendering import draw_episode

        return draw_episode(self.vector.world, self.vector.current(), self._info)


def _outside(values: Array, head: int) -> npt.NDArray[np.bool_]:
    return (values < 0) | (values >= HEAD_SIZES[head])


def observation_space(d_model: int) -> gym.spaces.Dict:
    """What one environment shows: float32 boxes, see `envs.observation`."""
    return gym.spaces.Dict(
        {
            name: gym.spaces.Box(low, high, (width,), np.float32)
            for name, (low, high, width) in observation_bounds(d_model).items()
        }
    )


def _world(given: World | EnvConfig | Callable[[], World]) -> World:
    if isinstance(given, World):
        return given
    return given.build() if isinstance(given, EnvConfig) else given()


def _infos(finished: Finished) -> dict[str, Any]:
    """Gymnasium's vector infos: an array per key, and under `_key` which environments have it."""
    infos: dict[str, Any] = {}
    for key, values in finished.infos.items():
        infos[key] = values
        infos[f"_{key}"] = np.ones(len(values), np.bool_)
    return infos


def _first(observation: Observation) -> Observation:
    return {key: value[0] for key, value in observation.items()}


gym.register(id="ray_ctrl/AdaptiveVQA-v0", entry_point=AdaptiveVQAEnv, vector_entry_point=AdaptiveVQAVectorEnv)
