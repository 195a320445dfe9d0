"""Stage times of one request in milliseconds, and the sizes that latency depends on."""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Final

from pydantic import ConfigDict

from envs.errors import UserError

STAGES: Final = ("processor", "vision", "prefix", "suffix", "decode", "controller")


@dataclass(frozen=True)
class LatencyRecord:
    """Milliseconds from decoded image and question text to answer text, stage by stage.

    Attributes:
        processor: cropping, resizing and tokenizing.
        vision: vision tower and connector.
        prefix: embedding and blocks 1..p on the prompt (and the latency token).
        suffix: the kept blocks after p on the prompt, and the first token.
        decode: every further answer token through the kept blocks.
        controller: both networks and reading the latency token.

    Raises:
        UserError: a stage that is negative or not finite.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # of files that contain records

    processor: float = 0.0
    vision: float = 0.0
    prefix: float = 0.0
    suffix: float = 0.0
    decode: float = 0.0
    controller: float = 0.0

    def __post_init__(self) -> None:
        for stage in STAGES:
            value = getattr(self, stage)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"stage {stage} took {value!r} ms: give a finite time of 0 ms or more")

    @property
    def total(self) -> float:
        """Latency of the request, ms."""
        return self.processor + self.vision + self.prefix + self.suffix + self.decode + self.controller

    def to_dict(self) -> dict[str, float]:
        """Stage name to milliseconds, in the order they run."""
        return asdict(self)


@dataclass(frozen=True)
class RequestShape:
    """Sizes of a request at one tier that its latency depends on.

    Attributes:
        crops: image crops the vision tower encodes, the global view included (0 for text-only).
        image_tokens: positions of the prompt that belong to the image, its start, end and column marks included.
        prompt_tokens: all positions of the prompt, image included, latency token not.
        pixels: width times height of the image as given (0 for text-only).

    Raises:
        UserError: a negative size, an empty prompt, or more image tokens than prompt tokens.
    """

    crops: int
    image_tokens: int
    prompt_tokens: int
    pixels: int

    def __post_init__(self) -> None:
        if min(self.crops, self.image_tokens, self.pixels) < 0 or self.prompt_tokens < 1:
            raise UserError(f"request {self} is not allowed: sizes are 0 or more, and a prompt has 1 token or more")
        if self.image_tokens > self.prompt_tokens:
            raise UserError(
                f"request {self} is not allowed: its {self.image_tokens} image tokens are part of the "
                f"{self.prompt_tokens} prompt tokens"
            )
