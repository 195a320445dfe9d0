"""The model: vision, language blocks under execution plans, checkpoints."""

from envs.model.config import MolmoEConfig
from envs.model.molmoe import AdaptiveMolmoE

__all__ = ["AdaptiveMolmoE", "MolmoEConfig"]
