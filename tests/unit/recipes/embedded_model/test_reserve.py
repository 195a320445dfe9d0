"""Reserve steps: the numbers of the package's own mixture, a gradient for the last of a token's experts alone."""

import pytest
import torch

from envs.errors import UserError
from envs.model import language
from envs.model.experts import mixture
from recipes.embedded_model.reserve import reserve_learns

E, D, H = 12, 16, 8


def _weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(E, 2 * H, D, generator=generator) / 4, torch.randn(E, H, D, generator=generator) / 4


@pytest.mark.parametrize("first", [4, 6])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_same_numbers_and_a_gradient_to_later_experts_alone(first: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, D, generator=generator)
    logits = (3 * torch.randn(1, E, generator=generator)).expand(tokens, E)
    gate_up, down = (weight.requires_grad_(True) for weight in _weights())
    with reserve_learns(first):
        out = language.mixture(x, logits, gate_up, down, 8, "dense")
    assert torch.allclose(out, mixture(x, logits, gate_up, down, 8, "grouped"), atol=1e-5)
    out.sum().backward()
    ranked = logits[0].argsort(descending=True)
    for grad in (gate_up.grad, down.grad):
        assert grad is not None
        taught = grad.flatten(1).abs().sum(1) > 0
        assert not taught[ranked[:first]].any()
        assert taught[ranked[first:8]].all()
        assert not taught[ranked[8:]].any()


def test_afterwards_every_expert_learns_again_whatever_happened() -> None:
    with pytest.raises(RuntimeError), reserve_learns(4):
        raise RuntimeError
    assert language.mixture is mixture


@pytest.mark.parametrize("first", [0, 8])
def test_a_reserve_that_teaches_nobody_or_everybody_is_refused(first: int) -> None:
    with pytest.raises(UserError, match=rf"behind {first} experts.*give 1 to 7"), reserve_learns(first):
        pass
