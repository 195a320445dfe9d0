"""Knobs, their action encoding and masks, and the plans behind them."""

import pickle
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from envs.errors import UserError
from envs.knobs import (
    BLOCK_COUNTS,
    HEAD_SIZES,
    INSERTIONS,
    PAIRS,
    STAGE1_PAIRS,
    TIERS,
    TOP_KS,
    ExecutionPlan,
    Knobs,
    KnobSpace,
    block_options,
    drop_order,
    head_masks,
    nearest_legal,
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


fits_any = arrays(np.bool_, HEAD_SIZES)


def first_pairs(mask):
    return mask[:STAGE1_PAIRS].reshape(HEAD_SIZES[:2])


def second_pairs(mask):
    return mask[STAGE1_PAIRS:].reshape(HEAD_SIZES[2:])


@given(st.tuples(*(st.integers(0, size - 1) for size in HEAD_SIZES)))
def test_masks_allow_exactly_what_decodes(action):
    tier, insertion, top_k, blocks = action
    try:
        SPACE.decode(action)
        legal = True
    except UserError:
        legal = False
    assert legal == bool(second_pairs(SPACE.stage2_mask(INSERTIONS[insertion]))[top_k, blocks])
    assert first_pairs(SPACE.stage1_mask())[tier, insertion]


def test_masks_pin_the_other_stage_and_text_only_tiers():
    text_only, second = SPACE.stage1_mask(has_image=False), SPACE.stage2_mask(4)
    assert first_pairs(text_only).tolist() == [[True] * 5, [False] * 5, [False] * 5]
    assert np.flatnonzero(second_pairs(text_only)).tolist() == [0]
    assert np.flatnonzero(first_pairs(second)).tolist() == [0]
    assert second_pairs(second).tolist() == [[False, False, False, True, True]] * 5


@given(fits_any, st.booleans())
def test_a_pair_of_stage_1_is_legal_if_some_completion_fits(fits, has_image):
    """By brute force over all legal knobs; if none fits, only the cheapest plan is left at either stage."""
    legal = {SPACE.encode(knobs) for knobs in SPACE.all if has_image or knobs.tier == "low"}
    fitting = {action for action in legal if fits[action]}
    first = first_pairs(SPACE.stage1_mask(has_image=has_image, fits=fits))
    wanted = {action[:2] for action in fitting} or {(0, 0)}
    assert set(map(tuple, np.argwhere(first).tolist())) == wanted
    for tier, place in wanted:
        second = second_pairs(SPACE.stage2_mask(INSERTIONS[place], fits[tier, place]))
        completions = {action[2:] for action in fitting if action[:2] == (tier, place)}
        assert set(map(tuple, np.argwhere(second).tolist())) == (completions or {(0, 0)})


@given(st.integers(1, 5))
def test_a_stage_2_without_anything_that_fits_takes_the_cheapest(insertion):
    mask = second_pairs(SPACE.stage2_mask(insertion, np.zeros((5, 5), np.bool_)))
    assert np.argwhere(mask).tolist() == [[0, BLOCK_COUNTS.index(block_options(insertion)[0])]]


@given(arrays(np.int64, (3, 4), elements=st.integers(0, 2)), arrays(np.bool_, (3, PAIRS)))
def test_projection_takes_the_nearest_legal_pair(actions, masks):
    masks[:, [STAGE1_PAIRS - 1, PAIRS - 1]] = True
    found = nearest_legal(actions, masks)
    for action, mask, chosen in zip(actions, masks, found, strict=True):
        for pairs, some, ours in ((first_pairs, action[:2], chosen[:2]), (second_pairs, action[2:], chosen[2:])):
            legal = np.argwhere(pairs(mask))
            distances = np.abs(legal - some).sum(1)
            assert ours.tolist() == legal[distances.argmin()].tolist()


@given(arrays(np.bool_, (2, PAIRS)))
def test_head_masks_allow_what_some_pair_has(masks):
    for mask, heads in zip(masks, head_masks(masks), strict=True):
        first, second = first_pairs(mask), second_pairs(mask)
        assert heads.tolist() == [*first.any(1), *first.any(0), *second.any(1), *second.any(0)]


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


def test_all_is_the_complete_legal_product():
    everything = {(t, p, k, n) for t, p, k, n in product(TIERS, INSERTIONS, TOP_KS, BLOCK_COUNTS) if n >= p + 11}
    assert {(k.tier, k.insertion, k.top_k, k.blocks) for k in SPACE.all} == everything
