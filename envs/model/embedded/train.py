"""The recipe of the embedded model, from nothing to a model folder, in one resumable command.

`python -m envs.model.embedded.train --out DIR [--minutes M] [--seed S] [--device cpu] [--resume]`

Two phases: the vision tower alone on single crops (`warmup`), then everything on whole scenes (`scenes_phase`), where
captions give way to packed questions and few crops to many. Reading digits is practised under random plans as well,
all else is only ever answered by the whole model: so some families of questions want crops, others depth. The model
folder is DIR/model; the training state and the log lie beside it.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from envs.errors import UserError
from envs.model.embedded.loop import LoopSettings, Metrics, Phase, keep_freed_memory, run_phase, to_device
from envs.model.embedded.packing import PackedBatch, PackedScenes, PackingSettings, only_tier, random_plan
from envs.model.embedded.scenes_phase import match_scales, scenes_loss
from envs.model.embedded.shape import build_config, build_tokenizer, write_files
from envs.model.embedded.warmup import CropBatch, TokenHeads, WarmupCrops, warmup_loss
from envs.model.molmoe import AdaptiveMolmoE
from envs.model.vision import VisionBackbone

_HELD_OUT_SEED = 1
_HELD_OUT = 4  # validation batches a tier


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained.

    Args:
        seed: of initial weights and data.
        warmup_steps, warmup_batch, warmup_lr: crops for the vision tower alone.
        scenes_steps, scenes_lr: packed scenes for the whole model.
        tower_lr: factor on the rate of the warmed-up tower.
        packing: how scenes are drawn and packed.
    """

    seed: int = 0
    warmup_steps: int = 2000
    warmup_batch: int = 256
    warmup_lr: float = 1.5e-3
    scenes_steps: int = 2800
    scenes_lr: float = 1.0e-3
    tower_lr: float = 0.3
    packing: PackingSettings = field(default_factory=PackingSettings)


def warmup_phase(recipe: Recipe, device: torch.device) -> Phase:
    """The vision tower and throw-away readouts, on single crops."""
    torch.manual_seed(recipe.seed)
    config = build_config(build_tokenizer().get_vocab_size())
    vision, heads = VisionBackbone(config).to(device), TokenHeads(config.d_model).to(device)
    encoder = vision.encoder
    for embedding in (encoder.class_embedding, encoder.positional_embedding, vision.pad_embed):
        nn.init.normal_(embedding, std=0.02)
    held_out = WarmupCrops(2, recipe.warmup_batch, recipe.seed + _HELD_OUT_SEED, "validation")

    def loss(batch: CropBatch) -> tuple[Tensor, Metrics]:
        return warmup_loss(vision, heads, batch)

    def validate() -> Metrics:
        return _mean([loss(to_device(held_out[i], device))[1] for i in range(len(held_out))])

    return Phase(
        name="warmup",
        modules=nn.ModuleDict({"vision": vision, "heads": heads}),
        data=WarmupCrops(recipe.warmup_steps, recipe.warmup_batch, recipe.seed),
        loss=loss,
        steps=recipe.warmup_steps,
        lr=recipe.warmup_lr,
        validate=validate,
    )


def scenes_phase(recipe: Recipe, device: torch.device, warm: VisionBackbone) -> Phase:
    """The whole model on packed scenes, its vision tower starting from `warm`."""
    data = PackedScenes(recipe.scenes_steps, recipe.seed, recipe.packing)
    model = AdaptiveMolmoE.initialise(build_config(data.processor.tokenizer.get_vocab_size()), recipe.seed).to(device)
    model.vision.load_state_dict(warm.state_dict())
    match_scales(model, to_device(data[0], device))
    held_out = {
        tier: PackedScenes(
            _HELD_OUT, recipe.seed + _HELD_OUT_SEED, only_tier(recipe.packing, tier), "validation", data.processor
        )
        for tier in ("low", "high")
    }

    def loss(batch: PackedBatch) -> tuple[Tensor, Metrics]:
        return scenes_loss(model, batch)

    def validate() -> Metrics:
        figures: Metrics = {}
        for tier, scenes in held_out.items():
            batches = [scenes[i] for i in range(len(scenes))]
            if tier == "high":
                batches += [replace(b, plan=random_plan(np.random.default_rng(i))) for i, b in enumerate(batches)]
            mean = _mean([loss(to_device(batch, device))[1] for batch in batches])
            figures |= {f"{tier}_{key}": value for key, value in mean.items()}
        return figures

    return Phase(
        name="scenes",
        modules=nn.ModuleDict({"model": model}),
        data=data,
        loss=loss,
        steps=recipe.scenes_steps,
        lr=recipe.scenes_lr,
        validate=validate,
        tower_lr=recipe.tower_lr,
    )


def export(model: AdaptiveMolmoE, folder: Path) -> None:
    """Writes the model folder: weights in half precision, and every file that describes them."""
    write_files(folder)
    model.save_pretrained(folder, dtype=torch.float16)


def train(recipe: Recipe, settings: LoopSettings) -> bool:
    """Runs what is left of the recipe; True when it is complete. The model folder is written either way."""
    warmup = warmup_phase(recipe, settings.device)
    if not run_phase(warmup, settings):
        return False
    vision = warmup.modules["vision"]
    assert isinstance(vision, VisionBackbone)
    scenes = scenes_phase(recipe, settings.device, vision)
    complete = run_phase(scenes, settings)
    model = scenes.modules["model"]
    assert isinstance(model, AdaptiveMolmoE)
    export(model, settings.folder / "model")
    return complete


def check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    """A folder with another run in it is resumed only when asked to, and only under the same recipe."""
    path, described = folder / "recipe.json", json.loads(json.dumps(dataclasses.asdict(recipe)))
    if path.is_file():
        if not resume:
            raise UserError(f"{folder} holds a training run: add --resume to go on with it, or choose another --out")
        if json.loads(path.read_text(encoding="utf-8")) != described:
            raise UserError(f"{path} describes another recipe or seed than this one: choose another --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _mean(figures: list[Metrics]) -> Metrics:
    means = {}
    for key in dict.fromkeys(key for figure in figures for key in figure):
        values = [figure[key] for figure in figures if not math.isnan(figure.get(key, math.nan))]
        means[key] = sum(values) / len(values) if values else math.nan
    return means


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the model goes to OUT/model")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; go on with --resume")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    options = parser.parse_args()
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes} is not allowed: give a number above 0")
    recipe = Recipe(seed=options.seed)
    check_folder(options.out, recipe, options.resume)
    keep_freed_memory()
    settings = LoopSettings(options.out, torch.device(options.device), deadline=time.monotonic() + 60 * options.minutes)
    if not train(recipe, settings):
        print(f"time is up; go on with --out {options.out} --resume")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
