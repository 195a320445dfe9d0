"""Both kernels of the mixture of experts against a plain loop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.errors import UserError
from envs.model import experts
from envs.model.experts import TopK, expand_top_k, mixture

E, D, H = 12, 16, 8


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(E, 2 * H, D, generator=generator) / 4, torch.randn(E, H, D, generator=generator) / 4


def plain(x, logits, gate_up, down, top_k):
    probabilities = logits.softmax(-1)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        best = probabilities[token].topk(top_k[token]) if top_k[token] else None
        for weight, expert in zip(*best, strict=True) if best else ():
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += weight * (F.silu(gate) * up) @ down[expert]
    return out


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 4, 5, 6, 7, 8]), min_size=1, max_size=40), st.integers(0, 9))
def test_per_token_top_k(top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(len(top_k), D, generator=generator), 3 * torch.randn(len(top_k), E, generator=generator)
    rows = TopK(torch.tensor(top_k), max(top_k), sum(top_k))
    if not rows.maximum:
        return
    wanted = plain(x, logits, *weights(seed), top_k)
    for kernel in ("dense", "grouped", "auto"):
        assert torch.allclose(mixture(x, logits, *weights(seed), rows, kernel), wanted, atol=1e-5), kernel


@pytest.mark.parametrize("kernel", ["dense", "grouped", "auto"])
@pytest.mark.parametrize("top_k", [4, 8])
def test_uniform_top_k(kernel, top_k):
    x, logits = torch.randn(9, D), torch.randn(9, E)
    wanted = plain(x, logits, *weights(), [top_k] * 9)
    assert torch.allclose(mixture(x, logits, *weights(), top_k, kernel), wanted, atol=1e-5)


def test_weights_that_underflow_do_not_break_the_count():
    """A router so sure that other chosen experts weigh exactly nothing: their slots still count as used."""
    x, logits = torch.randn(3, D), torch.zeros(3, E)
    logits[:, 2] = 500.0
    rows = TopK(torch.tensor([4, 8, 5]), 8, 17)
    wanted = plain(x, logits, *weights(), [1, 1, 1])
    assert torch.allclose(mixture(x, logits, *weights(), rows, "grouped"), wanted, atol=1e-5)


def test_shards_agree(monkeypatch):
    x, logits = torch.randn(50, D), torch.randn(50, E)
    mixed = TopK(torch.tensor([4, 8, 0, 5, 6] * 10), 8, 230)
    complete = [mixture(x, logits, *weights(), k, "grouped") for k in (6, mixed)]
    monkeypatch.setattr(experts, "_SLICE_TOKENS", 7)
    for k, wanted in zip((6, mixed), complete, strict=True):
        assert torch.allclose(mixture(x, logits, *weights(), k, "grouped"), wanted, atol=1e-6)


def test_padding_gets_no_expert():
    rows = expand_top_k([4, 8], [2, 3], 3, torch.device("cpu"))
    assert isinstance(rows, TopK)
    assert rows.per_token.tolist() == [4, 4, 0, 8, 8, 8]
    assert rows.pairs == 32
    assert expand_top_k([5, 5], [3, 3], 3, torch.device("cpu")) == 5


def test_widths_that_grouped_products_refuse():
    gate_up, down = torch.randn(E, 12, 10), torch.randn(E, 6, 10)
    x, logits = torch.randn(3, 10), torch.randn(3, E)
    wanted = plain(x, logits, gate_up, down, [4] * 3)
    assert torch.allclose(mixture(x.repeat(20, 1), logits.repeat(20, 1), gate_up, down, 4)[:3], wanted, atol=1e-4)
    with pytest.raises(UserError, match="multiple of 16 bytes"):
        mixture(x, logits, gate_up, down, 4, "grouped")


def test_unknown_kernel():
    with pytest.raises(UserError, match="fast"):
        mixture(torch.zeros(1, D), torch.zeros(1, E), *weights(), 4, "fast")


def test_dense_is_differentiable():
    gate_up, down = (w.requires_grad_() for w in weights())
    x, logits = torch.randn(5, D, requires_grad=True), torch.randn(5, E, requires_grad=True)
    mixture(x, logits, gate_up, down, 4, "dense").square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (x, logits, gate_up, down))


@pytest.mark.parametrize("top_k", [4, 8])
def test_a_lone_token_gets_the_same_numbers_from_its_own_experts_alone(top_k):
    generator = torch.Generator().manual_seed(4)
    x, logits = torch.randn(1, D, generator=generator), 3 * torch.randn(1, E, generator=generator)
    gate_up, down = weights()
    unused = logits[0].argsort(descending=True)[top_k:]
    gate_up[unused] = torch.nan
    out = mixture(x, logits, gate_up, down, top_k, "dense")
    assert torch.allclose(out, plain(x, logits, gate_up, down, [top_k]), atol=1e-5)
