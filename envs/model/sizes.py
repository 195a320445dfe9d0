"""How many parameters a model of a given shape has, and how much memory it takes, by formula."""

from dataclasses import dataclass
from typing import Final

from envs.knobs import TIER_CROPS, TOP_KS
from envs.model.config import MolmoEConfig

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2}
NEW_TOKENS: Final = 64
"""Longest answer, in tokens, that the cache must hold."""

_QUESTION_TOKENS: Final = 64
_CUDA_CONTEXT: Final = 600 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes one request needs beside the weights, at the largest image and longest answer.

    Args:
        cache: keys and values of all blocks, kept while answering.
        activations: the largest intermediate results, an estimate from above.
    """

    cache: int
    activations: int


def parameter_counts(config: MolmoEConfig) -> dict[str, int]:
    """Parameters of each part of a model of this shape, by formula.

    With width D, B blocks, E experts of hidden width H, V + A words, and an image encoder of L
    layers of width W with hidden width M, N = patches + 1 positions and P numbers a patch:

        words       2 V D + A D (in and out, and the added ones in)
        attention   B (4 D^2 + 4 D)
        experts     B E (3 D H + D)   (with the router's row of each)
        final norm  D
        encoder     L (4 W^2 + 2 W M + 9 W + M) + W (N + P + 3)
        connector   3 (F W + W) + W^2 + W + 2 W J + J D + 2 F

    where F is the width of the features read (W for each layer read) and J the projector's hidden
    width. For MolmoE-1B: 7,221,875,712 parameters, 14,443,751,424 bytes in
    bfloat16.
    """
    vision, width = config.vision, config.d_model
    hidden, features = config.expert_hidden, vision.feature_dim
    inner = vision.heads * vision.head_dim
    layer = (
        3 * (vision.width * inner + inner)
        + inner * vision.width
        + vision.width
        + 2 * vision.width * vision.mlp_dim
        + vision.mlp_dim
        + vision.width
        + 4 * vision.width
    )
    connector = 3 * (features * inner + inner) + inner * vision.width + vision.width
    projector = config.projector_hidden * (2 * vision.width + width)
    return {
        "words": (2 * config.embedding_size + config.additional_vocab_size) * width,
        "attention": config.n_layers * (4 * width**2 + 4 * width),
        "experts": config.n_layers * config.n_experts * (3 * width * hidden + width),
        "final norm": width,
        "image encoder": vision.layers * layer + vision.width * (vision.patches + 1 + vision.pixels + 3),
        "connector": connector + projector + 2 * features,
    }


def longest_prompt(config: MolmoEConfig, tier: str) -> int:
    """Prompt tokens of the largest tiling of a tier with a question of 64 tokens."""
    vision = config.vision
    rows, columns = vision.token_grid
    margin = sum(config.overlap_margins)
    longest = 0
    for height in range(1, TIER_CROPS[tier] + 1):
        width = TIER_CROPS[tier] // height
        down, across = (
            (n * (vision.grid - margin) + margin) // pool
            for n, pool in zip((height, width), vision.pooling, strict=True)
        )
        longest = max(longest, down * (across + 1) + 2)
    return 1 + rows * (columns + 1) + 2 + longest + _QUESTION_TOKENS


def request_memory(config: MolmoEConfig, dtype: str) -> Memory:
    """Memory of one request beside the weights, at the largest image and longest answer."""
    vision, size = config.vision, DTYPE_BYTES[dtype]
    tokens = longest_prompt(config, "high") + NEW_TOKENS
    cache = 2 * config.n_layers * config.d_model * tokens * size
    patches = (1 + TIER_CROPS["high"]) * (vision.patches + 1)
    seeing = patches * (6 * vision.width + 2 * vision.mlp_dim + 2 * vision.feature_dim) * size
    reading = tokens * max(TOP_KS) * (3 * config.expert_hidden + 2 * config.d_model) * size
    words = config.embedding_size + config.additional_vocab_size
    return Memory(cache, max(seeing, reading) + 4 * words)


def needed_bytes(config: MolmoEConfig, dtype: str, cuda: bool) -> int:
    """Bytes a device must hold to answer one request at a time in a dtype."""
    weights = sum(parameter_counts(config).values()) * DTYPE_BYTES[dtype]
    request = request_memory(config, dtype)
    return weights + request.cache + request.activations + (_CUDA_CONTEXT if cuda else 0)
