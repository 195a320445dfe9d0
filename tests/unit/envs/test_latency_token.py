"""The frozen encoder from budget to token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UserError
from envs.latency_token import LEVELS, LOG_RATIO_HIGH, LOG_RATIO_LOW, budget_level, level_token


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_levels_rise_with_the_budget(a, b):
    low, high = sorted((a, b))
    assert 0 <= budget_level(low) <= budget_level(high) < LEVELS


@pytest.mark.parametrize("level", range(LEVELS))
def test_a_level_is_the_nearest_to_its_middle(level):
    step = (LOG_RATIO_HIGH - LOG_RATIO_LOW) / (LEVELS - 1)
    middle = LOG_RATIO_LOW + level * step
    assert [budget_level(middle + 0.49 * side * step) for side in (-1, 0, 1)] == [level] * 3


def test_levels_cover_an_eighth_to_twice_the_reference():
    assert budget_level(math.log(1 / 8)) == 0
    assert budget_level(math.log(2)) == 15
    assert budget_level(0.0) == round(15 * math.log(8) / math.log(16))


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf])
def test_impossible_budgets_have_no_level(ratio):
    with pytest.raises(UserError, match="finite budget"):
        budget_level(ratio)


@pytest.mark.parametrize("width", [2, 64, 2048])
def test_tokens_have_the_length_asked_for(width):
    for level in range(LEVELS):
        token = level_token(level, width, 3, norm=2.5)
        assert token.shape == (width,)
        assert token.dtype == torch.float32
        assert float(token.norm()) == pytest.approx(2.5, rel=1e-5)


def test_tokens_are_frozen_by_the_seed():
    assert torch.equal(level_token(5, 64, 1), level_token(5, 64, 1))
    assert not torch.allclose(level_token(5, 64, 1), level_token(5, 64, 2))
    # Pinned: latency tokens in a store outlive this process.
    assert level_token(5, 4, 0).tolist() == pytest.approx(PINNED, abs=1e-6)


def test_near_levels_have_near_tokens():
    tokens = torch.stack([level_token(level, 256, 0) for level in range(LEVELS)])
    likeness = (tokens @ tokens.T).numpy()
    neighbours = np.diag(likeness, 1)
    assert neighbours.min() > 0.85
    assert neighbours.max() < 0.999
    assert abs(likeness[0, 15]) < 0.4
    for row in likeness[:1]:
        assert all(row[i] > row[i + 1] - 0.02 for i in range(6))


@pytest.mark.parametrize("arguments", [(16, 8), (-1, 8), (0, 0), (0, 8, 0, 0.0), (0, 8, 0, math.nan)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(UserError):
        level_token(*arguments)


PINNED = [-0.471093, -0.46887, 0.029388, -0.746571]
