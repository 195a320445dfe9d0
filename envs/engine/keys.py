"""What an outcome depends on, and the content hashes that name it.

`EngineFingerprint` is all that is fixed for an engine; a sample's image, prompt and tiling and the plan come on top.
Whatever changes an answer must be in here: a stored outcome is served under its key indefinitely.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import PIL
import torch

from envs.model.molmoe import AdaptiveMolmoE
from envs.processing.processor import MolmoEProcessor

KEY_VERSION: Final = 1
"""Raise this when code changes results in a way no field below shows (cropping, positions, stop rule, ...)."""


@dataclass(frozen=True)
class EngineFingerprint:
    """What all outcomes of one engine share.

    Attributes:
        weights: fingerprint of weights and model config.
        processor: hash of image geometry, tokenizer and end-of-text token.
        kernels: experts kernel and matrix product precision.
        pillow: Pillow version, which decodes images.
    """

    version: int
    weights: str
    processor: str
    dtype: str
    device: str
    kernels: str
    torch: str
    pillow: str
    max_new_tokens: int
    stop: str

    @classmethod
    def of(cls, model: AdaptiveMolmoE, processor: MolmoEProcessor, max_new_tokens: int) -> "EngineFingerprint":
        """The fingerprint of an engine over `model` and `processor`."""
        return cls(
            version=KEY_VERSION,
            weights=model.fingerprint,
            processor=processor_fingerprint(processor),
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            kernels=f"experts={model.experts},matmul={torch.get_float32_matmul_precision()}",
            torch=torch.__version__,
            pillow=PIL.__version__,
            max_new_tokens=max_new_tokens,
            stop=f"eos={model.config.eos_token_id}",
        )

    def to_json(self) -> str:
        """One line of JSON, the same for equal engines."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class PromptKey:
    """A prompt as the model sees it: image content and tiling (None without an image), and the text's token ids."""

    image: str | None
    tiling: tuple[int, int] | None
    text_ids: tuple[int, ...]


class ExecutionKey(NamedTuple):
    """One execution: a prompt, and the experts per token in each block (0: dropped)."""

    prompt: PromptKey
    top_k: tuple[int, ...]


def processor_fingerprint(processor: MolmoEProcessor) -> str:
    """Hash of everything a processor was made from."""
    parts = [repr(processor.geometry), processor.text_encoder.to_str(), str(processor.eos_id)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def outcome_key(fingerprint: str, prompt: PromptKey, top_k: tuple[int, ...]) -> bytes:
    """Key of one execution; `fingerprint` is the engine's as JSON, `top_k` the experts per token and block."""
    return _digest("outcome", fingerprint, asdict(prompt), top_k)


def latency_key(fingerprint: str, prompt: PromptKey, encoder: dict[str, Any]) -> bytes:
    """Key of the latency tokens of one prompt, all levels and positions together."""
    return _digest("latency", fingerprint, asdict(prompt), encoder)


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).digest()
