"""Group-relative advantages: how each rollout did against the others of its (sample, budget). Pure numpy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages (N, G), and which of the N groups had equal returns (N,) and so teach nothing."""

    values: FloatArray
    equal: npt.NDArray[np.bool_]

    @property
    def equal_share(self) -> float:
        """Share of groups whose returns are all equal."""
        return float(self.equal.mean()) if self.equal.size else 0.0


def complete_groups(group_ids: npt.ArrayLike, group_size: int) -> tuple[IntArray, int]:
    """Rows of every complete group.

    Args:
        group_ids: (B,) id of each rollout's group, in any order.

    Returns:
        Row indices (N, G), groups in order of first appearance and rows in order within a group, and the number of
        rollouts left over because their group is not complete.
    """
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(np.asarray(group_ids).tolist()):
        rows.setdefault(group, []).append(row)
    complete = [members for members in rows.values() if len(members) == group_size]
    left_over = sum(len(members) for members in rows.values()) - group_size * len(complete)
    return np.array(complete, dtype=np.int64).reshape(-1, group_size), left_over


def group_advantages(
    returns: npt.ArrayLike, *, divide_by_spread: bool = True, epsilon: float = 1e-6
) -> GroupAdvantages:
    """Return minus the group's mean, optionally over the group's standard deviation.

    With the division this is GRPO (Shao et al. 2024, DeepSeekMath, section 4.1.2); without it, the unbiased form of
    Liu et al. 2025 (Dr. GRPO), in which groups with little spread weigh little.

    Args:
        returns: (N, G), one row per group.
        epsilon: added to the spread; also the spread up to which returns count as equal.
    """
    returns_NG = np.asarray(returns, dtype=np.float64)
    centred = returns_NG - returns_NG.mean(axis=1, keepdims=True)
    spread_N1 = returns_NG.std(axis=1, keepdims=True)
    equal_N = spread_N1[:, 0] <= epsilon
    scale = np.where(equal_N[:, None], np.inf, spread_N1 + epsilon if divide_by_spread else 1.0)
    return GroupAdvantages(centred / scale, equal_N)
