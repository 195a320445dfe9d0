"""`grpo.advantages=known`: groups completed with every plan whose outcome is known. Pure numpy.

An outcome does not depend on the budget, so one that is known gives the return of its plan in any group about its
sample. Known plans enter with their probability under the acting policy, sampled plans that were not known with the
share of the group's rollouts that took them. Where all plans are known this is the exact policy gradient; otherwise it
has the gradient's mean, with less variance than rollouts alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlanTree:
    """All decisions of N groups, before any of their rollouts has ended.

    Attributes:
        obs: of stage 2 after each (tier, position) pair, (N, 15, ...).
        logits: (N, 15, 40), the acting policy's.
        returns: (N, 15, 25) of every plan, NaN if its outcome is not known.
        executions: (N, distinct executions), which outcomes of the group's sample are known.
    """

    obs: Mapping[str, Array]
    logits: Array
    returns: Array
    executions: Array

    @staticmethod
    def concatenate(parts: Sequence["PlanTree"]) -> "PlanTree":
        """All parts in one, in order."""

        def joined(read: Callable[["PlanTree"], Array]) -> Array:
            return np.concatenate([read(part) for part in parts])

        obs = {key: joined(lambda part, key=key: part.obs[key]) for key in parts[0].obs}  # type: ignore[misc]
        return PlanTree(obs, joined(lambda p: p.logits), joined(lambda p: p.returns), joined(lambda p: p.executions))


@dataclass(frozen=True)
class TreeCredits:
    """Credits of the decisions of N groups (see `objective.LossInputs`).

    Attributes:
        first: (N, 15), of stage 1.
        second: (N, 15, 25), of stage 2 after each pair of stage 1.
        weights: (N, 15), how often stage 2 is reached by that pair; stage 1 counts 1.
    """

    first: FloatArray
    second: FloatArray
    weights: FloatArray


def tree_credits(
    first: npt.ArrayLike, second: npt.ArrayLike, known: npt.ArrayLike, taken: npt.NDArray[np.int64], sampled: FloatArray
) -> TreeCredits:
    """Credits whose gradient is that of the expected return, in expectation over the sampled plans.

    Baselines are expectations over known plans alone, of the group at stage 1 and of the pair chosen before at stage 2,
    so they do not depend on what was sampled and leave the mean as it is. A group without a known plan takes its
    rollouts' mean return, as GRPO does.

    Args:
        first: (N, 15) probabilities of stage 1 under the acting policy.
        second: (N, 15, 25) of stage 2 after each pair.
        known: (N, 15, 25) returns, NaN if not known.
        taken: (N, G, 2) pairs of stage 1 and stage 2 that the rollouts took.
        sampled: (N, G) their returns.
    """
    first_NA, second_NAC = np.asarray(first, np.float64), np.asarray(second, np.float64)
    known_NAC = np.asarray(known, np.float64)
    is_known = np.isfinite(known_NAC)
    returns_NAC = np.where(is_known, known_NAC, 0.0)
    joint_NAC = first_NA[..., None] * second_NAC * is_known
    value_N = _mean(returns_NAC, joint_NAC, (1, 2), sampled.mean(1))
    pair_value_NA = _mean(returns_NAC, second_NAC * is_known, (2,), np.broadcast_to(value_N[:, None], first_NA.shape))
    first_credit = (joint_NAC * (returns_NAC - value_N[:, None, None])).sum(2)
    second_credit = joint_NAC * (returns_NAC - pair_value_NA[..., None])
    group, pair, choice = np.arange(len(taken))[:, None], taken[..., 0], taken[..., 1]
    share_NG = ~is_known[group, pair, choice] / sampled.shape[1]
    np.add.at(first_credit, (group, pair), share_NG * (sampled - value_N[:, None]))
    np.add.at(second_credit, (group, pair, choice), share_NG * (sampled - pair_value_NA[group, pair]))
    reached_NA1 = first_NA[..., None]
    second_credit = np.divide(second_credit, reached_NA1, out=np.zeros_like(second_credit), where=reached_NA1 > 0)
    return TreeCredits(first_credit, second_credit, first_NA)


def _mean(values: FloatArray, weights: FloatArray, axes: tuple[int, ...], otherwise: FloatArray) -> FloatArray:
    """Weighted mean over axes; `otherwise` where all weights are 0."""
    total = weights.sum(axes)
    found = np.divide((values * weights).sum(axes), total, out=np.array(otherwise, np.float64), where=total > 0)
    return np.asarray(found)
