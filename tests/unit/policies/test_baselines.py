"""Baselines act legally at both stages, and repeat themselves."""

import pickle

import numpy as np
import pytest

from envs.errors import UserError
from envs.knobs import STAGE1_PAIRS, KnobSpace
from policies.baselines import FixedKnobs, LookupKnobs, RandomKnobs

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
    pairs = np.stack((actions[:, 0] * 5 + actions[:, 1], STAGE1_PAIRS + actions[:, 2] * 5 + actions[:, 3]), axis=1)
    assert mask[pairs].all()
    assert (actions == RandomKnobs(3).start((5,))(obs)).all()
    assert (actions != RandomKnobs(3).start((6,))(obs)).any()
    shares = np.bincount(pairs.reshape(-1), minlength=len(mask)) / len(actions)
    for legal, share in zip(np.split(mask, [STAGE1_PAIRS]), np.split(shares, [STAGE1_PAIRS]), strict=True):
        np.testing.assert_allclose(share, legal / legal.sum(), atol=0.03)


def test_fixed_knobs_take_the_nearest_plan_that_fits() -> None:
    fits = np.zeros((3, 5, 5, 5), bool)
    fits[1, 0, 2, 4] = fits[0, 0, 0, 0] = True
    act = FixedKnobs(FULL).start((0,))
    assert act(observation(KnobSpace.stage1_mask(fits=fits), [0.0])).tolist() == [[1, 0, 0, 0]]
    assert act(observation(KnobSpace.stage2_mask(1, fits[1, 0]), [0.0])).tolist() == [[0, 0, 2, 4]]


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
