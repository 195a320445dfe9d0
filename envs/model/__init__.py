"""The model: vision, language blocks under execution plans, checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.model.config import AdaptiveMolmoEConfig
    from envs.model.molmoe import AdaptiveMolmoE, AdaptiveMolmoEForConditionalGeneration

__all__ = ["AdaptiveMolmoE", "AdaptiveMolmoEConfig", "AdaptiveMolmoEForConditionalGeneration"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: transformers takes seconds, and checking a model's name needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("envs.model.molmoe"), name)
