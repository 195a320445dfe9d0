"""The main phase: vision and language together on captions and packed questions."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.knobs import ExecutionPlan
from envs.model.molmoe import AdaptiveMolmoE
from recipes.embedded_model.loop import Metrics
from recipes.embedded_model.packing import FAMILY_NAMES, IGNORE, PackedBatch
from recipes.embedded_model.reserve import reserve_learns

_WORD_SCALE = 0.5


@torch.no_grad()
def match_scales(model: AdaptiveMolmoE, images: Tensor, image_masks: Tensor) -> None:
    """Brings image tokens to unit deviation and words below it, so that the fresh language part hears the image.

    A warmed-up tower was read through a normalising layer, which leaves its own scale to chance.
    """
    features = model.vision(images, image_masks)
    model.vision.projector_out.weight.div_(features.std())
    model.language.wte.mul_(_WORD_SCALE)


@contextmanager
def _reserve_alone(model: AdaptiveMolmoE, first: int) -> Iterator[None]:
    """What is computed inside teaches words and the experts behind a token's `first`, nothing else."""
    frozen = [p for name, p in model.named_parameters() if not name.endswith(("gate_up", "down", "wte"))]
    learning = [p for p in frozen if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with reserve_learns(first):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def scenes_loss(model: AdaptiveMolmoE, batch: PackedBatch) -> tuple[Tensor, Metrics]:
    """Mean cross entropy of answer tokens, and the share of answers predicted right, by family.

    Figures under another plan than the full one are named `reduced_...`.
    """
    asked = batch.labels != IGNORE
    with nullcontext() if batch.reserve is None else _reserve_alone(model, batch.reserve):
        hidden = model.language(
            model.embed(batch.inputs),
            plans=batch.plan,
            position_ids_BT=batch.position_ids,
            attention_mask_BTT=batch.attention_mask,
            experts="dense",
        )
        logits = model.language.logits(hidden[asked]).float()
    labels = batch.labels[asked]
    loss = F.cross_entropy(logits, labels)
    prefix = "" if batch.plan == ExecutionPlan() else "reduced_"
    metrics = {f"{prefix or 'full_'}plan_loss": float(loss.detach())}
    right, families = (logits.argmax(-1) == labels).float(), batch.families[asked]
    for number, name in enumerate(FAMILY_NAMES):
        chosen = right[families == number]
        metrics[prefix + name] = float(chosen.mean()) if len(chosen) else math.nan
    return loss, metrics
