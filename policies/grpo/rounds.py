"""Rounds of sampling: which are under way, under which weights, and the chunks of work they are cut into.

With `max_staleness` k, the rounds up to k ahead of the one being learnt from are ordered as soon as weights are
there: so round r is sampled under the weights of max(0, r - k) updates, however fast anyone is. The weights of rounds
under way are part of a checkpoint; after a restore those rounds are sampled again under them, with the same result.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import ray

from envs.errors import UserError
from policies.grpo.advantages import complete_groups
from policies.grpo.runner import Rollouts
from policies.grpo.spread import MAX_ATTEMPTS, Spread

State = dict[int, tuple[int, Any]]
COUNTS: Final = ("chunks_rerun", "rollouts_discarded", "staleness")


class Chunk(NamedTuple):
    """One reset of all of a runner's environments."""

    round_number: int
    chunk: int
    attempt: int

    def __str__(self) -> str:
        return f"chunk {self.chunk} of round {self.round_number}"


class Behaviour(NamedTuple):
    """The weights a round is sampled under, and how many updates had made them."""

    updates: int
    weights: Any


class Rounds:
    """Rounds ordered and not yet collected.

    Args:
        chunks: of one round.
        ahead: rounds that may be under way while an earlier one is learnt from.
    """

    def __init__(self, spread: Spread, *, chunks: int, group_size: int, ahead: int) -> None:
        self.spread, self.chunks, self.group_size, self.ahead = spread, chunks, group_size, ahead
        self.behaviour: dict[int, Behaviour] = {}
        self.restored: set[int] = set()
        self.stats: dict[int, Mapping[str, float]] = {}

    def order(self, round_number: int, weights: Any) -> None:
        """Order `round_number` and those ahead of it: under `weights`, the latest, unless they have theirs already."""
        for number in range(round_number, round_number + self.ahead + 1):
            if number in self.behaviour and number not in self.restored:
                continue
            self.behaviour.setdefault(number, Behaviour(round_number, weights))
            self.restored.discard(number)
            for chunk in range(self.chunks):
                self._order(Chunk(number, chunk, 0))

    def collect(self, round_number: int) -> tuple[Rollouts, list[Any], dict[str, float]]:
        """Complete groups of a round, in chunk order, RLlib's metrics of all chunks, and `COUNTS`.

        Chunks that come back with incomplete groups are sampled again; what stays incomplete is left out and counted.

        Raises:
            UserError: not one complete group, or what `Spread.collect` raises.
        """
        kept: dict[int, Rollouts] = {}
        metrics: list[Any] = []
        todo, rerun, discarded = list(range(self.chunks)), self.spread.rerun, 0
        for attempt in range(MAX_ATTEMPTS):
            keys = [Chunk(round_number, chunk, attempt) for chunk in todo]
            for key in reversed(keys if attempt else []):
                self._order(key, first=True)
            for chunk, part in zip(list(todo), self.spread.collect(keys), strict=True):
                metrics.append(part.metrics)
                self.stats[part.runner] = part.stats
                rows, left_over = complete_groups(part.infos["context"], self.group_size)
                discarded += left_over
                if len(rows) > len(kept.get(chunk, ())) // self.group_size:
                    kept[chunk] = part.take(rows.reshape(-1)) if left_over else part
                if not left_over:
                    todo.remove(chunk)
            if not todo:
                break
        if not kept:
            raise UserError(
                f"no complete group of {self.group_size} rollouts arrived in round {round_number}: "
                f"{discarded} rollouts of partial groups were discarded; check the environment's group ids"
            )
        stale = round_number - self.behaviour.pop(round_number).updates
        counts = (self.spread.rerun - rerun, discarded, stale)
        return (
            Rollouts.concatenate([kept[chunk] for chunk in sorted(kept)]),
            metrics,
            dict(zip(COUNTS, map(float, counts), strict=True)),
        )

    def _order(self, key: Chunk, *, first: bool = False) -> None:
        job = key._asdict() | {"chunks": self.chunks, "weights": self.behaviour[key.round_number].weights}
        self.spread.add(key, job, first=first)

    # What a checkpoint holds of rounds under way: the weights they are sampled under.

    def state(self) -> State:
        """Round to updates and weights."""
        return {number: (made.updates, _fetched(made.weights)) for number, made in self.behaviour.items()}

    def restore(self, state: State) -> None:
        """Drop what is under way; the rounds of `state` are ordered again, under their weights, by the next `order`.

        Rounds staler than allowed (saved with a larger bound) are left out, and so sampled under the latest weights.
        """
        self.spread.drop()
        self.behaviour = {
            number: Behaviour(updates, ray.put(weights) if ray.is_initialized() else weights)
            for number, (updates, weights) in state.items()
            if number - updates <= self.ahead
        }
        self.restored = set(self.behaviour)


def summed(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Counters of several engines, added up."""
    return {key: sum(one.get(key, 0.0) for one in stats) for key in sorted({key for one in stats for key in one})}


def _fetched(weights: Any) -> Any:
    return ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
