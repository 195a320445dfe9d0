"""Shapes, first behaviour and limits of the two stages and the budget feature."""

import math

import pytest
import torch

from envs.errors import UserError
from envs.knobs import BLOCK_COUNTS, block_options
from policies.networks import BUDGET_WIDTH, SHORTEST_WAVE, Stage1, Stage2, budget_feature


@pytest.mark.parametrize("d_model", [8, 2048])
def test_stage_1_starts_near_uniform(d_model: int) -> None:
    torch.manual_seed(0)
    out = Stage1(d_model, 256)(torch.randn(64, d_model) * 30, budget_feature(torch.linspace(-4, 1, 64)))
    assert out["tier_logits"].shape == (64, 3)
    assert out["insertion_logits"].shape == (64, 5)
    for logits in out.values():
        assert (logits.softmax(-1) * logits.shape[-1] - 1).abs().max() < 0.35


@pytest.mark.parametrize("d_model", [8, 2048])
def test_stage_2_starts_near_uniform_over_legal_totals(d_model: int) -> None:
    torch.manual_seed(0)
    position = torch.arange(1, 6).repeat(8)
    out = Stage2(d_model, 256)(torch.randn(40, d_model), budget_feature(torch.zeros(40)), position)
    assert out["top_k_logits"].shape == (40, 5)
    assert out["block_logits"].shape == (40, 5)
    for row, probabilities in zip(position.tolist(), out["block_logits"].softmax(-1), strict=True):
        legal = torch.tensor([n in block_options(row) for n in BLOCK_COUNTS])
        assert probabilities[~legal].sum() == 0
        assert (probabilities[legal] * legal.sum() - 1).abs().max() < 0.35


@pytest.mark.parametrize("position", [-1, 6])
def test_positions_outside_the_model_are_refused(position: int) -> None:
    with pytest.raises(UserError, match="not allowed"):
        Stage2(4, 256)(torch.zeros(1, 4), torch.zeros(1, BUDGET_WIDTH), torch.tensor([position]))


def test_every_input_reaches_every_output() -> None:
    torch.manual_seed(0)
    stage1, stage2 = Stage1(6, 256), Stage2(6, 256)
    x, feature = torch.randn(2, 6, requires_grad=True), torch.randn(2, BUDGET_WIDTH, requires_grad=True)
    outputs = [*stage1(x, feature).values(), *stage2(x, feature, torch.tensor([1, 1])).values()]
    for logits in outputs:
        for gradient in torch.autograd.grad(logits[:, 0].sum(), (x, feature), retain_graph=True):
            assert gradient.abs().max() > 0


def test_budget_feature_is_smooth_distinct_and_bounded() -> None:
    ratios = torch.linspace(math.log(0.02), math.log(4), 200)
    feature = budget_feature(ratios)
    assert feature.shape == (200, BUDGET_WIDTH)
    assert feature.abs().max() <= 1.0
    assert torch.equal(feature, budget_feature(ratios[:, None]))
    distances = torch.cdist(feature, feature)
    near = distances.diagonal(offset=1)
    assert near.max() < 0.25 * distances[0, -1]
    assert (distances + torch.eye(200) * 9).min() > 1e-3
    # Up to half the shortest wave (a factor of 1.45 in the budget), a budget further away looks further away.
    steps = int(SHORTEST_WAVE / 2 / (ratios[1] - ratios[0]))
    assert (distances[0, 1:steps] > distances[0, : steps - 1]).all()
