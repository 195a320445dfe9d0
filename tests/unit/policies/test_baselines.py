"""Baselines act legally at both stages, and repeat themselves."""

import pickle

import numpy as np
import pytest

from envs.errors import UserError
from envs.knobs import HEAD_SIZES, KnobSpace
from policies.baselines import FixedKnobs, LookupKnobs, RandomKnobs

STARTS = np.cumsum((0, *HEAD_SIZES[:-1]))
SPACE = KnobSpace([0.0] * 16)
FULL, CHEAPEST = SPACE.encode(SPACE.full), SPACE.encode(SPACE.cheapest)


def observation(mask: np.ndarray, budgets: list[float]) -> dict[str, np.ndarray]:
    rows = len(budgets)
    return {
        "budget": np.array(budgets, np.float32)[:, None],
        "action_mask": np.broadcast_to(mask, (rows, len(mask))).astype(np.float32),
    }


def test_fixed_knobs_give_each_stage_its_part() -> None:
    act = FixedKnobs(FULL).start((0,))
    assert act(observation(KnobSpace.stage1_mask(), [0.0, -3.0])).tolist() == [[2, 0, 0, 0]] * 2
    assert act(observation(KnobSpace.stage2_mask(1), [0.0])).tolist() == [[0, 0, 4, 4]]


def test_a_text_request_falls_back_to_the_only_tier() -> None:
    act = FixedKnobs(FULL).start((0,))
    assert act(observation(KnobSpace.stage1_mask(has_image=False), [0.0])).tolist() == [[0, 0, 0, 0]]


def test_a_lookup_table_goes_by_budget() -> None:
    act = LookupKnobs((-1.0,), (CHEAPEST, FULL)).start((0,))
    assert act(observation(KnobSpace.stage2_mask(1), [-2.0, 0.0])).tolist() == [[0, 0, 0, 0], [0, 0, 4, 4]]


@pytest.mark.parametrize("mask", [KnobSpace.stage1_mask(), *map(KnobSpace.stage2_mask, range(1, 6))])
def test_random_knobs_are_legal_uniform_and_repeatable(mask: np.ndarray) -> None:
    obs = observation(mask, [0.0] * 6000)
    actions = RandomKnobs(3).start((5,))(obs)
    assert mask[actions + STARTS].all()
    assert (actions == RandomKnobs(3).start((5,))(obs)).all()
    if mask.sum() > 4:
        assert (actions != RandomKnobs(3).start((6,))(obs)).any()
    for head, (start, size) in enumerate(zip(STARTS, HEAD_SIZES, strict=True)):
        legal = mask[start : start + size]
        shares = np.bincount(actions[:, head], minlength=size) / len(actions)
        np.testing.assert_allclose(shares[legal], 1 / legal.sum(), atol=0.03)


def test_baselines_travel_to_other_processes() -> None:
    for baseline in (FixedKnobs(FULL), LookupKnobs((0.0,), (FULL, CHEAPEST)), RandomKnobs()):
        assert pickle.loads(pickle.dumps(baseline)) == baseline


@pytest.mark.parametrize(
    ("edges", "actions"),
    [((), ()), ((0.0,), (FULL,)), ((1.0, 0.0), (FULL,) * 3), ((), ((0, 4, 0, 0),)), ((), ((3, 0, 0, 0),))],
)
def test_tables_that_cannot_be_used_are_refused(edges: tuple, actions: tuple) -> None:
    with pytest.raises(UserError, match="not allowed"):
        LookupKnobs(edges, actions)
