"""The recipe of the next embedded model, from nothing to a model folder, in one resumable command.

`python -m recipes.sums_and_signs.train --out DIR [--minutes M] [--seed S] [--device cpu] [--resume]`

Three phases: the vision tower alone on single crops (`vision`), then the language part on pictures, from captions to
questions (`language`), then the same with experts as wide as they are shipped (`wide`). A phase needs nothing but the
checkpoint that the one before it left in DIR: a folder that has been moved to another machine continues there. The
model folder is DIR/model; the training state and the log are next to it.
"""

import argparse
import copy
import dataclasses
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from envs.errors import UserError
from envs.model.molmoe import AdaptiveMolmoE
from envs.model.vision import VisionBackbone
from recipes.embedded_model.loop import LoopSettings, Metrics, Phase, keep_freed_memory, run_phase, to_device
from recipes.embedded_model.shape import EXPERT_HIDDEN, build_config, write_model_files
from recipes.embedded_model.train import check_folder, mean_metrics
from recipes.embedded_model.widen import widen
from recipes.sums_and_signs.language import PLANS, freeze, language_loss, start
from recipes.sums_and_signs.language_files import build_processor, build_tokenizer
from recipes.sums_and_signs.packing import PackedBatch, PackedPictures, PackingSettings
from recipes.sums_and_signs.vision import CropBatch, Crops, TokenHeads, vision_loss

_HELD_OUT_SEED: Final = 1
_HELD_OUT: Final = 6  # batches
_WIDE_SEED: Final = 100  # sets the pictures of this phase apart from those before


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained.

    Args:
        seed: of initial weights and data.
        vision_steps, vision_batch, vision_lr: crops for the vision tower alone.
        language_steps, language_lr: packed pictures for the language part.
        wide_steps, wide_lr: the same once experts are wide.
        packing: how pictures are drawn and packed; the wide phase has no captions.
        narrow_hidden: units of an expert before the wide phase: what is to be learned fits in narrow experts, at a
            fraction of the time a step.
        hidden: units of an expert from the wide phase on.
    """

    seed: int = 0
    vision_steps: int = 1600
    vision_batch: int = 256
    vision_lr: float = 1.5e-3
    language_steps: int = 2400
    language_lr: float = 2.0e-3
    wide_steps: int = 300
    wide_lr: float = 5.0e-4
    packing: PackingSettings = field(default_factory=PackingSettings)
    narrow_hidden: int = 48
    hidden: int = EXPERT_HIDDEN


def vision_phase(recipe: Recipe, device: torch.device) -> Phase:
    """The vision tower and throw-away readouts, on single crops."""
    torch.manual_seed(recipe.seed)
    config = build_config(build_tokenizer().get_vocab_size(), recipe.narrow_hidden)
    vision, heads = VisionBackbone(config).to(device), TokenHeads(config.d_model).to(device)
    for embedding in (vision.encoder.class_embedding, vision.encoder.positional_embedding, vision.pad_embed):
        nn.init.normal_(embedding, std=0.02)
    held_out = Crops(2, recipe.vision_batch, recipe.seed + _HELD_OUT_SEED, "validation")

    def loss(batch: CropBatch) -> tuple[Tensor, Metrics]:
        return vision_loss(vision, heads, batch)

    def validate() -> Metrics:
        return mean_metrics([loss(to_device(held_out[i], device))[1] for i in range(len(held_out))])

    return Phase(
        name="vision",
        modules=nn.ModuleDict({"vision": vision, "heads": heads}),
        data=Crops(recipe.vision_steps, recipe.vision_batch, recipe.seed),
        loss=loss,
        steps=recipe.vision_steps,
        lr=recipe.vision_lr,
        validate=validate,
    )


def language_phase(recipe: Recipe, device: torch.device, tower: VisionBackbone) -> Phase:
    """A fresh language part behind the trained tower."""
    data = PackedPictures(recipe.language_steps, recipe.seed, recipe.packing)
    vocabulary = len(data.processor.tokenizer)
    model = start(tower.cpu(), vocabulary, recipe.narrow_hidden, recipe.seed, data[0]).to(device)
    return _packed_phase("language", model, data, recipe.language_lr)


def wide_phase(recipe: Recipe, narrow: AdaptiveMolmoE) -> Phase:
    """`narrow` with wider experts, trained on."""
    data = PackedPictures(recipe.wide_steps, recipe.seed + _WIDE_SEED, replace(recipe.packing, captions_until=0.0))
    return _packed_phase("wide", freeze(widen(narrow, recipe.hidden, recipe.seed)), data, recipe.wide_lr)


def _packed_phase(name: str, model: AdaptiveMolmoE, data: PackedPictures, lr: float) -> Phase:
    """A phase over packed pictures, validated on large digits and signs at the low tier under every plan of `PLANS`."""
    settings = replace(
        data.settings, tiers=(1.0, 0.0, 0.0), small_shares=(0.0, 0.0, 0.0), captions_until=0.0, signs_share=0.34
    )
    held_out = PackedPictures(_HELD_OUT, _HELD_OUT_SEED, settings, "validation", data.processor)

    def loss(batch: PackedBatch) -> tuple[Tensor, Metrics]:
        return language_loss(model, batch)

    def validate() -> Metrics:
        figures: Metrics = {}
        batches = [to_device(held_out[i], model.device) for i in range(len(held_out))]
        for plan_name, plan in PLANS.items():
            mean = mean_metrics([language_loss(model, batch, plan)[1] for batch in batches])
            figures |= {f"{plan_name}_{key}": value for key, value in mean.items()}
        return figures

    return Phase(name, nn.ModuleDict({"model": model}), data, loss, len(data), lr, validate)


def export(model: AdaptiveMolmoE, folder: Path) -> None:
    """Writes the model folder: weights in half precision, and every file that describes them."""
    write_model_files(folder, build_tokenizer(), build_processor(), model.config)
    copy.deepcopy(model).half().save_pretrained(folder)


def train(recipe: Recipe, settings: LoopSettings) -> bool:
    """Runs what is left of the recipe; True when it is complete. A model folder is written once there is a model."""
    vision = vision_phase(recipe, settings.device)
    if not run_phase(vision, settings):
        return False
    tower = vision.modules["vision"]
    assert isinstance(tower, VisionBackbone)
    phase = language_phase(recipe, settings.device, tower)
    if complete := run_phase(phase, settings):
        phase = wide_phase(recipe, _model_of(phase))
        complete = run_phase(phase, settings)
    export(_model_of(phase), settings.folder / "model")
    return complete


def _model_of(phase: Phase) -> AdaptiveMolmoE:
    model = phase.modules["model"]
    assert isinstance(model, AdaptiveMolmoE)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the next embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the model goes to OUT/model")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; continue with --resume")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT")
    options = parser.parse_args()
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes} is not allowed: give a number above 0")
    recipe = Recipe(seed=options.seed)
    check_folder(options.out, dataclasses.asdict(recipe), options.resume)
    keep_freed_memory()
    settings = LoopSettings(options.out, torch.device(options.device), deadline=time.monotonic() + 60 * options.minutes)
    if not train(recipe, settings):
        print(f"time is up; continue with --out {options.out} --resume")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
