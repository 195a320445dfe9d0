"""Methods of two stages choose as the controller does in serving, under any mask."""

import numpy as np
import pytest
import torch

from envs.errors import UserError
from envs.knobs import HEAD_SIZES, INSERTIONS, TIERS, KnobSpace
from policies.baselines.rules import KnownOutcomes, Requests, choose
from policies.baselines.two_stage import Trained, ValueHeads
from policies.controller import Controller
from policies.fused import FusedController
from ray_ctrl.serving import RequestController

SPACE = KnobSpace([1.0 - 0.05 * block for block in range(16)])
ACTIONS = np.array([SPACE.encode(knobs) for knobs in SPACE.all])
D = 8


def known(samples: int, rng: np.random.Generator) -> KnownOutcomes:
    """Samples of two kinds that the token alone tells apart: one needs the high tier, the other 16 blocks."""
    kind = rng.integers(0, 2, samples)
    tokens = rng.normal(size=(samples, 15, D)) * 0.1
    tokens[:, :, 0] += 2.0 * kind[:, None] - 1.0
    right = np.where(kind[:, None] == 0, ACTIONS[:, 2] == 4, ACTIONS[:, 3] == 4).astype(float)
    latency = 10.0 + ACTIONS @ np.array([4.0, 0.1, 2.0, 2.0]) + np.zeros((samples, 1))
    return KnownOutcomes(rng.normal(size=(samples, D)), ACTIONS, right, latency, tokens=tokens)


def requests(some: KnownOutcomes, budget: float, log_ratio: float = -0.3) -> Requests:
    count = len(some.features)
    return Requests(
        some.features, np.full(count, budget), some.latency_ms, tokens=some.tokens, log_ratio=np.full(count, log_ratio)
    )


@pytest.mark.parametrize("without", [(), ("question",), ("token",), ("position",)])
@pytest.mark.parametrize("budget", [1.0, 14.0, 20.0, 26.0, 1000.0])
def test_a_trained_controller_chooses_as_it_serves(budget: float, without: tuple[str, ...]) -> None:
    torch.manual_seed(3)
    controller = Controller(D, 16, without).eval()
    for parameter in controller.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    some = known(24, np.random.default_rng(0))
    rule = Trained(controller, "ours")
    rule.fit(some)
    chosen = choose(rule, some, requests(some, budget))
    for row, plan in enumerate(chosen):
        fits = np.full(HEAD_SIZES, False)
        fits[tuple(ACTIONS.T)] = some.latency_ms[row] <= budget
        serving = RequestController(FusedController(controller), SPACE, float(np.exp(-0.3)), 1.0, fits)
        tier, insertion = serving.decide_stage1(torch.tensor(some.features[row]), True)
        pair = TIERS.index(tier) * len(INSERTIONS) + INSERTIONS.index(insertion)
        serving.decide_stage2(torch.tensor(some.tokens[row, pair]), insertion)  # type: ignore[index]
        assert SPACE.all[plan] == serving.knobs
    assert len(set(chosen.tolist())) > 1 or budget < 20.0 or without


def test_value_heads_learn_from_the_token_what_the_question_does_not_say() -> None:
    rng = np.random.default_rng(1)
    train, test = known(200, rng), known(100, rng)
    rule = ValueHeads()
    rule.fit(train)
    chosen = choose(rule, train, requests(test, 23.0))  # a plan of 8 experts or 16 blocks fits, not both
    assert (test.latency_ms[0, chosen] <= 23.0).all()
    blind = test.accuracy.mean(0)[test.latency_ms[0] <= 23.0].max()
    assert test.accuracy[np.arange(100), chosen].mean() > blind + 0.15


def test_without_a_part_its_input_says_nothing() -> None:
    torch.manual_seed(0)
    some = known(16, np.random.default_rng(2))
    rule = Trained(Controller(D, 16).eval(), "ours", lacks=("question", "token"))
    rule.fit(some)
    scores = rule.scores(requests(some, 20.0))
    assert np.allclose(scores.first, scores.first[0])
    assert np.allclose(scores.second, scores.second[0])


def test_missing_inputs_are_named() -> None:
    some = known(4, np.random.default_rng(0))
    bare = KnownOutcomes(some.features, ACTIONS, some.accuracy, some.latency_ms)
    with pytest.raises(UserError, match="latency tokens of the training samples"):
        ValueHeads().fit(bare)
    with pytest.raises(UserError, match="latency tokens and observed budgets"):
        Trained(Controller(D, 8), "ours").scores(Requests(some.features, np.ones(4)))
