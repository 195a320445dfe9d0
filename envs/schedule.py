"""Which (sample, budget) every group of rollouts is about.

Training draws are a pure function of (seed, round, global group index) through counter-based generators: no process
history enters, so a restarted runner goes on where the lost one was, and a chunk can be run again anywhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from envs.budgets import BudgetDistribution, check_budget
from envs.errors import UserError

Listed = tuple[int, float] | tuple[int, float, float]
PADDING: Final = -1
_ORDER_STREAM: Final = 1
_BUDGET_STREAM: Final = 2


@dataclass(frozen=True)
class Context:
    """What one group of rollouts is about.

    Attributes:
        id: the group: distinct for all groups of a schedule, -1 for padding.
        sample: index into the world's samples.
        budget_ms: latency allowed.
        shown_ms: budget that the observation shows, the same but for evaluations beyond the training range (see
            `BudgetDistribution.nearest`).
    """

    id: int
    sample: int
    budget_ms: float
    shown_ms: float


class Schedule(Protocol):
    """Contexts by round and place."""

    def draw(self, round_index: int, groups: Sequence[int], total: int) -> list[Context]:
        """Contexts of the global groups `groups` out of `total` in a round."""
        ...


@dataclass(frozen=True)
class TrainingSchedule:
    """Random budgets, and samples visited epoch by epoch in a seeded order, so that none is seen much oftener.

    Attributes:
        seed: of order and budgets.
        samples: how many there are, 1 or more.
        budgets: the training distribution.
    """

    seed: int
    samples: int
    budgets: BudgetDistribution

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError("there are no samples to train on: choose a task and split that have some")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is not allowed: give 0 or more")

    def draw(self, round_index: int, groups: Sequence[int], total: int) -> list[Context]:
        """Contexts of the global groups `groups` out of `total` in a round."""
        return [self._one(round_index, group, total) for group in groups]

    def _one(self, round_index: int, group: int, total: int) -> Context:
        visit = round_index * total + group
        epoch, place = divmod(visit, self.samples)
        entropy = (self.seed, _BUDGET_STREAM, round_index, group)
        share = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).random()
        sample = int(_order(self.seed, epoch, self.samples)[place])
        budget_ms = float(self.budgets.at(share))
        return Context(visit, sample, budget_ms, budget_ms)


@dataclass(frozen=True)
class ListedSchedule:
    """Explicit contexts, each once, in order over rounds and places; surplus places get padding.

    Attributes:
        contexts: as `listed` checks and makes them.
    """

    contexts: tuple[Context, ...]

    def draw(self, round_index: int, groups: Sequence[int], total: int) -> list[Context]:
        """The listed contexts whose turn it is; padding repeats the first context under the id -1."""
        first = self.contexts[0]
        padding = replace(first, id=PADDING)
        turns = (round_index * total + group for group in groups)
        return [self.contexts[t] if t < len(self.contexts) else padding for t in turns]

    def rounds(self, total: int) -> int:
        """Rounds of `total` places that cover all contexts."""
        return -(-len(self.contexts) // total)


def listed(contexts: Iterable[Listed], samples: int) -> ListedSchedule:
    """A schedule of explicit contexts: (sample index, budget in ms), or with the budget shown, ms, as a third.

    Raises:
        UserError: none given, a sample that does not exist, or a budget that is not above 0.
    """
    checked = []
    for place, context in enumerate(contexts):
        sample, *budgets = context
        if len(budgets) not in (1, 2):
            raise UserError(
                f"context {place} is {context!r}: give a sample, a budget and, if another is shown, that one"
            )
        if not 0 <= sample < samples:
            raise UserError(f"context {place} names sample {sample}: there are {samples}, counted from 0")
        budget_ms, shown_ms = check_budget(budgets[0]), check_budget(budgets[-1])
        checked.append(Context(place, int(sample), budget_ms, shown_ms))
    if not checked:
        raise UserError("an explicit list of contexts is empty: give (sample index, budget in ms) at least once")
    return ListedSchedule(tuple(checked))


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, samples: int) -> npt.NDArray[np.int64]:
    """The order of an epoch, a permutation (samples,)."""
    entropy = np.random.SeedSequence((seed, _ORDER_STREAM, epoch))
    return np.random.Generator(np.random.Philox(entropy)).permutation(samples)
