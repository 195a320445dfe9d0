"""Which block runs on which rows: a forest of executions with shared beginnings.

Two rows of the same prompt compute the same thing until their plans differ. A *node* stands for one such computation:
(prompt, experts per token in the blocks so far). Each block runs once per node that keeps it, on all of them together.
Everything here is host-side arithmetic over small tuples; the tensors follow in `language`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from envs.knobs import MODEL_BLOCKS, TOP_KS, ExecutionPlan

FULL_TOP_K = max(TOP_KS)


@dataclass(frozen=True)
class Nodes:
    """Some nodes of one level: where their state lies in the level's input, their prompt, their experts per token."""

    sources: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    top_k: tuple[int, ...] = ()


@dataclass(frozen=True)
class Level:
    """What happens at one block. Its input is the previous level's output followed by the entering prompts.

    `run` nodes are computed whole; `final` nodes only at their last token, as no row goes on from them; `skip` nodes
    pass. The output is `run` then `skip`. `row_nodes` gives each row's place in `run` then `final`, or -1 where it
    drops the block. `ending` lists (row, place) pairs of rows for which this is the last kept block.
    """

    enter: tuple[int, ...]
    run: Nodes
    final: Nodes
    skip: tuple[int, ...]
    row_nodes: tuple[int, ...]
    ending: tuple[tuple[int, int], ...]


@dataclass
class _Node:
    prompt: int
    top_k: int
    source: int
    rows: list[int] = field(default_factory=list)


def per_row(plan: ExecutionPlan | Sequence[ExecutionPlan], rows: int) -> tuple[tuple[int, ...], ...]:
    """Experts per token in each block, for each of `rows` rows, from one plan or one per row."""
    if isinstance(plan, ExecutionPlan):
        return (plan.top_k_per_block,) * rows
    if len(plan) != rows:
        raise ValueError(f"{len(plan)} plans for {rows} rows: give one plan, or one per row")
    return tuple(single.top_k_per_block for single in plan)


@lru_cache(maxsize=256)
def build_schedule(
    prompts: tuple[int, ...],
    top_k: tuple[tuple[int, ...], ...],
    *,
    given: int = 0,
    last_only: bool = True,
) -> tuple[Level, ...]:
    """Levels, one per block.

    Args:
        prompts: each row's prompt; rows of one prompt share what they can.
        top_k: each row's experts per token in each block, 0 where the block is dropped.
        given: how many first blocks are already computed at full top-k for every prompt. Rows that keep no other
            block appear nowhere.
        last_only: compute a row's last kept block only at its last token.
    """
    last = [max(block for block in range(MODEL_BLOCKS) if ks[block]) for ks in top_k]
    # A row waits outside while all it has seen is given, and enters where it leaves the given path.
    entry = [entry_block(ks, given) for ks in top_k]
    active: list[_Node] = []
    levels = []
    for block in range(MODEL_BLOCKS):
        entering: dict[int, _Node] = {}
        for row, prompt in enumerate(prompts):
            if entry[row] == block <= last[row]:
                node = entering.setdefault(prompt, _Node(prompt, 0, len(active) + len(entering)))
                node.rows.append(row)
        children = _children([*active, *entering.values()], top_k, block)
        run, final, skip = [], [], []
        for node in children:
            if not node.top_k:
                skip.append(node)
            elif last_only and all(last[row] == block for row in node.rows):
                final.append(node)
            else:
                run.append(node)
        row_nodes = [-1] * len(top_k)
        for place, node in enumerate([*run, *final]):
            for row in node.rows:
                row_nodes[row] = place
        ending = tuple((row, place) for row, place in enumerate(row_nodes) if place >= 0 and last[row] == block)
        levels.append(
            Level(
                tuple(entering),
                _nodes(run),
                _nodes(final),
                tuple(n.source for n in skip),
                tuple(row_nodes),
                ending,
            )
        )
        active = _survivors(run, skip, last, block, last_only)
    return tuple(levels)


def entry_block(top_k: tuple[int, ...], given: int) -> int:
    """The first block that is not given: where a row leaves full top-k, or where the given blocks end."""
    for block in range(given):
        if top_k[block] != FULL_TOP_K:
            return block
    return given


def _children(nodes: Sequence[_Node], top_k: Sequence[tuple[int, ...]], block: int) -> list[_Node]:
    children: list[_Node] = []
    for place, node in enumerate(nodes):
        split: dict[int, _Node] = {}
        for row in node.rows:
            k = top_k[row][block]
            split.setdefault(k, _Node(node.prompt, k, place)).rows.append(row)
        children.extend(split.values())
    return children


def _survivors(run: list[_Node], skip: list[_Node], last: list[int], block: int, last_only: bool) -> list[_Node]:
    """The level's output as the next level's input. Rows past their last block leave if only that one is wanted."""
    output = [_Node(node.prompt, node.top_k, 0, list(node.rows)) for node in [*run, *skip]]
    if last_only:
        for node in output:
            node.rows = [row for row in node.rows if last[row] > block]
    return output


def _nodes(nodes: Sequence[_Node]) -> Nodes:
    return Nodes(
        tuple(node.source for node in nodes),
        tuple(node.prompt for node in nodes),
        tuple(node.top_k for node in nodes),
    )
