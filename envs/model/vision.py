"""From pixel patches to image tokens: a CLIP-like ViT, attention pooling over windows, and the projector.

Letters: N images or crops, C crops of an image, P patches of a crop, W ViT width, F concatenated layer features,
M pooled windows, D model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.model import fused
from envs.model.config import AdaptiveMolmoEConfig, VisionConfig

PADDED_PIXEL = -1.0


class VitBlock(nn.Module):
    """One pre-norm block; query, key and value projections are one product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention_in = nn.Linear(config.width, 3 * inner)
        self.attention_out = nn.Linear(inner, config.width)
        self.ffn_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp_in = nn.Linear(config.width, config.mlp_dim)
        self.mlp_out = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x_NPW: Tensor) -> Tensor:
        n, p, _ = x_NPW.shape
        qkv = self.attention_in(self.attention_norm(x_NPW)).view(n, p, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x_NPW = x_NPW + self.attention_out(mixed.transpose(1, 2).reshape(n, p, -1))
        inner = self.mlp_in(self.ffn_norm(x_NPW))
        if fused.available(inner):
            return x_NPW + self.mlp_out(fused.quick_gelu(inner))
        return x_NPW + self.mlp_out(inner * torch.sigmoid(1.702 * inner))


class ImageEncoder(nn.Module):
    """The ViT: crops (N, P, pixels) to features of the configured layers (N, P, F), class token dropped."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.patches + 1, config.width))
        self.patch_embedding = nn.Linear(config.pixels, config.width, bias=False)
        self.pre_ln = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(VitBlock(config) for _ in range(config.layers))

    def forward(self, crops_NPX: Tensor) -> Tensor:
        patches_NPW = self.patch_embedding(crops_NPX)
        start_N1W = self.class_embedding.expand(len(patches_NPW), 1, -1)
        x_NPW = self.pre_ln(torch.cat((start_N1W, patches_NPW), 1) + self.positional_embedding)
        wanted = [layer % self.config.layers for layer in self.config.feature_layers]
        seen: dict[int, Tensor] = {}
        for layer in range(self.config.depth):
            x_NPW = self.blocks[layer](x_NPW)
            if layer in wanted:
                seen[layer] = x_NPW[:, 1:]
        return torch.cat([seen[layer] for layer in wanted], -1)


class AttentionPooling(nn.Module):
    """Multi-head attention from each window's mean to its patches: (M, window, F) to (M, W)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.query = nn.Linear(config.feature_dim, inner)
        self.key_value = nn.Linear(config.feature_dim, 2 * inner)
        self.out = nn.Linear(inner, config.width)

    def forward(self, windows_MSF: Tensor) -> Tensor:
        m, s, _ = windows_MSF.shape
        query_MH = self.query(windows_MSF.mean(1)).view(m, 1, self.heads, -1)
        key, value = self.key_value(windows_MSF).view(m, s, 2, self.heads, -1).unbind(2)
        # Windows have four patches: products and sums beat the attention kernel's fixed cost per window.
        scores_MSH = (key * query_MH).sum(-1, dtype=torch.float32) * key.shape[-1] ** -0.5
        weights_MSH = scores_MSH.softmax(1).to(value.dtype)
        return self.out((weights_MSH.unsqueeze(-1) * value).sum(1).view(m, -1))


class VisionBackbone(nn.Module):
    """Crops to image tokens of model width."""

    def __init__(self, config: AdaptiveMolmoEConfig) -> None:
        super().__init__()
        self.config = config.vision
        self.blank_crops = config.blank_crops
        self.encoder = ImageEncoder(config.vision)
        self.pad_embed = nn.Parameter(torch.zeros(2, config.vision.feature_dim))
        self.pooling = AttentionPooling(config.vision)
        self.projector_in = nn.Linear(config.vision.width, 2 * config.expert_hidden, bias=False)
        self.projector_out = nn.Linear(config.expert_hidden, config.d_model, bias=False)

    def stage(self, crops_NPX: Tensor) -> "Staged":
        """Crops (N, P, pixels) as they cross to the device, and which of them are blank.

        Published rule: a crop with an exact -1.0 anywhere is blank. Trainer's rule: one with nothing else.
        """
        # Before any cast: in bfloat16 a pixel close to the mark would round to it.
        marked_N = (crops_NPX == PADDED_PIXEL).flatten(1)
        blank_N = marked_N.all(1) if self.blank_crops == "trainer" else marked_N.any(1)
        device, dtype = self.pad_embed.device, self.pad_embed.dtype
        if device.type == "cuda" and crops_NPX.device.type == "cpu":
            # Cast before it crosses the bus, from pinned memory, so that nothing waits for the device.
            return Staged(torch.empty(crops_NPX.shape, dtype=dtype, pin_memory=True).copy_(crops_NPX), blank_N)
        return Staged(crops_NPX.to(dtype), blank_N)

    def vit_features(self, crops_NPX: Tensor) -> Tensor:
        """Layer features (N, P, F) of crops (N, P, pixels), zeros for blank ones; crops may still be on the host."""
        return self._features(self.stage(crops_NPX))

    def _features(self, staged: "Staged") -> Tensor:
        blank_N = staged.blank
        crops_NPX = staged.crops.to(self.pad_embed.device, non_blocking=True)
        if blank_N.device.type != "cpu":
            # Reading the mask back would wait for the device: encode blanks too, then drop them.
            return self.encoder(crops_NPX).masked_fill(blank_N[:, None, None], 0.0)
        if not bool(blank_N.any()):
            return self.encoder(crops_NPX)
        shape = (*crops_NPX.shape[:2], self.config.feature_dim)
        if bool(blank_N.all()):
            return crops_NPX.new_zeros(shape)
        places = (~blank_N).nonzero().squeeze(1).to(crops_NPX.device)
        encoded = self.encoder(crops_NPX[places])
        return encoded.new_zeros(shape).index_put((places,), encoded)

    def pool(self, features_NPF: Tensor) -> Tensor:
        """Image tokens (N, tokens, D) from layer features (N, P, F) of N crops."""
        n, (rows, columns) = len(features_NPF), self.config.pooling
        grid, (high, wide) = self.config.grid, self.config.token_grid
        x = features_NPF.view(n, grid, grid, -1)
        if grid % rows or grid % columns:
            x = F.pad(x, (0, 0, 0, wide * columns - grid, 0, high * rows - grid))
        windows = x.view(n, high, rows, wide, columns, -1).transpose(2, 3)
        pooled = self.pooling(windows.reshape(n * high * wide, rows * columns, -1))
        gate, up = self.projector_in(pooled).chunk(2, -1)
        return self.projector_out(F.silu(gate) * up).view(n, high * wide, -1)

    def forward(self, images_NCPX: Tensor, image_masks_NCP: Tensor | None = None) -> Tensor:
        """Image tokens (N, C, tokens, D) of crops (N, C, P, pixels).

        `image_masks` (N, C, P) is the share of each patch that is image: 0 adds the learned embedding of padding,
        anything else below 1 that of partial padding. Without masks every patch counts as image.
        """
        staged = self.stage(images_NCPX.flatten(0, 1))
        masks = None if image_masks_NCP is None else image_masks_NCP.flatten(0, 1)
        return self.encode(staged, masks).view(*images_NCPX.shape[:2], self.config.tokens, -1)

    def encode(self, staged: "Staged", masks_NP: Tensor | None) -> Tensor:
        """Image tokens (N, tokens, D) of crops that `stage` made ready."""
        features = self._features(staged)
        if masks_NP is None:
            return self.pool(features)
        if features.is_cuda and masks_NP.device.type == "cpu":
            masks_NP = masks_NP.pin_memory()
        return self.to_tokens(features, masks_NP.to(features.device, non_blocking=True))

    def to_tokens(self, features_NPF: Tensor, masks_NP: Tensor) -> Tensor:
        """Image tokens (N, tokens, D) from layer features and the share of each patch that is image."""
        masks = masks_NP.unsqueeze(-1)
        empty, partial = masks == 0, (masks < 1) & (masks != 0)
        return self.pool(features_NPF + self.pad_embed[0] * empty + self.pad_embed[1] * partial)


class Staged(NamedTuple):
    """Crops (N, P, pixels) in the weights' dtype, pinned where those are on a GPU, and which are blank (N,), bool."""

    crops: Tensor
    blank: Tensor
