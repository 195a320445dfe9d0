"""Rollouts as rows for the learner: one per decision, with the credit of every pair of choices."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core.columns import Columns

from envs.knobs import HEAD_SIZES, PAIRS, STAGE1_PAIRS
from policies.distribution import KnobDistribution
from policies.grpo.env_runner import Rollouts
from policies.grpo.known_plans import tree_credits

CREDITS: Final = "credits"
WEIGHTS: Final = "row_weights"
ENTROPY_SHARES: Final = "entropy_shares"
Array = npt.NDArray[Any]


def sampled_decisions(rollouts: Rollouts, advantages: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Both decisions of N rollouts, 2 N rows, with the rollout's advantage (N,) as the credit of the pairs taken."""
    credits = np.zeros((len(rollouts), 2, PAIRS), np.float32)
    np.put_along_axis(credits, _columns_taken(rollouts.actions), advantages[:, None, None], axis=2)
    return {
        Columns.OBS: {key: value.reshape(-1, *value.shape[2:]) for key, value in rollouts.obs.items()},
        Columns.ACTION_DIST_INPUTS: rollouts.logits.reshape(-1, rollouts.logits.shape[-1]),
        CREDITS: credits.reshape(-1, PAIRS),
        WEIGHTS: np.ones(2 * len(rollouts), np.float32),
    }


def known_decisions(rollouts: Rollouts, returns: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Every decision that N groups could reach, with `known_plans.tree_credits`; weights have mean 1.

    Args:
        returns: (N, G) of the rollouts.
    """
    tree, (groups, size) = rollouts.tree, returns.shape
    if tree is None:
        raise RuntimeError("the rollouts came without the plans that are known")
    first_logits = rollouts.logits[::size, 0]
    first = _probabilities(first_logits)[:, :STAGE1_PAIRS]
    second = _probabilities(tree.logits.reshape(-1, PAIRS))[:, STAGE1_PAIRS:].reshape(tree.returns.shape)
    taken = _columns_taken(rollouts.actions)[..., 0].reshape(groups, size, 2) - np.array([0, STAGE1_PAIRS])
    found = tree_credits(first, second, tree.returns, taken, returns)
    reached = found.weights > 0
    credits = np.zeros((groups + int(reached.sum()), PAIRS), np.float32)
    credits[:groups, :STAGE1_PAIRS] = found.first
    credits[groups:, STAGE1_PAIRS:] = found.second[reached]
    weights = np.concatenate((np.ones(groups), found.weights[reached]))
    return {
        Columns.OBS: {k: np.concatenate((v[::size, 0], tree.obs[k][reached])) for k, v in rollouts.obs.items()},
        Columns.ACTION_DIST_INPUTS: np.concatenate((first_logits, tree.logits[reached])),
        CREDITS: credits,
        WEIGHTS: (weights / weights.mean()).astype(np.float32),
    }


def take(columns: Mapping[str, Any], rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Rows of columns, in the order given."""
    return {key: take(value, rows) if isinstance(value, Mapping) else value[rows] for key, value in columns.items()}


def executions_used(rollouts: Rollouts, group_size: int) -> npt.NDArray[np.int64]:
    """Distinct model executions behind these rollouts, as numbers that differ between (sample, execution) pairs."""
    infos = rollouts.infos
    samples, executions = infos["sample"], infos["execution"]
    if rollouts.tree is not None:
        groups, known = np.nonzero(rollouts.tree.executions)
        samples = np.concatenate((samples, samples[::group_size][groups]))
        executions = np.concatenate((executions, known))
    return np.unique(samples.astype(np.int64) << 16 | executions)


def _columns_taken(actions: Array) -> Array:
    """Columns (N, 2, 1) among the 40 pairs that the decisions of N rollouts took, from actions (N, 2, 4)."""
    first = actions[:, 0, 0] * HEAD_SIZES[1] + actions[:, 0, 1]
    second = STAGE1_PAIRS + actions[:, 1, 2] * HEAD_SIZES[3] + actions[:, 1, 3]
    return np.stack((first, second), 1)[..., None].astype(np.int64)


def _probabilities(logits: Array) -> npt.NDArray[np.float64]:
    """Probabilities (B, 40) of both stages' pairs."""
    log_probs = KnobDistribution(torch.from_numpy(logits)).stage_log_probs
    return np.asarray(torch.cat(log_probs, -1).double().exp().numpy())
