"""The model: vision, language blocks under execution plans, processor, checkpoints."""

from envs.model.config import MolmoEConfig
from envs.model.molmoe import AdaptiveMolmoE
from envs.model.processor import MolmoEProcessor

__all__ = ["AdaptiveMolmoE", "MolmoEConfig", "MolmoEProcessor"]
