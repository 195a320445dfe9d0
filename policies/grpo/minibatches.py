"""How an epoch's rows are cut into minibatches. Pure numpy; the generator is the caller's."""

import numpy as np
import numpy.typing as npt


def minibatches(
    rows: int, size: int, learners: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], int]:
    """One epoch's row order, cut so that several learners together see the same minibatches as one.

    Rows are shuffled and padded to equal minibatches of about `size`; padding repeats rows at weight 0, and
    the other weights make the epoch's mean weight 1. Learner l gets the l-th contiguous share, which holds
    its slice of each minibatch.

    Args:
        rows: number of rows R to cover, each exactly once.
        size: wished size of a minibatch over all learners.

    Returns:
        Row indices (P,), weights (P,) and the size of a minibatch over all learners.
    """
    count = max(1, round(rows / size))
    size = -(-rows // (count * learners)) * learners
    padded = count * size
    order = np.resize(generator.permutation(rows), padded)
    weights = np.where(np.arange(padded) < rows, padded / rows, 0.0).astype(np.float32)
    spread = np.arange(padded).reshape(count, learners, size // learners).transpose(1, 0, 2).reshape(-1)
    return order[spread], weights[spread], size
