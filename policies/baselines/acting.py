"""What the controller is compared with: fixed knobs, a lookup by budget, random legal knobs. Numpy only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from envs.errors import UserError
from envs.knobs import HEAD_SIZES, STAGE1_PAIRS, KnobSpace, nearest_legal

Observation = Mapping[str, npt.NDArray[np.float32]]
Action = tuple[int, int, int, int]
Act = Callable[[Observation], npt.NDArray[np.int64]]


class Baseline(Protocol):
    """A way to choose knobs without a controller; picklable, since it runs on evaluation runners."""

    def start(self, seed: tuple[int, ...]) -> Act:
        """How to act in one shard of contexts, which `seed` names: observations (B, ...) to actions (B, 4)."""


@dataclass(frozen=True)
class FixedKnobs:
    """The same knobs for every request, such as the full plan."""

    action: Action

    def __post_init__(self) -> None:
        KnobSpace.decode(self.action)

    def start(self, seed: tuple[int, ...]) -> Act:
        return LookupKnobs((), (self.action,)).start(seed)


@dataclass(frozen=True)
class LookupKnobs:
    """Knobs by budget alone.

    Attributes:
        edges: rising log(budget / reference latency); k edges make k + 1 bins, open at both ends.
        actions: one action per bin.
    """

    edges: tuple[float, ...]
    actions: tuple[Action, ...]

    def __post_init__(self) -> None:
        if len(self.actions) != len(self.edges) + 1 or list(self.edges) != sorted(self.edges):
            raise UserError(
                f"lookup of {len(self.actions)} actions and edges {self.edges} is not allowed: "
                "give rising edges and one action more than edges"
            )
        for action in self.actions:
            KnobSpace.decode(action)

    def start(self, seed: tuple[int, ...]) -> Act:
        actions = np.array(self.actions, dtype=np.int64)

        def act(obs: Observation) -> npt.NDArray[np.int64]:
            chosen = actions[np.searchsorted(self.edges, obs["budget"][:, 0], side="right")]
            return nearest_legal(chosen, obs["action_mask"] > 0)

        return act


@dataclass(frozen=True)
class RandomKnobs:
    """Every legal pair of a stage equally likely. The seed makes a run repeatable, whatever runs where."""

    seed: int = 0

    def start(self, seed: tuple[int, ...]) -> Act:
        generator = np.random.default_rng([self.seed, *seed])

        def act(obs: Observation) -> npt.NDArray[np.int64]:
            mask = obs["action_mask"] > 0
            scores = np.where(mask, generator.random(mask.shape), -1.0)
            first, second = scores[:, :STAGE1_PAIRS].argmax(1), scores[:, STAGE1_PAIRS:].argmax(1)
            return np.stack((*np.divmod(first, HEAD_SIZES[1]), *np.divmod(second, HEAD_SIZES[3])), axis=1)

        return act
