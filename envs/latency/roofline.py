"""Latency computed from bytes and operations on a named device: deterministic, for tests and planning.

Each operation takes the longer of its arithmetic at the device's sustained rate and its memory traffic at the sustained
bandwidth (Williams et al., "Roofline", CACM 2009), plus a fixed time per kernel launch, which dominates small models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.latency.clock import FULL_PLAN, REFERENCE_NEW_TOKENS, reference_shape
from envs.latency.record import LatencyRecord, RequestShape

if TYPE_CHECKING:
    from envs.model.config import AdaptiveMolmoEConfig


@dataclass(frozen=True)
class Device:
    """Sustained rates of a device: published peaks times the utilization of matrix products.

    Attributes:
        flops: floating-point operations per second.
        bandwidth: bytes per second from memory.
        launch: seconds per kernel or operator call.
        expert_launch: seconds per expert that a block loads if experts run one by one (CPU); 0 if grouped.
        bytes_per_weight: 2 for half precision, 4 for single.
        pixel_s: seconds per pixel resized and normalized, on the host's CPU.
        controller: seconds for both controller networks.
    """

    flops: float
    bandwidth: float
    launch: float
    expert_launch: float
    bytes_per_weight: int
    pixel_s: float
    controller: float


DEVICES: Final[Mapping[str, Device]] = MappingProxyType(
    {
        "h100": Device(0.5 * 989e12, 0.75 * 3.35e12, 7e-6, 0.0, 2, 8e-9, 0.6e-3),
        "a100": Device(0.5 * 312e12, 0.75 * 2.04e12, 8e-6, 0.0, 2, 8e-9, 0.7e-3),
        "l4": Device(0.5 * 121e12, 0.75 * 300e9, 8e-6, 0.0, 2, 8e-9, 0.7e-3),
        "laptop-2-core": Device(0.6 * 150e9, 0.6 * 40e9, 5e-6, 8e-6, 4, 8e-9, 0.4e-3),
        "laptop-core": Device(0.6 * 75e9, 0.6 * 25e9, 5e-6, 8e-6, 4, 8e-9, 0.4e-3),
    }
)
"""Half precision on the GPUs (NVIDIA data sheets, dense), single precision on the laptop's cores (AVX2 at 2.3 GHz)."""

_BLOCK_KERNELS: Final = 34
"""One language block: two norms, attention with norms and rotation, router, sort, three grouped products."""
_VISION_KERNELS: Final = 16
"""One layer of the vision tower."""
_CONNECTOR_KERNELS: Final = 24
_HEAD_KERNELS: Final = 8
"""Embedding, final norm, vocabulary product, argmax and the copy of the token to the host."""
_TOKENIZER_S: Final = 0.2e-3


def check_device(device: str) -> None:
    """Raise a UserError if `device` is not in `DEVICES`."""
    if device not in DEVICES:
        raise UserError(f"roofline device {device!r} is not known: choose one of {', '.join(DEVICES)}")


class RooflineClock:
    """Latency of a model of this shape on a device of `DEVICES`.

    Raises:
        UserError: an unknown device.
    """

    name: Final = "roofline"

    def __init__(self, config: "AdaptiveMolmoEConfig", device: str) -> None:
        check_device(device)
        self.config = config
        self.device_name = device
        self.device = DEVICES[device]

    @cached_property
    def reference_ms(self) -> float:
        """Latency of the full plan on the reference request, ms."""
        return self.latency(reference_shape(self.config), FULL_PLAN, REFERENCE_NEW_TOKENS).total

    def latency(self, shape: RequestShape, plan: ExecutionPlan, new_tokens: int) -> LatencyRecord:
        """Stage times of one request at batch 1, ms."""
        tokens = shape.prompt_tokens
        return LatencyRecord(
            processor=self._processor(shape),
            vision=self._vision(shape.crops),
            # The prefix also runs for the latency token.
            prefix=self._blocks(plan.insertion, tokens + 1, tokens + 1, 8),
            suffix=self._suffix(plan, tokens) + self._head(),
            decode=self._decode(plan, tokens, new_tokens),
            controller=self.device.controller * 1e3,
        )

    def _processor(self, shape: RequestShape) -> float:
        made = shape.crops * self.config.vision.crop_size**2
        return (_TOKENIZER_S + (shape.pixels + made) * self.device.pixel_s) * 1e3

    def _vision(self, crops: int) -> float:
        if crops == 0:
            return 0.0
        vision, hidden = self.config.vision, self.config.expert_hidden
        inner = vision.heads * vision.head_dim
        layer = 4 * vision.width * inner + 2 * vision.width * vision.mlp_dim
        positions = crops * (vision.patches + 1)
        attention = 4 * positions * (vision.patches + 1) * inner
        tower = self._operation_ms(2 * positions * layer + attention, layer, _VISION_KERNELS) * vision.depth
        # The connector's projections read the concatenated features, its values for all patches.
        pooling = 2 * vision.feature_dim * inner
        projector = 2 * vision.width * hidden + hidden * self.config.d_model
        connector = self._operation_ms(
            2 * crops * (vision.patches * pooling + vision.tokens * (pooling + projector)),
            2 * pooling + projector,
            _CONNECTOR_KERNELS,
        )
        return tower + connector

    def _blocks(self, blocks: int, tokens: int, context: int, top_k: int) -> float:
        """Milliseconds of `blocks` language blocks on `tokens` new positions that attend to `context` ones."""
        width, experts = self.config.d_model, self.config.n_experts
        dense = 4 * width * width + width * experts
        expert = 3 * width * self.config.expert_hidden
        loaded = experts_touched(experts, top_k, tokens)
        attention = 4 * tokens * context * width * (0.5 if tokens == context else 1.0)
        operations = 2 * tokens * (dense + top_k * expert) + attention
        cache = 2 * context * width
        block = self._operation_ms(operations, dense + loaded * expert + cache, _BLOCK_KERNELS)
        return blocks * (block + loaded * self.device.expert_launch * 1e3)

    def _suffix(self, plan: ExecutionPlan, tokens: int) -> float:
        """The kept blocks after p on the prompt; the last runs for the last position, except its keys and values."""
        rest = len(plan.blocks) - plan.insertion
        if rest == 0:
            return 0.0
        projections = 2 * self.config.d_model**2
        last = self._operation_ms(2 * tokens * projections, projections, 2) + self._blocks(1, 1, tokens, plan.top_k)
        return self._blocks(rest - 1, tokens, tokens, plan.top_k) + last

    def _head(self) -> float:
        vocabulary = self.config.d_model * self.config.vocab_size
        return self._operation_ms(2 * vocabulary, vocabulary, _HEAD_KERNELS)

    def _decode(self, plan: ExecutionPlan, prompt: int, new_tokens: int) -> float:
        """One step per new token: the prompt pass gives the first, the last step gives the end of the answer."""
        if new_tokens < 0:
            raise UserError(f"{new_tokens!r} new tokens are not allowed: give 0 or more")
        context = prompt + (new_tokens + 1) // 2
        step = (
            self._blocks(plan.insertion, 1, context, 8)
            + self._blocks(len(plan.blocks) - plan.insertion, 1, context, plan.top_k)
            + self._head()
        )
        return step * new_tokens

    def _operation_ms(self, operations: float, weights: float, kernels: int) -> float:
        """Milliseconds of one operation."""
        device = self.device
        moved = weights * device.bytes_per_weight / device.bandwidth
        return (max(operations / device.flops, moved) + kernels * device.launch) * 1e3


def experts_touched(experts: int, top_k: int, tokens: int) -> float:
    """Expected distinct experts that `tokens` positions load, each with `top_k` independent, uniform choices."""
    return float(experts * (1.0 - (1.0 - top_k / experts) ** tokens))
