"""The environment: two decisions about one request, then its answer, latency and reward.

Step 1 chooses tier and insertion position before the image is encoded; step 2 chooses top-k and blocks from the latency
token that the first blocks produced. All episodes of the vector environment advance together, with one batched engine
call per step; the single environment is a vector of one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.env_resources import EnvConfig, EnvResources
from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, HEAD_SIZES, INSERTIONS, STAGE1_PAIRS, TIERS, TOP_KS, head_masks, nearest_legal
from envs.observation import Observation, observation_bounds, observe_latency_token, observe_question, plans_that_fit
from envs.plan_tree import KnownPlans, plan_tree
from envs.schedule import Context, ContextTuple, ListedSchedule, Schedule, TrainingSchedule, listed
from envs.scoring_step import score

Array = npt.NDArray[Any]
Step = tuple[Observation, Array, Array, Array, dict[str, Any]]
_CONFIG_KEYS: Final = ("resources", "num_envs", "group_size", "seed", "contexts", "illegal_actions")
ILLEGAL_ACTIONS: Final = ("error", "project")
_HEADS: Final = ("tier", "insertion", "top-k", "blocks")
_OPTIONS: Final[tuple[Sequence[Any], ...]] = (TIERS, INSERTIONS, TOP_KS, BLOCK_COUNTS)
_STAGE_HEADS: Final = ((0, 1), (2, 3))


class AdaptiveVQAVectorEnv(VectorEnv):
    """`num_envs` requests in groups that share a (sample, budget) context.

    Episodes have two steps; the step after the end resets (gymnasium's NEXT_STEP). Action heads of the other stage are
    ignored.

    Args:
        config: a plain mapping with
            `resources`: a `EnvResources`, an `EnvConfig`, or a function that returns a `EnvResources`;
            `num_envs`: 1 or more (default 1);
            `group_size`: environments per context, a divisor of `num_envs` (default 1);
            `seed`: of the training schedule (default 0);
            `contexts`: explicit contexts (`envs.schedule.listed`), each run once by one environment; None trains;
            `illegal_actions`: `error` (default) refuses a pair of choices that the mask forbids, `project` takes the
            nearest legal pair (`envs.knobs.nearest_legal`).

    Raises:
        UserError: an unknown or missing key, or an invalid value.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}

    def __init__(self, config: Mapping[str, Any]) -> None:
        unknown = sorted(set(config) - set(_CONFIG_KEYS))
        if unknown or "resources" not in config:
            wrong = f"unknown environment config key {unknown[0]!r}" if unknown else "no `resources` given"
            raise UserError(f"{wrong}: an environment takes {', '.join(_CONFIG_KEYS)}")
        self.resources = _resources(config["resources"])
        self.num_envs = int(config.get("num_envs", 1))
        self.group_size = int(config.get("group_size", 1))
        self.seed = int(config.get("seed", 0))
        self.illegal_actions = str(config.get("illegal_actions", "error"))
        self._check_sizes()
        self.set_multipliers(None)
        self.single_observation_space = observation_space(self.resources.d_model)
        self.single_action_space = gym.spaces.MultiDiscrete(HEAD_SIZES)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._worker, self._workers, self._iteration = 0, 1, 0
        self._stage: int | None = None
        self._contexts: list[Context] = []
        self._known: dict[int, KnownPlans] = {}
        self._choices = np.zeros((self.num_envs, len(HEAD_SIZES)), np.int64)
        self.schedule: Schedule = self._training_schedule()
        if config.get("contexts") is not None:
            self.set_contexts(config["contexts"])

    # Interface to the env runner (`envs.contracts.VectorEnvironment`).

    def set_worker(self, index: int, count: int) -> None:
        """Run share `index` of `count` equal shares of every iteration."""
        if not 0 <= index < count:
            raise UserError(f"worker {index} of {count} is not allowed: workers count from 0 to {count - 1}")
        self._worker, self._workers = index, count

    def set_iteration(self, iteration: int) -> None:
        """Make the next reset run iteration `iteration`; later resets continue from it."""
        if iteration < 0:
            raise UserError(f"iteration {iteration} is not allowed: iterations count from 0")
        self._iteration = int(iteration)

    def set_contexts(self, contexts: Sequence[ContextTuple] | None) -> None:
        """Run explicit contexts, one environment each, from iteration 0; None returns to training.

        Raises:
            UserError: an empty list, an unknown sample or an impossible budget.
        """
        self._iteration = 0
        if contexts is None:
            self.schedule = self._training_schedule()
        else:
            self.schedule = listed(contexts, len(self.resources.samples))

    def held_out_contexts(self) -> list[ContextTuple]:
        """Every sample under every held-out budget; the first ones are all samples, under budgets that take turns."""
        samples, budgets = len(self.resources.samples), self.resources.budgets.held_out()
        turns = range(len(budgets))
        return [(sample, budgets[(sample + turn) % len(budgets)]) for turn in turns for sample in range(samples)]

    def set_multipliers(self, values: npt.ArrayLike | None) -> None:
        """Penalty multipliers of the next rewards, one per budget bin; None takes the constant `reward.penalty`."""
        bins = self.resources.budgets.bins
        given = np.full(bins, self.resources.reward.penalty) if values is None else np.array(values, np.float64)
        if given.shape != (bins,):
            raise UserError(
                f"{given.size} penalty multipliers are not allowed: give one for each of {bins} budget bins"
            )
        self.multipliers = given

    def restart(self, seed: int) -> None:
        """Start the training schedule of another seed at iteration 0."""
        self.seed = seed
        self._iteration = 0
        if not isinstance(self.schedule, ListedSchedule):
            self.schedule = self._training_schedule()

    @property
    def iterations(self) -> int | None:
        """Iterations that cover all explicit contexts; None when training."""
        if isinstance(self.schedule, ListedSchedule):
            return self.schedule.iterations(self.num_envs * self._workers)
        return None

    # Gymnasium's interface.

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start the next iteration.

        Args:
            seed: seeds `np_random` alone; contexts follow the schedule, as RLlib passes the same seed every time.
            options: `{"contexts": [...]}` runs these instead, for one episode.
        """
        super().reset(seed=seed)
        given = (options or {}).get("contexts")
        if given is None:
            self._contexts = self._draw(self.schedule, self._iteration)
            self._iteration += 1
        else:
            self._contexts = self._draw(listed(given, len(self.resources.samples)), 0)
        self._stage = 0
        self._choices[:] = 0
        reference = self.resources.clock.reference_ms
        self._log_ratios = [math.log(context.clamped_budget_ms / reference) for context in self._contexts]
        self._fits = plans_that_fit(self.resources, self._contexts)
        self._observation = observe_question(self.resources, self._contexts, self._log_ratios, self._fits)
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
        heads = list(_STAGE_HEADS[self._stage])
        self._choices[:, heads] = self._legal_choices(actions)[:, heads]
        self._stage += 1
        if self._stage == 1:
            self._observation = observe_latency_token(
                self.resources, self._contexts, self._log_ratios, self._fits, self._choices
            )
            return self._observation, np.zeros(self.num_envs), running, running.copy(), {}
        feasible = np.array([fits is None or bool(fits.any()) for fits in self._fits])
        rewards, infos = score(self.resources, self._contexts, self._choices, self.multipliers, feasible)
        ended = np.ones(self.num_envs, np.bool_)
        # Gymnasium's vector infos: under `_key`, which environments have the value `key`.
        infos |= {f"_{key}": ended.copy() for key in infos}
        return self._observation, rewards, ended, running, infos

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Options (num_envs, 18) that occur in a legal pair, per head, as MaskablePPO takes them.

        Two allowed options may form an illegal pair; `action_mask` of the observation gives the legal pairs.
        """
        return head_masks(self._observation["action_mask"] > 0)

    def plan_tree(self) -> tuple[Observation, Array, Array]:
        """Every second decision of each group, and returns of plans whose outcomes are known (`envs.plan_tree`).

        Call it after `reset` and before the first step.
        """
        rows = slice(None, None, self.group_size)
        first = self._observation["action_mask"][rows, :STAGE1_PAIRS] > 0
        contexts, log_ratios, fits = self._contexts[rows], self._log_ratios[rows], self._fits[rows]
        return plan_tree(self.resources, contexts, log_ratios, fits, first, self.multipliers, self._known)

    def current(self) -> Context:
        """Context of the first environment's episode."""
        if not self._contexts:
            raise gym.error.ResetNeeded("call reset() first")
        return self._contexts[0]

    def stats(self) -> dict[str, float]:
        """The engine's cumulative counters."""
        return dict(self.resources.engine.stats())

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
        return TrainingSchedule(self.seed, len(self.resources.samples), self.resources.budgets)

    def _draw(self, schedule: Schedule, iteration: int) -> list[Context]:
        """This worker's contexts of an iteration, one per environment."""
        size = 1 if isinstance(schedule, ListedSchedule) else self.group_size
        count = self.num_envs // size
        groups = range(self._worker * count, (self._worker + 1) * count)
        drawn = schedule.draw(iteration, groups, count * self._workers)
        return [context for context in drawn for _ in range(size)]

    # Actions.

    def _legal_choices(self, actions: Any) -> Array:
        """Actions (num_envs, 4) whose heads of this stage are legal; the other heads are 0."""
        chosen = np.asarray(actions)
        if chosen.shape != self._choices.shape or not np.issubdtype(chosen.dtype, np.integer):
            raise UserError(
                f"actions of shape {chosen.shape} and type {chosen.dtype} are not allowed: give integers of shape "
                f"{self._choices.shape}"
            )
        heads = list(_STAGE_HEADS[self._stage or 0])
        given = np.zeros_like(self._choices)
        given[:, heads] = chosen[:, heads]
        outside = np.flatnonzero(((given < 0) | (given >= HEAD_SIZES)).any(axis=1))
        if outside.size:
            raise self._illegal(int(outside[0]), chosen)
        legal = nearest_legal(given, self._observation["action_mask"] > 0)
        changed = np.flatnonzero((legal != given)[:, heads].any(axis=1))
        if changed.size and self.illegal_actions == "error":
            raise self._illegal(int(changed[0]), chosen)
        return legal

    def _illegal(self, row: int, chosen: Array) -> UserError:
        first, second = _STAGE_HEADS[self._stage or 0]
        mask = self._observation["action_mask"][row] > 0
        pairs = np.flatnonzero(mask[STAGE1_PAIRS:] if self._stage else mask[:STAGE1_PAIRS])
        indices = [divmod(int(pair), HEAD_SIZES[second]) for pair in pairs]
        allowed = [f"{a}, {b} ({_OPTIONS[first][a]}, {_OPTIONS[second][b]})" for a, b in indices]
        given = f"{chosen[row, first]}, {chosen[row, second]}"
        return UserError(
            f"actions {given} of heads {_HEADS[first]} and {_HEADS[second]} are not allowed together in environment "
            f"{row}: choose one of {'; '.join(allowed)}"
        )


class AdaptiveVQAEnv(gym.Env[Observation, Array]):
    """One request at a time, for tools that take a plain `gymnasium.Env`.

    Args:
        config: as for `AdaptiveVQAVectorEnv`, with one environment; `illegal_actions` is `project` by default, so that
            `env.step(env.action_space.sample())` works.
        render_mode: `rgb_array`: `render()` draws image, question, budget, choices and answer.
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
            raise UserError(f"reset options {sorted(chosen)} are not known: give both sample and budget_ms")
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
        self._info = {key: value[0] for key, value in infos.items() if not key.startswith("_")}
        return _first(observation), float(rewards[0]), self._ended, False, self._info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Options (18,) of each head that some legal pair has; see `AdaptiveVQAVectorEnv.action_masks`."""
        return self.vector.action_masks()[0]

    def render(self) -> Array | None:
        """The request as an image (height, width, 3) uint8, in render mode `rgb_array`."""
        if self.render_mode is None:
            return None
        from envs.rendering import draw_episode

        return draw_episode(self.vector.resources, self.vector.current(), self._info)


def observation_space(d_model: int) -> gym.spaces.Dict:
    """Observations of one environment: float32 boxes, see `envs.observation`."""
    return gym.spaces.Dict(
        {
            name: gym.spaces.Box(low, high, (width,), np.float32)
            for name, (low, high, width) in observation_bounds(d_model).items()
        }
    )


def _resources(given: EnvResources | EnvConfig | Callable[[], EnvResources]) -> EnvResources:
    if isinstance(given, EnvResources):
        return given
    return given.build() if isinstance(given, EnvConfig) else given()


def _first(observation: Observation) -> Observation:
    return {key: value[0] for key, value in observation.items()}


gym.register(id="ray_ctrl/AdaptiveVQA-v0", entry_point=AdaptiveVQAEnv, vector_entry_point=AdaptiveVQAVectorEnv)
