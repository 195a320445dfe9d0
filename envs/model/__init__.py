"""The model: vision, language blocks under execution plans, checkpoints."""

from envs.model.config import AdaptiveMolmoEConfig
from envs.model.molmoe import AdaptiveMolmoE, AdaptiveMolmoEForConditionalGeneration

__all__ = ["AdaptiveMolmoE", "AdaptiveMolmoEConfig", "AdaptiveMolmoEForConditionalGeneration"]
