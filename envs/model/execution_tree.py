"""Which block runs on which rows: a tree of computations that executions of one prompt share.

Two rows of one prompt compute the same until their plans differ. A *node* is one such computation, named by
`(prompt, experts per token in the blocks so far)`, 0 where a block is dropped. Each block runs once per node that keeps
it, on all of them together. Everything here is arithmetic on small tuples; the tensors follow in `prefill`.

Example: two rows of prompt 0 in a model cut to three blocks, top-k (8, 4, 4) and (8, 0, 8). Before block 0 there is one
state, the embeddings `(0, ())`. The levels are:

    block 0   run (0, (8,))                           both rows continue from it
    block 1   run (0, (8, 4)), pass (0, (8, 0))       the second row drops this block: its node passes unchanged
    block 2   finish (0, (8, 4, 4)), (0, (8, 0, 8))   nothing follows, so only the last token is computed

Four computations instead of five, two of them on one token. With `given=1` (block 0 already run at full top-k) block 0
is empty, and `(0, (8,))` enters at block 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from envs.knobs import MODEL_BLOCKS, TOP_KS, ExecutionPlan

FULL_TOP_K = max(TOP_KS)

Node = tuple[int, tuple[int, ...]]
"""A computation: its prompt, and the experts per token in each block so far (0: dropped)."""


@dataclass(frozen=True)
class Level:
    """What happens at one block.

    Its input has one state per node: those of the level before (`run`, then `skip`), then those that enter.

    Attributes:
        enter: prompts whose state before this block, at full top-k, joins the input.
        run: nodes computed on all their tokens.
        final: nodes computed at their last token alone, as this is the last block of all their rows.
        skip: nodes that drop this block and pass unchanged.
        sources: place in the input of each node of `run`, `final` and `skip`, in this order.
        row_nodes: each row's place in `run` then `final`; -1 where the row does not compute this block here.
        ending: rows for which this is the last block kept.
    """

    enter: tuple[int, ...]
    run: tuple[Node, ...]
    final: tuple[Node, ...]
    skip: tuple[Node, ...]
    sources: tuple[int, ...]
    row_nodes: tuple[int, ...]
    ending: tuple[int, ...]


def per_row(plan: ExecutionPlan | Sequence[ExecutionPlan], rows: int) -> tuple[tuple[int, ...], ...]:
    """Experts per token in each block, for each of `rows` rows, from one plan or one per row."""
    if isinstance(plan, ExecutionPlan):
        return (plan.top_k_per_block,) * rows
    if len(plan) != rows:
        raise ValueError(f"{len(plan)} plans for {rows} rows: give one plan, or one per row")
    return tuple(single.top_k_per_block for single in plan)


@lru_cache(maxsize=256)
def build_execution_tree(
    prompts: tuple[int, ...], top_k: tuple[tuple[int, ...], ...], given: int = 0
) -> tuple[Level, ...]:
    """Levels, one per block.

    Args:
        prompts: each row's prompt; rows of one prompt share what they can.
        top_k: each row's experts per token in each block, 0 where the block is dropped.
        given: how many first blocks are already computed at full top-k for every prompt. Rows that keep no other
            block appear nowhere.
    """
    last = [last_block(ks) for ks in top_k]
    # All that a row shares with the given blocks is done: it enters where it leaves them.
    entry = [entry_block(ks, given) for ks in top_k]
    rows = range(len(top_k))
    states: list[Node] = []
    levels = []
    for block in range(MODEL_BLOCKS):
        enter = tuple(dict.fromkeys(prompts[row] for row in rows if entry[row] == block <= last[row]))
        states += [(prompt, (FULL_TOP_K,) * block) for prompt in enter]
        place = {node: i for i, node in enumerate(states)}
        nodes = {row: (prompts[row], top_k[row][: block + 1]) for row in rows if entry[row] <= block <= last[row]}
        # Children of one state are next to each other.
        children = sorted(dict.fromkeys(nodes.values()), key=lambda node: place[_parent(node)])
        continuing = {node for row, node in nodes.items() if last[row] > block}
        run = [node for node in children if node[1][block] and node in continuing]
        final = [node for node in children if node[1][block] and node not in continuing]
        skip = [node for node in children if not node[1][block]]
        computed = {node: i for i, node in enumerate([*run, *final])}
        levels.append(
            Level(
                enter,
                tuple(run),
                tuple(final),
                tuple(skip),
                tuple(place[_parent(node)] for node in [*run, *final, *skip]),
                tuple(computed.get(nodes[row], -1) if row in nodes else -1 for row in rows),
                tuple(row for row in nodes if last[row] == block),
            )
        )
        states = [*run, *skip]
    return tuple(levels)


def tree_size(levels: Sequence[Level]) -> int:
    """Prompts' worth of memory that a prefill takes at most: states of one level, or keys and values of all blocks."""
    widest = max(len(level.run) + len(level.skip) for level in levels)
    cached = sum(len(level.run) + len(level.final) for level in levels)
    return max(1, widest, -(-cached // MODEL_BLOCKS))


def last_block(top_k: tuple[int, ...]) -> int:
    """The last block that is kept."""
    return max(block for block, k in enumerate(top_k) if k)


def entry_block(top_k: tuple[int, ...], given: int) -> int:
    """The first block that is not given: where a row leaves full top-k, or where the given blocks end."""
    return next((block for block in range(given) if top_k[block] != FULL_TOP_K), given)


def _parent(node: Node) -> Node:
    return node[0], node[1][:-1]
