"""The controller's choices and the model's execution plans.

`Knobs` are the controller's four choices, `KnobSpace` maps them to actions and masks, `ExecutionPlan` is what the model
executes. Positions and totals count blocks from 1, block indices from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from envs.errors import UserError

KNOBS: Final = ("tier", "insertion", "top_k", "blocks")
TIERS: Final = ("low", "medium", "high")
TIER_CROPS: Final = {"low": 3, "medium": 6, "high": 12}
INSERTIONS: Final = (1, 2, 3, 4, 5)
TOP_KS: Final = (4, 5, 6, 7, 8)
BLOCK_COUNTS: Final = (12, 13, 14, 15, 16)
MODEL_BLOCKS: Final = 16
MAX_DROPPED: Final = 4
HEAD_SIZES: Final = (len(TIERS), len(INSERTIONS), len(TOP_KS), len(BLOCK_COUNTS))
STAGE1_PAIRS: Final = len(TIERS) * len(INSERTIONS)
"""Joint options of stage 1, (tier, insertion) in row-major order."""
PAIRS: Final = STAGE1_PAIRS + len(TOP_KS) * len(BLOCK_COUNTS)
"""Places of an action mask: the 15 pairs of stage 1, then the 25 (top-k, blocks) pairs of stage 2."""

BoolArray = npt.NDArray[np.bool_]


def _check_options(tier: str, insertion: int, top_k: int) -> None:
    if tier not in TIERS:
        raise UserError(f"tier {tier!r} is not allowed: choose one of {', '.join(TIERS)}")
    if insertion not in INSERTIONS:
        raise UserError(f"insertion position {insertion!r} is not allowed: choose one of 1 to 5")
    if top_k not in TOP_KS:
        raise UserError(f"top-k {top_k!r} is not allowed: choose 4 to 8 experts per token")


def block_options(insertion: int) -> tuple[int, ...]:
    """Legal totals of executed blocks at insertion position p: p + 11 to p + min(15, 16 - p)."""
    if insertion not in INSERTIONS:
        raise UserError(f"insertion position {insertion!r} is not allowed: choose one of 1 to 5")
    return tuple(range(insertion + 11, insertion + min(15, MODEL_BLOCKS - insertion) + 1))


@dataclass(frozen=True, order=True)
class Knobs:
    """The controller's four choices for one request.

    Raises:
        UserError: a value outside its options, or a block total its position does not allow.
    """

    tier: str
    insertion: int
    top_k: int
    blocks: int

    def __post_init__(self) -> None:
        _check_options(self.tier, self.insertion, self.top_k)
        options = block_options(self.insertion)
        if self.blocks not in options:
            raise UserError(
                f"{self.blocks!r} blocks are not allowed at insertion position {self.insertion}: "
                f"choose {options[0]} to {options[-1]}"
            )


@dataclass(frozen=True, order=True)
class ExecutionPlan:
    """The 0-based kept `blocks`; those after `insertion` use `top_k` experts, those before always run with 8.

    Any set of later blocks is allowed, not only those that `Knobs` reach. The tier affects the processor alone.

    Raises:
        UserError: an invalid tier, position, top-k or list of blocks.
    """

    tier: str = "high"
    insertion: int = 1
    top_k: int = 8
    blocks: tuple[int, ...] = tuple(range(MODEL_BLOCKS))

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _check_options(self.tier, self.insertion, self.top_k)
        if list(self.blocks) != sorted(set(self.blocks)) or not set(self.blocks) <= set(range(MODEL_BLOCKS)):
            raise UserError(f"kept blocks {self.blocks} are not allowed: give distinct indices 0 to 15 in rising order")
        if self.blocks[: self.insertion] != tuple(range(self.insertion)):
            raise UserError(
                f"kept blocks {self.blocks} miss a block of the prefix: blocks 0 to {self.insertion - 1} run before "
                f"insertion position {self.insertion} and cannot be dropped"
            )

    @cached_property
    def top_k_per_block(self) -> tuple[int, ...]:
        """Experts per token in each of the 16 blocks, 0 if dropped. Equal tuples execute equally on equal tilings."""
        kept = set(self.blocks)
        return tuple(0 if b not in kept else (8 if b < self.insertion else self.top_k) for b in range(MODEL_BLOCKS))


def drop_order(importance: Sequence[float], insertion: int) -> tuple[int, ...]:
    """Blocks after `insertion` from least to most important; ties put the later block first."""
    droppable = range(insertion, MODEL_BLOCKS)
    return tuple(sorted(droppable, key=lambda block: (importance[block], -block)))


class KnobSpace:
    """Legal knobs, their actions and masks, and their plans under one block importance.

    An action is four indices into `MultiDiscrete([3, 5, 5, 5])`: tier, insertion (p = 1 + i),
    top-k (4 + i), blocks (n = 12 + i).

    Args:
        importance: 16 finite scores, one per block; the lowest-scored blocks after the insertion position are dropped
            first.
    """

    full: ClassVar = Knobs("high", 1, 8, 16)
    cheapest: ClassVar = Knobs("low", 1, 4, 12)

    def __init__(self, importance: Sequence[float]) -> None:
        scores = tuple(float(score) for score in importance)
        if len(scores) != MODEL_BLOCKS or not np.isfinite(scores).all():
            raise UserError(f"importance needs {MODEL_BLOCKS} finite scores, one per block, got {scores}")
        self.importance = scores
        self._plans: dict[Knobs, ExecutionPlan] = {}

    @cached_property
    def all(self) -> tuple[Knobs, ...]:
        """All 225 legal knobs, in action order."""
        return tuple(
            Knobs(tier, insertion, top_k, blocks)
            for tier, insertion, top_k in product(TIERS, INSERTIONS, TOP_KS)
            for blocks in block_options(insertion)
        )

    @staticmethod
    def encode(knobs: Knobs) -> tuple[int, int, int, int]:
        """Action indices of `knobs`."""
        places = (TIERS.index(knobs.tier), INSERTIONS.index(knobs.insertion))
        return (*places, TOP_KS.index(knobs.top_k), BLOCK_COUNTS.index(knobs.blocks))

    @staticmethod
    def decode(action: Sequence[int]) -> Knobs:
        """Knobs of four action indices.

        Raises:
            UserError: an index outside its head, or a combination that is not legal.
        """
        indices = tuple(int(index) for index in action)
        if len(indices) != 4 or any(not 0 <= i < size for i, size in zip(indices, HEAD_SIZES, strict=True)):
            raise UserError(f"action {indices} is not allowed: give four indices below {HEAD_SIZES}")
        tier, insertion, top_k, blocks = indices
        return Knobs(TIERS[tier], INSERTIONS[insertion], TOP_KS[top_k], BLOCK_COUNTS[blocks])

    def plan(self, knobs: Knobs) -> ExecutionPlan:
        """The execution plan of `knobs`: the least important blocks after the position are dropped."""
        if knobs not in self._plans:
            dropped = drop_order(self.importance, knobs.insertion)[: MODEL_BLOCKS - knobs.blocks]
            kept = tuple(block for block in range(MODEL_BLOCKS) if block not in dropped)
            self._plans[knobs] = ExecutionPlan(knobs.tier, knobs.insertion, knobs.top_k, kept)
        return self._plans[knobs]

    @cached_property
    def distinct(self) -> tuple[Knobs, ...]:
        """One combination of knobs per distinct execution, the first in action order; 195 for MolmoE-1B."""
        seen: dict[tuple[str, tuple[int, ...]], Knobs] = {}
        for knobs in self.all:
            seen.setdefault((knobs.tier, self.plan(knobs).top_k_per_block), knobs)
        return tuple(seen.values())

    @cached_property
    def executions(self) -> npt.NDArray[np.int64]:
        """Index into `distinct` of every action's execution, (3, 5, 5, 5); -1 for illegal actions."""
        places = {(knobs.tier, self.plan(knobs).top_k_per_block): place for place, knobs in enumerate(self.distinct)}
        found = np.full(HEAD_SIZES, -1)
        for knobs in self.all:
            found[self.encode(knobs)] = places[knobs.tier, self.plan(knobs).top_k_per_block]
        return found

    @staticmethod
    def stage1_mask(*, has_image: bool = True, fits: BoolArray | None = None) -> BoolArray:
        """Legal pairs (40,) before vision; only the first pair of stage 2 is legal.

        Args:
            has_image: without one the tier is low.
            fits: (3, 5, 5, 5), which plans are predicted to meet the budget; None for all. A (tier, position) pair is
                legal if any completion fits. If none does, only the cheapest plan is left.
        """
        mask = _PINNED.copy()
        pairs = np.ones((len(TIERS), len(INSERTIONS)), np.bool_)
        pairs[1:] = has_image
        if fits is not None:
            pairs &= (fits & LEGAL).any(axis=(2, 3))
        mask[:STAGE1_PAIRS] = pairs.reshape(-1) if pairs.any() else _PINNED[:STAGE1_PAIRS]
        return mask

    @staticmethod
    def stage2_mask(insertion: int, fits: BoolArray | None = None) -> BoolArray:
        """Legal pairs (40,) after block `insertion`; only the first pair of stage 1 is legal.

        Args:
            fits: (5, 5), which (top-k, blocks) are predicted to meet the budget; None for all. If none does, 4 experts
                and the fewest blocks are left.
        """
        mask = _PINNED.copy()
        structural = LEGAL[0, INSERTIONS.index(insertion)]
        pairs = structural if fits is None else structural & fits
        if not pairs.any():
            pairs = structural & (np.arange(structural.size).reshape(structural.shape) == structural[0].argmax())
        mask[STAGE1_PAIRS:] = pairs.reshape(-1)
        return mask


def head_masks(pairs: BoolArray) -> BoolArray:
    """Options (..., 18) of the four heads that occur in any legal pair of `pairs` (..., 40)."""
    first = pairs[..., :STAGE1_PAIRS].reshape(*pairs.shape[:-1], *HEAD_SIZES[:2])
    second = pairs[..., STAGE1_PAIRS:].reshape(*pairs.shape[:-1], *HEAD_SIZES[2:])
    parts = (first.any(-1), first.any(-2), second.any(-1), second.any(-2))
    return np.concatenate(parts, axis=-1)


def nearest_legal(actions: npt.NDArray[np.int64], pairs: BoolArray) -> npt.NDArray[np.int64]:
    """Actions (B, 4) with each stage's pair replaced by the nearest legal one.

    The distance is the sum of index differences; ties take the lower, cheaper indices. A legal pair is unchanged.

    Args:
        actions: indices inside their heads.
        pairs: legal pairs (B, 40), at least one a stage.
    """
    result = np.array(actions, np.int64)
    for heads, legal in (((0, 1), pairs[:, :STAGE1_PAIRS]), ((2, 3), pairs[:, STAGE1_PAIRS:])):
        width = HEAD_SIZES[heads[1]]
        first, second = np.divmod(np.arange(legal.shape[1]), width)
        distance = np.abs(result[:, heads[0], None] - first) + np.abs(result[:, heads[1], None] - second)
        nearest = np.where(legal, distance, np.iinfo(np.int64).max).argmin(1)
        result[:, heads[0]], result[:, heads[1]] = first[nearest], second[nearest]
    return result


LEGAL: Final = np.broadcast_to(
    np.array([[n in block_options(p) for n in BLOCK_COUNTS] for p in INSERTIONS])[None, :, None, :], HEAD_SIZES
)
"""Which of the 3 x 5 x 5 x 5 actions decode to knobs."""
_PINNED: Final = np.isin(np.arange(PAIRS), (0, STAGE1_PAIRS))
