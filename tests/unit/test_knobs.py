"""Knobs, their action encoding and masks, and the plans behind them."""

import pickle
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UserError
from envs.knobs import (
    BLOCK_COUNTS,
    HEAD_SIZES,
    INSERTIONS,
    TIERS,
    TOP_KS,
    ExecutionPlan,
    Knobs,
    KnobSpace,
    block_options,
    drop_order,
)

PUBLISHED = (0.56, 0.08, 0.004, 0.03, 0.001, 0.08, 0.04, 0.05, 0.07, 0.06, 0.003, 0.04, 0.06, 0.002, 0.06, 0.06)
SPACE = KnobSpace(PUBLISHED)
legal_knobs = st.sampled_from(SPACE.all)
importances = st.lists(st.floats(-10, 10), min_size=16, max_size=16)


def test_published_importance_gives_225_knobs_and_195_executions():
    assert len(SPACE.all) == len(set(SPACE.all)) == 225
    assert len(SPACE.distinct) == 195


def test_published_importance_drops_4_13_10_2():
    assert drop_order(PUBLISHED, 1)[:4] == (4, 13, 10, 2)
    assert SPACE.plan(SPACE.cheapest).blocks == (0, 1, 3, 5, 6, 7, 8, 9, 11, 12, 14, 15)


def test_published_importance_spares_the_prefix():
    assert SPACE.plan(Knobs("low", 3, 4, 14)).blocks == tuple(b for b in range(16) if b not in (4, 13))
    assert SPACE.plan(Knobs("low", 5, 4, 16)).blocks == tuple(range(16))


@pytest.mark.parametrize(
    ("insertion", "totals"),
    [(1, (12, 13, 14, 15, 16)), (2, (13, 14, 15, 16)), (3, (14, 15, 16)), (4, (15, 16)), (5, (16,))],
)
def test_block_options(insertion, totals):
    assert block_options(insertion) == totals


@given(legal_knobs)
def test_actions_round_trip(knobs):
    assert SPACE.decode(SPACE.encode(knobs)) == knobs


@given(st.tuples(*(st.integers(0, size - 1) for size in HEAD_SIZES)))
def test_masks_allow_exactly_what_decodes(action):
    tier, insertion, top_k, blocks = action
    mask = SPACE.stage2_mask(INSERTIONS[insertion])
    allowed = mask[8 + top_k] and mask[13 + blocks]
    try:
        SPACE.decode(action)
        legal = True
    except UserError:
        legal = False
    assert legal == bool(allowed)
    assert SPACE.stage1_mask()[tier]
    assert SPACE.stage1_mask()[3 + insertion]


def test_masks_pin_the_other_stage_and_text_only_tiers():
    heads = np.split(SPACE.stage1_mask(has_image=False), np.cumsum(HEAD_SIZES)[:-1])
    assert [head.tolist() for head in heads] == [
        [True, False, False],
        [True] * 5,
        [True] + [False] * 4,
        [True] + [False] * 4,
    ]
    heads = np.split(SPACE.stage2_mask(4), np.cumsum(HEAD_SIZES)[:-1])
    assert [head.tolist() for head in heads] == [
        [True, False, False],
        [True] + [False] * 4,
        [True] * 5,
        [False, False, False, True, True],
    ]


@given(importances, legal_knobs)
def test_plans_keep_prefix_and_drop_the_least_important(importance, knobs):
    plan = KnobSpace(importance).plan(knobs)
    assert len(plan.blocks) == knobs.blocks
    assert plan.blocks[: knobs.insertion] == tuple(range(knobs.insertion))
    dropped = set(range(16)) - set(plan.blocks)
    droppable = [importance[b] for b in plan.blocks if b >= knobs.insertion]
    assert all(importance[b] <= min(droppable) for b in dropped)
    assert set(plan.top_k_per_block[knobs.insertion :]) <= {0, knobs.top_k}
    assert plan.top_k_per_block[: knobs.insertion] == (8,) * knobs.insertion


@given(importances)
def test_distinct_knobs_run_differently_and_cover_all(importance):
    space = KnobSpace(importance)

    def execution(knobs):
        return knobs.tier, space.plan(knobs).top_k_per_block

    kept = [execution(knobs) for knobs in space.distinct]
    assert len(kept) == len(set(kept))
    assert set(kept) == {execution(knobs) for knobs in space.all}


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        (("huge", 1, 8, 16), "'huge'"),
        (("low", 0, 8, 16), "0"),
        (("low", 6, 8, 16), "6"),
        (("low", 1, 3, 16), "3"),
        (("low", 1, 9, 16), "9"),
        (("low", 5, 8, 15), "16 to 16"),
        (("low", 1, 8, 11), "12 to 16"),
    ],
)
def test_illegal_knobs_are_named(knobs, named):
    with pytest.raises(UserError, match=named):
        Knobs(*knobs)


@pytest.mark.parametrize(
    "blocks",
    [(), (1, 2), (0, 0, 1), (1, 0), (0, 16), (-1, 0)],
)
def test_impossible_block_sets_are_refused(blocks):
    with pytest.raises(UserError):
        ExecutionPlan(blocks=blocks)


def test_a_plan_needs_its_prefix():
    with pytest.raises(UserError, match="prefix"):
        ExecutionPlan(insertion=3, blocks=(0, 1, *range(3, 16)))
    assert ExecutionPlan(insertion=3, blocks=[0, 1, 2]).blocks == (0, 1, 2)


@pytest.mark.parametrize("importance", [(1.0,) * 15, (1.0,) * 17, (float("nan"), *(1.0,) * 15)])
def test_importance_is_checked(importance):
    with pytest.raises(UserError, match="16 finite scores"):
        KnobSpace(importance)


@pytest.mark.parametrize("action", [(3, 0, 0, 0), (0, 0, 0), (0, 4, 0, 0), (-1, 0, 0, 4)])
def test_actions_outside_are_refused(action):
    with pytest.raises(UserError):
        SPACE.decode(action)


def test_errors_survive_pickling():
    with pytest.raises(UserError) as caught:
        Knobs("low", 1, 8, 11)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), copy.message) == (UserError, caught.value.message)


def test_all_is_the_whole_legal_product():
    everything = {(t, p, k, n) for t, p, k, n in product(TIERS, INSERTIONS, TOP_KS, BLOCK_COUNTS) if n >= p + 11}
    assert {(k.tier, k.insertion, k.top_k, k.blocks) for k in SPACE.all} == everything
