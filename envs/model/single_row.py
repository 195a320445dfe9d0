"""One request at a time: on a GPU as CUDA graphs of fixed sizes, elsewhere as any batch.

Letters: C crops, P patches, T tokens, D model width, H heads, d head width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from envs.model.decode import DecodeBatch
from envs.model.execution_tree import FULL_TOP_K, entry_block
from envs.model.graphs import Graphs
from envs.model.prefill import BlockCache, Prefilled, Prefix
from envs.model.static import CAPACITY, StaticDecoder, kernels_usable

if TYPE_CHECKING:
    from envs.model.molmoe import AdaptiveMolmoE

# Prompts are padded to a multiple of this, so that a few dozen lengths serve all.
_TOKENS = 64
_VIEWS = 1  # the global view comes before the crops


class SingleRow:
    """Vision, prefill and decoding of one request of `model`, whose weights must stay where they are.

    Where `static` is off, all is done as for a batch; where it is on, at padded sizes and by the static decoder, on a
    GPU as CUDA graphs. Answers are the same within rounding.

    Args:
        static: on where the decoding kernels run, if not said.
        capacity: tokens of prompt and answer together that the static way serves; longer requests go the other way.
    """

    def __init__(self, model: "AdaptiveMolmoE", static: bool | None = None, capacity: int = CAPACITY) -> None:
        self.model, self.language = model, model.language
        self.static = kernels_usable(model.language) if static is None else static
        # What the buffers and graphs refer to; `fits_model` notices when it has moved.
        self._weights = (model.language.wte.data_ptr(), model.dtype, model.device)
        if self.static:
            self.decoder = StaticDecoder(model.language, capacity)
            self._vision, self._blocks = self._vision_graphs(), self._block_graphs(capacity)

    def fits_model(self, model: "AdaptiveMolmoE") -> bool:
        """Whether the model's weights are still where they were."""
        return self._weights == (model.language.wte.data_ptr(), model.dtype, model.device)

    @property
    def captured(self) -> int:
        """Graphs captured so far: a request that met a new size spent its time on that."""
        return self._vision.captured + self._blocks.captured + self.decoder.captured if self.static else 0

    def encode_images(self, images_1CPX: Tensor, image_masks_1CP: Tensor) -> Tensor:
        """Image tokens (1, C, tokens, D)."""
        if not self.static or len(images_1CPX[0]) > self._vision.largest:
            return self.model.vision(images_1CPX, image_masks_1CP)
        staged = self.model.vision.stage(images_1CPX[0])
        return self._vision(None, staged.crops, image_masks_1CP[0], staged.blank)[0].unsqueeze(0)

    def run_prefix(self, x_1TD: Tensor, depth: int) -> Prefix:
        """Blocks 1..depth at full top-k."""
        length = x_1TD.shape[1]
        if not self._serves(length):
            return self.language.run_prefix(x_1TD, [length], depth, self.model.experts)
        hidden, keys, values = [x_1TD], [], []
        for index in range(depth):
            out, key, value = self._block(index, FULL_TOP_K, hidden[-1])
            hidden.append(out)
            keys.append(key)
            values.append(value)
        return Prefix(tuple(hidden), tuple(keys), tuple(values), (length,))

    def prefill(self, x_1TD: Tensor, top_k: Sequence[int], prefix: Prefix | None = None) -> Prefilled:
        """The prompt `x_1TD` under one plan's experts per token in each block, continuing from `prefix` where given."""
        length, top_k = x_1TD.shape[1], tuple(top_k)
        if not self._serves(length):
            return self.language.prefill(x_1TD, [length], [0], [top_k], prefix=prefix, experts=self.model.experts)
        start = entry_block(top_k, prefix.depth) if prefix is not None else 0
        x = prefix.hidden[start] if prefix is not None else x_1TD
        caches: list[BlockCache | None] = [None] * len(top_k)
        for index in range(start, len(top_k)):
            if top_k[index]:
                x, key, value = self._block(index, top_k[index], x)
                caches[index] = BlockCache(key, value, (0,))
        return Prefilled(x[:, -1], tuple(caches), prefix, (0,), (length,), (top_k,))

    def decode(self, prefilled: Prefilled, limit: int, stop_at_eos: bool = True) -> tuple[list[int], bool]:
        """Greedy answer ids, at most `limit`, without the end of text; and whether that ended it."""
        eos = self.model.config.eos_token_id if stop_at_eos else -1
        token = int(self.language.next_logits(prefilled.last).argmax(-1)[0])
        if token == eos:
            return [], True
        if self.static and prefilled.lengths[0] + limit <= self.decoder.capacity:
            ids = [token, *self.decoder.decode(prefilled, 0, token, limit - 1, stop_at_eos)]
            return ids, len(ids) < limit
        ids, batch = [token], None
        while len(ids) < limit:
            batch = batch or DecodeBatch(self.language, [(prefilled, [0])])
            token = int(batch.step([token], self.model.experts).argmax(-1)[0])
            if token == eos:
                return ids, True
            ids.append(token)
        return ids, False

    def _serves(self, length: int) -> bool:
        return self.static and length <= self._blocks.largest

    def _block(self, index: int, top_k: int, x_1TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, key, value = self._blocks((index, top_k), x_1TD[0])
        return out.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)

    def _block_graphs(self, capacity: int) -> Graphs:
        config, language = self.model.config, self.language
        rope = language.rope(capacity)

        def call(key: tuple[int, int], x_TD: Tensor) -> list[Tensor]:
            index, top_k = key
            # Causal attention keeps the padding behind the prompt from counting.
            results = language.blocks[index](x_TD.unsqueeze(0), rope[: len(x_TD)], None, top_k, self.model.experts)
            return [result[0] for result in results]

        def buffer(*shape: int) -> Tensor:
            return language.wte.new_zeros(capacity, *shape)

        heads = (config.n_heads, config.head_dim)
        outputs = (buffer(config.d_model), buffer(*heads), buffer(*heads))
        return Graphs(call, (buffer(config.d_model),), outputs, _TOKENS, self._graphs(1024))

    def _vision_graphs(self) -> Graphs:
        config, vision = self.model.config, self.model.vision
        views = _VIEWS + config.max_crops

        def call(_: None, crops: Tensor, masks: Tensor, blank: Tensor) -> list[Tensor]:
            features = vision.encoder(crops).masked_fill(blank[:, None, None], 0.0)
            return [vision.to_tokens(features, masks)]

        like, patches = self.language.wte, config.vision.patches
        inputs = (
            like.new_zeros(views, patches, config.vision.pixels),
            like.new_zeros(views, patches, dtype=torch.float32),
            like.new_zeros(views, dtype=torch.bool),
        )
        outputs = (like.new_zeros(views, config.vision.tokens, config.d_model),)
        return Graphs(call, inputs, outputs, most=self._graphs(views))

    def _graphs(self, most: int) -> int:
        return most if self.model.device.type == "cuda" else 0
