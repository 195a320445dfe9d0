"""Images and questions to model inputs, and answer tokens back to text."""

from envs.processing.processor import AdaptiveMolmoEProcessor, MolmoEProcessor

__all__ = ["AdaptiveMolmoEProcessor", "MolmoEProcessor"]
