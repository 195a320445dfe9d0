"""The recipe of the embedded model, from nothing to a model folder, in one resumable command.

`python -m recipes.embedded_model.train --out DIR [--start MODEL [--first PHASE]] [--minutes M] [--seed S]
[--device cpu] [--resume]`

Five phases: the vision tower alone on single crops (`warmup`), then the full model on scenes (`scenes_phase`), where
captions give way to packed questions and few crops to many. The last three make questions need different knobs.
`depth_phase`: reading digits is practised under random plans, all else, sums above all, is only ever answered by the
full model. `reserve_phase`: corners are learnt by the experts that the smallest top-k leaves out. `contrast_phase`:
experts are widened, the last two of a token's eight continue with corners and sums, and plans diverge. `--start` takes
a model folder in place of the phases before `--first`. The model folder is DIR/model; the training state and the log
are next to it.
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from envs.errors import UserError
from envs.knobs import TIERS
from envs.model.molmoe import AdaptiveMolmoE
from envs.model.vision import VisionBackbone
from recipes.embedded_model.fresh_weights import initialise
from recipes.embedded_model.loop import LoopSettings, Metrics, Phase, keep_freed_memory, run_phase, to_device
from recipes.embedded_model.packing import PackedBatch, PackedScenes, PackingSettings, only_tier, random_plan
from recipes.embedded_model.scenes_phase import match_scales, scenes_loss
from recipes.embedded_model.shape import EXPERT_HIDDEN, build_config, build_tokenizer, write_files
from recipes.embedded_model.warmup import CropBatch, TokenHeads, WarmupCrops, warmup_loss
from recipes.embedded_model.widen import widen

_HELD_OUT_SEED = 1
_HELD_OUT = 4  # batches of each kind
_DEPTH_SEED, _RESERVE_SEED, _CONTRAST_SEED = 100, 200, 300  # set the scenes of these phases apart from those before
DEPTH_PACKING = PackingSettings(
    early_tiers=(0.3, 0.22, 0.48),
    late_tiers=(0.3, 0.22, 0.48),
    text_tokens=150,
    captions_until=0.0,
    random_plans=0.2,
    late_quotas={"color": 1, "shape": 1, "count": 2, "sum": 4, "digit": 3, "compare": 3, "match": 2},
    plan_quotas={"digit": 4, "match": 4},
)
# Under the full plan corners are first learnt by the reserve alone, then by all: whoever has them first keeps most of
# the work. Random plans ask for a few throughout, so that fewer experts answer some.
RESERVE_PACKING = replace(
    DEPTH_PACKING,
    early_tiers=(0.4, 0.25, 0.35),
    late_tiers=(0.4, 0.25, 0.35),
    captions_until=0.25,
    random_plans=0.3,
    early_quotas={"color": 1, "shape": 1, "count": 2, "sum": 4, "digit": 4, "compare": 3, "match": 3},
    late_quotas={"color": 1, "shape": 1, "count": 3, "sum": 4, "corners": 4, "digit": 4, "compare": 2, "match": 3},
    plan_quotas={"digit": 4, "match": 4, "corners": 2, "sum": 1, "count": 1},
    reserve_share=0.3,
    reserve_quotas={"corners": 4},
)
# Fewer scenes at the medium tier than at either end: what it reads well, no question needs the high tier for.
CONTRAST_PACKING = replace(
    RESERVE_PACKING,
    early_tiers=(0.35, 0.12, 0.53),
    late_tiers=(0.35, 0.12, 0.53),
    captions_until=0.0,
    random_plans=0.15,
    late_quotas={"color": 1, "shape": 1, "count": 3, "sum": 3, "corners": 2, "digit": 4, "compare": 2, "match": 3},
    plan_quotas={"digit": 4, "match": 4},
    reserve_share=0.45,
    reserve_first=6,
    reserve_quotas={"corners": 4, "sum": 4},
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained.

    Args:
        seed: of initial weights and data.
        warmup_steps, warmup_batch, warmup_lr: crops for the vision tower alone.
        scenes_steps, scenes_lr: packed scenes for the full model.
        tower_lr: factor on the rate of the warmed-up tower.
        packing: how scenes are drawn and packed.
        depth_steps, depth_lr, depth_packing: the same for the depth phase.
        router_scale: factor on all router weights before the depth phase. Trained routers favour one or two experts so
            much that the others can go unnoticed; flattened, all eight have a part in whatever is learnt from then on.
        reserve_steps, reserve_lr, reserve_packing: the same for the reserve phase.
        rehearsal_lr: factor on the rate of its other steps, which only have to keep what was learnt before.
        reserve_tower_lr: `tower_lr` of this phase, which is the longest look at small digits.
        contrast_steps, contrast_packing: the same for the contrast phase, which has all rates of the reserve phase.
        narrow_hidden: units of an expert before the contrast phase, unless `start` gives them: what has to be learnt
            first fits in narrow experts, at half the time a step.
        hidden: units of an expert from the contrast phase on.
        start: model folder that phase `first` starts from; None runs all phases.
        first: a name of `LATE_PHASES`.
    """

    seed: int = 0
    warmup_steps: int = 1600
    warmup_batch: int = 256
    warmup_lr: float = 1.5e-3
    scenes_steps: int = 1650
    scenes_lr: float = 1.0e-3
    tower_lr: float = 0.3
    packing: PackingSettings = field(default_factory=PackingSettings)
    depth_steps: int = 1500
    depth_lr: float = 6.0e-4
    depth_packing: PackingSettings = field(default_factory=lambda: DEPTH_PACKING)
    router_scale: float = 0.25
    reserve_steps: int = 2600
    reserve_lr: float = 8.0e-4
    rehearsal_lr: float = 0.5
    reserve_tower_lr: float = 1.0
    reserve_packing: PackingSettings = field(default_factory=lambda: RESERVE_PACKING)
    contrast_steps: int = 1700
    contrast_packing: PackingSettings = field(default_factory=lambda: CONTRAST_PACKING)
    narrow_hidden: int = 96
    hidden: int = EXPERT_HIDDEN
    start: str | None = None
    first: str = "depth"


def warmup_phase(recipe: Recipe, device: torch.device) -> Phase:
    """The vision tower and throw-away readouts, on single crops."""
    torch.manual_seed(recipe.seed)
    config = build_config(build_tokenizer().get_vocab_size(), recipe.narrow_hidden)
    vision, heads = VisionBackbone(config).to(device), TokenHeads(config.d_model).to(device)
    encoder = vision.encoder
    for embedding in (encoder.class_embedding, encoder.positional_embedding, vision.pad_embed):
        nn.init.normal_(embedding, std=0.02)
    held_out = WarmupCrops(2, recipe.warmup_batch, recipe.seed + _HELD_OUT_SEED, "validation")

    def loss(batch: CropBatch) -> tuple[Tensor, Metrics]:
        return warmup_loss(vision, heads, batch)

    def validate() -> Metrics:
        return mean_metrics([loss(to_device(held_out[i], device))[1] for i in range(len(held_out))])

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
    """The full model on packed scenes, its vision tower starting from `warm`."""
    data = PackedScenes(recipe.scenes_steps, recipe.seed, recipe.packing)
    config = build_config(len(data.processor.tokenizer), recipe.narrow_hidden)
    model = initialise(config, recipe.seed).to(device)
    model.vision.load_state_dict(warm.state_dict())
    inputs = to_device(data[0], device).inputs
    match_scales(model, inputs["images"], inputs["image_masks"])
    return _packed_phase("scenes", model, data, recipe, recipe.scenes_lr)


def depth_phase(recipe: Recipe, model: AdaptiveMolmoE) -> Phase:
    """`model` trained on, with families of questions distinguished by the plans they are seen under."""
    with torch.no_grad():
        for block in model.language.blocks:
            block.get_parameter("router").mul_(recipe.router_scale)
    data = PackedScenes(recipe.depth_steps, recipe.seed + _DEPTH_SEED, recipe.depth_packing)
    return _packed_phase("depth", model, data, recipe, recipe.depth_lr)


def reserve_phase(recipe: Recipe, model: AdaptiveMolmoE) -> Phase:
    """`model` trained on: a share of the steps teaches one more family to the experts beyond the smallest top-k.

    As new knowledge is given to experts of its own in lifelong learning (Chen et al. 2023, "Lifelong Language
    Pretraining with Distribution-Specialized Experts"), so that the old ones keep what they know.
    """
    data = PackedScenes(recipe.reserve_steps, recipe.seed + _RESERVE_SEED, recipe.reserve_packing)
    return _with_reserve("reserve", model, data, recipe)


def contrast_phase(recipe: Recipe, model: AdaptiveMolmoE) -> Phase:
    """`model`, widened and trained on: a token's last two experts learn corners and sums, and only digit and match are
    asked under random plans.
    """
    model = widen(model, recipe.hidden, recipe.seed)
    data = PackedScenes(recipe.contrast_steps, recipe.seed + _CONTRAST_SEED, recipe.contrast_packing)
    return _with_reserve("contrast", model, data, recipe)


def _with_reserve(name: str, model: AdaptiveMolmoE, data: PackedScenes, recipe: Recipe) -> Phase:
    phase = _packed_phase(name, model, data, recipe, recipe.reserve_lr)
    return replace(
        phase,
        rate=lambda batch: recipe.rehearsal_lr if batch.reserve is None else 1.0,
        tower_lr=recipe.reserve_tower_lr,
    )


LATE_PHASES: Final = {"depth": depth_phase, "reserve": reserve_phase, "contrast": contrast_phase}
"""The phases after the scenes phase, in order; `--first` names one of them."""


def _packed_phase(name: str, model: AdaptiveMolmoE, data: PackedScenes, recipe: Recipe, lr: float) -> Phase:
    """A phase over packed scenes, validated at every tier and, at the high one, under random plans too."""
    seed = recipe.seed + _HELD_OUT_SEED
    held_out = {
        tier: PackedScenes(_HELD_OUT, seed, only_tier(data.settings, tier), "validation", data.processor)
        for tier in TIERS
    }

    def loss(batch: PackedBatch) -> tuple[Tensor, Metrics]:
        return scenes_loss(model, batch)

    def validate() -> Metrics:
        figures: Metrics = {}
        for tier, scenes in held_out.items():
            batches = [scenes[i] for i in range(len(scenes))]
            if tier == "high":
                batches += [replace(b, plan=random_plan(np.random.default_rng(i))) for i, b in enumerate(batches)]
            mean = mean_metrics([loss(to_device(batch, model.device))[1] for batch in batches])
            figures |= {f"{tier}_{key}": value for key, value in mean.items()}
        return figures

    return Phase(
        name=name,
        modules=nn.ModuleDict({"model": model}),
        data=data,
        loss=loss,
        steps=len(data),
        lr=lr,
        validate=validate,
        tower_lr=recipe.tower_lr,
    )


def export(model: AdaptiveMolmoE, folder: Path) -> None:
    """Writes the model folder: weights in half precision, and every file that describes them."""
    write_files(folder)
    copy.deepcopy(model).half().save_pretrained(folder)


def train(recipe: Recipe, settings: LoopSettings) -> bool:
    """Runs what is left of the recipe; True when it is complete. A model folder is written once there is a model."""
    late = list(LATE_PHASES)
    if recipe.start is not None:
        model = AdaptiveMolmoE.from_pretrained(recipe.start, device=settings.device).requires_grad_(True)
        late, complete = late[late.index(recipe.first) :], True
    else:
        warmup = warmup_phase(recipe, settings.device)
        if not run_phase(warmup, settings):
            return False
        vision = warmup.modules["vision"]
        assert isinstance(vision, VisionBackbone)
        scenes = scenes_phase(recipe, settings.device, vision)
        complete = run_phase(scenes, settings)
        model = _model_of(scenes)
    for name in late:
        if complete:
            phase = LATE_PHASES[name](recipe, model)
            complete, model = run_phase(phase, settings), _model_of(phase)
    export(model, settings.folder / "model")
    return complete


def _model_of(phase: Phase) -> AdaptiveMolmoE:
    model = phase.modules["model"]
    assert isinstance(model, AdaptiveMolmoE)
    return model


def check_folder(folder: Path, recipe: dict[str, Any], resume: bool) -> None:
    """A folder with another run in it is resumed only when asked to, and only under the same recipe."""
    path, described = folder / "recipe.json", json.loads(json.dumps(recipe))
    if path.is_file():
        if not resume:
            raise UserError(f"{folder} contains a training run: add --resume to continue it, or choose another --out")
        if json.loads(path.read_text(encoding="utf-8")) != described:
            raise UserError(f"{path} describes another recipe or seed than this one: choose another --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def mean_metrics(figures: list[Metrics]) -> Metrics:
    """Means of every figure over those that have it."""
    means = {}
    for key in dict.fromkeys(key for figure in figures for key in figure):
        values = [figure[key] for figure in figures if not math.isnan(figure.get(key, math.nan))]
        means[key] = sum(values) / len(values) if values else math.nan
    return means


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the model goes to OUT/model")
    parser.add_argument("--start", help="model folder to start phase FIRST from, in place of those before")
    parser.add_argument("--first", choices=LATE_PHASES, help="phase that --start begins with (depth)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; continue with --resume")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT")
    options = parser.parse_args()
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes} is not allowed: give a number above 0")
    if options.first and not options.start:
        raise UserError(f"--first {options.first} needs --start MODEL: without one all phases run")
    recipe = Recipe(seed=options.seed, start=options.start, first=options.first or "depth")
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
