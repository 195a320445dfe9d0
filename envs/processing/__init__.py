"""Images and questions to model inputs, and answer tokens back to text."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.processing.processor import AdaptiveMolmoEProcessor, MolmoEProcessor

__all__ = ["AdaptiveMolmoEProcessor", "MolmoEProcessor"]


def __getattr__(name: str) -> Any:
    """Imported when asked for, as in `envs.model`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("envs.processing.processor"), name)
