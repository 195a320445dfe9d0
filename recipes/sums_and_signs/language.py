"""Language and wide phases: the language part learns to answer, from image tokens that stay as they are.

Three choices make plans worth choosing, and none of them looks at plans; small models without pictures were tried for
each (see the card).

- All steps run the full plan, as the published model was trained. Adding up several digits then comes to need all
  blocks; reading one digit, or knowing a sign, does with fewer.
- Routers keep their initial weights, scaled down, so that all eight experts of a token have a part in its answer.
- What signs are worth is learned by the experts that the smallest top-k leaves out. Without this, signs were known just
  as well with half of the experts, however many there were and however narrow the experts: experts learn in parallel
  what one of them could. New knowledge is given to experts of its own in lifelong learning, too (Chen et al. 2023,
  "Lifelong Language Pretraining with Distribution-Specialized Experts").
"""

import math
from contextlib import nullcontext
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.knobs import TOP_KS, ExecutionPlan
from envs.model.molmoe import AdaptiveMolmoE
from envs.model.vision import VisionBackbone
from recipes.embedded_model.fresh_weights import initialise
from recipes.embedded_model.loop import Metrics
from recipes.embedded_model.reserve import reserve_learns
from recipes.embedded_model.scenes_phase import match_scales
from recipes.embedded_model.shape import build_config
from recipes.sums_and_signs.packing import FAMILY_NAMES, IGNORE, PackedBatch

ROUTER_SCALE: Final = 0.7
FEW_BLOCKS: Final = 12
PLANS: Final = {
    "full": ExecutionPlan(),
    "few_experts": ExecutionPlan(top_k=min(TOP_KS)),
    "few_blocks": ExecutionPlan(blocks=tuple(range(FEW_BLOCKS))),
}
"""What is validated: the full plan, and each knob's other end (of the blocks, simply the last go)."""


def start(vision: VisionBackbone, vocabulary: int, hidden: int, seed: int, batch: PackedBatch) -> AdaptiveMolmoE:
    """A fresh language part behind the trained tower, scaled to `batch`."""
    model = initialise(build_config(vocabulary, hidden), seed)
    with torch.no_grad():
        for block in model.language.blocks:
            block.get_parameter("router").mul_(ROUTER_SCALE)
    model.vision.load_state_dict(vision.state_dict())
    match_scales(model, batch.inputs["images"], batch.inputs["image_masks"])
    return freeze(model)


def freeze(model: AdaptiveMolmoE) -> AdaptiveMolmoE:
    """`model`, all but its tower and routers learning."""
    model.requires_grad_(True)
    model.vision.requires_grad_(False)
    for block in model.language.blocks:
        block.get_parameter("router").requires_grad_(False)
    return model


def language_loss(
    model: AdaptiveMolmoE, batch: PackedBatch, plan: ExecutionPlan = PLANS["full"]
) -> tuple[Tensor, Metrics]:
    """Mean cross entropy of answer tokens, and the share of first tokens predicted right: by family and notation, and
    for values by the number of things that make them up."""
    asked = batch.labels != IGNORE
    with torch.no_grad():
        features = model.vision(batch.inputs["images"], batch.inputs["image_masks"])
    with reserve_learns(min(TOP_KS)) if batch.signs and torch.is_grad_enabled() else nullcontext():
        hidden = model.language(
            model.embed(batch.inputs, features),
            plans=plan,
            position_ids_BT=batch.position_ids,
            attention_mask_BTT=batch.attention_mask,
            experts="dense",
        )
        logits = model.language.logits(hidden[asked]).float()
    labels, families, things = batch.labels[asked], batch.families[asked], batch.things[asked]
    right = (logits.argmax(-1) == labels).float()
    notation = "signs" if batch.signs else "numbers"
    metrics = {f"{notation}_loss": float((loss := F.cross_entropy(logits, labels)).detach())}
    for number, name in enumerate(FAMILY_NAMES):
        metrics[f"{notation}_{name}"] = _share(right[families == number])
    if not batch.signs:
        values = families == FAMILY_NAMES.index("value")
        metrics |= {f"value_of_{n}": _share(right[values & (things == n)]) for n in range(1, 5)}
    return loss, metrics


def _share(right: Tensor) -> float:
    return float(right.mean()) if len(right) else math.nan
