"""Fresh weights to train from."""

import torch
from torch import Tensor

from envs.model import AdaptiveMolmoE, AdaptiveMolmoEConfig


def initialise(config: AdaptiveMolmoEConfig, seed: int = 0) -> AdaptiveMolmoE:
    """A new model: normal weights, deviation 1/sqrt(fan-in), scaled down where a block adds to its input."""
    model = AdaptiveMolmoE(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm", "ln_f", "qk_norm")):
                parameter.fill_(1.0)
            elif "norm." in name or "pre_ln." in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, deviation(name, parameter, config), generator=generator)
    return model


def deviation(name: str, parameter: Tensor, config: AdaptiveMolmoEConfig) -> float:
    """Deviation of fresh weights. Parameters are (outputs, inputs), stacked down projections (E, inputs, outputs)."""
    if name == "language.wte":
        return 1.0
    if name.endswith(("embedding", "pad_embed")):
        return 0.02
    fan_in = parameter.shape[-2] if name.endswith("down") else parameter.shape[-1]
    added = name.endswith(("attn_out", "down", "out.weight"))
    blocks = config.n_layers if name.startswith("language") else config.vision.layers
    return float(fan_in**-0.5 * ((2 * blocks) ** -0.5 if added else 1.0))
