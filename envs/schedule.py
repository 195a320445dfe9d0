"""The (sample, budget) context of every group of rollouts.

Training draws are a pure function of (seed, iteration, global group index) through counter-based generators, so any
share of an iteration can be run again by any process.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from envs.budgets import BudgetDistribution, check_budget
from envs.errors import UserError

ContextTuple = tuple[int, float] | tuple[int, float, float]
"""Sample index, budget in ms and, optionally, the budget in the observation."""
PADDING: Final = -1
_ORDER_STREAM: Final = 1
_BUDGET_STREAM: Final = 2


@dataclass(frozen=True)
class Context:
    """What one group of rollouts shares.

    Attributes:
        id: distinct for all groups of a schedule, -1 for padding.
        sample: index into the environment's samples.
        budget_ms: latency allowed; rollouts are scored by it.
        clamped_budget_ms: budget in the observation; differs only outside the training range (see
            `BudgetDistribution.nearest`).
    """

    id: int
    sample: int
    budget_ms: float
    clamped_budget_ms: float


class Schedule(Protocol):
    """Contexts by iteration and group."""

    def draw(self, iteration: int, groups: Sequence[int], total: int) -> list[Context]:
        """Contexts of the global groups `groups` out of `total` in an iteration."""
        ...


@dataclass(frozen=True)
class TrainingSchedule:
    """Random budgets, and samples in a seeded order per epoch, so that all are visited equally often.

    Attributes:
        seed: of order and budgets, 0 or more.
        samples: their number, 1 or more.
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

    def draw(self, iteration: int, groups: Sequence[int], total: int) -> list[Context]:
        """Contexts of the global groups `groups` out of `total` in an iteration."""
        return [self._one(iteration, group, total) for group in groups]

    def _one(self, iteration: int, group: int, total: int) -> Context:
        visit = iteration * total + group
        epoch, place = divmod(visit, self.samples)
        share = _generator(self.seed, _BUDGET_STREAM, iteration, group).random()
        budget_ms = float(self.budgets.at(share))
        return Context(visit, int(_order(self.seed, epoch, self.samples)[place]), budget_ms, budget_ms)


@dataclass(frozen=True)
class ListedSchedule:
    """Explicit contexts, each once, in order over iterations and groups; `listed` checks them."""

    contexts: tuple[Context, ...]

    def draw(self, iteration: int, groups: Sequence[int], total: int) -> list[Context]:
        """The next contexts; surplus groups get padding, the first context under the id -1."""
        padding = replace(self.contexts[0], id=PADDING)
        places = (iteration * total + group for group in groups)
        return [self.contexts[place] if place < len(self.contexts) else padding for place in places]

    def iterations(self, total: int) -> int:
        """Iterations of `total` groups that cover all contexts."""
        return -(-len(self.contexts) // total)


def listed(contexts: Iterable[ContextTuple], samples: int) -> ListedSchedule:
    """A schedule of explicit contexts.

    Raises:
        UserError: none given, an unknown sample, or a budget that is not above 0.
    """
    checked = []
    for place, context in enumerate(contexts):
        sample, *budgets = context
        if len(budgets) not in (1, 2):
            raise UserError(
                f"context {place} is {context!r}: give a sample, a budget and, if it differs, the budget observed"
            )
        if not 0 <= sample < samples:
            raise UserError(f"context {place} names sample {sample}: there are {samples}, counted from 0")
        checked.append(Context(place, int(sample), check_budget(budgets[0]), check_budget(budgets[-1])))
    if not checked:
        raise UserError("an explicit list of contexts is empty: give (sample index, budget in ms) at least once")
    return ListedSchedule(tuple(checked))


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, samples: int) -> npt.NDArray[np.int64]:
    """The order of an epoch, a permutation (samples,)."""
    return _generator(seed, _ORDER_STREAM, epoch).permutation(samples)
