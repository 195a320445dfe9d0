"""Wider experts for a model that has learnt with narrow ones, without changing what it says."""

from dataclasses import replace

import torch
from torch import Tensor

from envs.errors import UserError
from envs.model.molmoe import AdaptiveMolmoE
from recipes.embedded_model.fresh_weights import initialise


@torch.no_grad()
def widen(model: AdaptiveMolmoE, hidden: int, seed: int) -> AdaptiveMolmoE:
    """A model whose experts and projector have `hidden` units, and which answers as `model` does.

    New units read random directions and are read by none yet, so that the function stays the same while they are free
    to learn; the idea of Chen et al. (2016), "Net2Net: Accelerating Learning via Knowledge Transfer", without copies of
    old units, whose gradients would be alike.

    Args:
        model: what is widened; left as it is.
        hidden: units of an expert, and of the projector, at least those it has.
        seed: of the directions that new units read.

    Raises:
        UserError: fewer units than before.
    """
    old = model.config.expert_hidden
    if hidden < old:
        raise UserError(f"experts of {old} units cannot be widened to {hidden}: start from a model of at most {hidden}")
    config = replace(model.config, mlp_hidden_size=2 * hidden)
    wide = initialise(config, seed).to(model.device)
    trained = dict(model.named_parameters())
    for name, parameter in wide.named_parameters():
        match name.rsplit(".", 1)[-1], parameter.dim():
            case "gate_up", 3:
                _fill_halves(parameter.transpose(0, 1), trained[name].transpose(0, 1))
            case "down", 3:
                parameter.zero_()[:, :old] = trained[name]
            case _ if "projector_in" in name:
                _fill_halves(parameter, trained[name])
            case _ if "projector_out" in name:
                parameter.zero_()[:, :old] = trained[name]
            case _:
                parameter.copy_(trained[name])
    return wide


def _fill_halves(wide: Tensor, narrow: Tensor) -> None:
    """Copies the rows of two stacked matrices (gate over up) to the top of each of two larger ones."""
    for into, out_of in zip(wide.chunk(2), narrow.chunk(2), strict=True):
        into[: len(out_of)] = out_of
