"""Scenes as training sequences: one image, many questions behind it, none of which sees another.

Image tokens are most of a prompt. Packed, they are paid once for all questions of a scene: every question attends to
the image and to itself alone, at the positions it would have on its own, so that what is learned is what is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from envs.data.scenes import FAMILIES, Question, Scene, all_questions, caption, make_scene
from envs.data.scenes.draw import draw_scene
from envs.data.scenes.layout import FORMATS
from envs.knobs import INSERTIONS, MODEL_BLOCKS, TIERS, TOP_KS, ExecutionPlan
from envs.processing.processor import MolmoEProcessor, collate
from recipes.embedded_model.shape import build_processor

IGNORE = -100
FAMILY_NAMES = (*FAMILIES, "caption")
_SEEDS_PER_STEP = 1000
Quotas = Mapping[str, int]


@dataclass(frozen=True)
class PackingSettings:
    """How batches are drawn. The defaults are those of the scenes phase.

    Args:
        images: scenes a step, by tier; they cost about the same.
        early_tiers, late_tiers: how often each tier is drawn at the first and at the last step; few crops first,
            because which words go with which things is learned as well from them and in a fraction of the time.
        tiers_until: part of the steps over which the first turn into the last.
        text_tokens: tokens of questions and answers behind each image.
        captions_until: part of the steps over which the share of scenes with a caption falls from 1 to `caption_floor`;
            0 starts at the latter.
        random_plans: share of steps run under a random plan instead of the full one.
        early_quotas: most questions of each family about one scene while the share of captions falls: they teach what
            stands where, and questions mostly read it off.
        late_quotas: the same from then on, with more of those that take two steps.
        plan_quotas: the same under a random plan, where no captions are asked for then; None asks as at any step.
            Families left out of it are never answered with less than the full model, and come to need it.
        reserve_share: share of steps that teach only the last of each token's experts (full plan).
        reserve_first: experts of a token that such steps leave as they are.
        reserve_quotas: the questions of those steps: families that come to need all experts.
    """

    images: tuple[int, int, int] = (18, 12, 9)
    early_tiers: tuple[float, float, float] = (0.55, 0.25, 0.2)
    late_tiers: tuple[float, float, float] = (0.16, 0.22, 0.62)
    tiers_until: float = 0.35
    text_tokens: int = 140
    captions_until: float = 0.4
    caption_floor: float = 0.1
    random_plans: float = 0.12
    early_quotas: Quotas = field(
        default_factory=lambda: {"color": 1, "shape": 2, "count": 2, "digit": 4, "compare": 3, "match": 2}
    )
    late_quotas: Quotas = field(
        default_factory=lambda: {"color": 3, "shape": 1, "count": 3, "digit": 2, "compare": 4, "match": 2}
    )
    plan_quotas: Quotas | None = None
    reserve_share: float = 0.0
    reserve_first: int = min(TOP_KS)
    reserve_quotas: Quotas = field(default_factory=dict)


def only_tier(packing: PackingSettings, tier: str) -> PackingSettings:
    """The same, but questions alone, at one tier and under the full plan: for validation."""
    low, medium, high = (float(name == tier) for name in TIERS)
    return replace(
        packing,
        early_tiers=(low, medium, high),
        late_tiers=(low, medium, high),
        captions_until=0.0,
        caption_floor=0.0,
        random_plans=0.0,
        reserve_share=0.0,
    )


@dataclass(frozen=True)
class PackedBatch:
    """Scenes of one tiling: model inputs of batch B and length T, and what each position should say next.

    `labels` (B, T) is -100 but where an answer's token or its end is due; `families` (B, T) is the question's family
    where the answer itself is due, -1 elsewhere. With `reserve` the first so many experts of each token do not learn.
    """

    inputs: dict[str, Tensor]
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    families: Tensor
    plan: ExecutionPlan
    reserve: int | None = None


@dataclass
class PackedScenes(Dataset[PackedBatch]):
    """Batch `i` is a pure function of (seed, i)."""

    steps: int
    seed: int
    settings: PackingSettings = PackingSettings()
    stream: str = "corpus"
    processor: MolmoEProcessor = field(default_factory=build_processor)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> PackedBatch:
        rng = np.random.default_rng([self.seed, 2, step])
        tier = str(rng.choice(TIERS, p=self._tier_shares(step)))
        scenes = self._scenes(rng, step, tier)
        until = self.settings.captions_until
        falling = max(0.0, 1 - step / self.steps / until) if until else 0.0
        caption_share = max(falling, self.settings.caption_floor)
        quotas = self.settings.early_quotas if falling > 0 else self.settings.late_quotas
        plan = ExecutionPlan()
        from_reserve = self.settings.reserve_share > 0 and bool(rng.random() < self.settings.reserve_share)
        if from_reserve:
            quotas, caption_share = self.settings.reserve_quotas, 0.0
        elif rng.random() < self.settings.random_plans:
            plan = random_plan(rng)
            if self.settings.plan_quotas is not None:
                quotas, caption_share = self.settings.plan_quotas, 0.0
        questions = [choose_questions(scene, rng, quotas, rng.random() < caption_share) for scene in scenes]
        batch = pack(self.processor, scenes, questions, tier, plan, self.settings.text_tokens)
        return replace(batch, reserve=self.settings.reserve_first if from_reserve else None)

    def _tier_shares(self, step: int) -> list[float]:
        late = min(1.0, step / self.steps / self.settings.tiers_until)
        pairs = zip(self.settings.early_tiers, self.settings.late_tiers, strict=True)
        return [(1 - late) * first + late * last for first, last in pairs]

    def _scenes(self, rng: np.random.Generator, step: int, tier: str) -> list[Scene]:
        """Scenes of one canvas, and of the tiling that the first of them has."""
        name = str(rng.choice(list(FORMATS), p=[f.weight for f in FORMATS.values()]))
        # No scene is drawn twice in a run.
        first = (self.seed * 10_000_000 + step) * _SEEDS_PER_STEP
        wanted = self.settings.images[TIERS.index(tier)]
        scenes: list[Scene] = []
        tiling = None
        for seed in range(first, first + _SEEDS_PER_STEP):
            scene = make_scene(self.stream, seed, name)
            tiling = tiling or self._tiling(scene, tier)
            if self._tiling(scene, tier) == tiling:
                scenes.append(scene)
            if len(scenes) == wanted:
                break
        return scenes

    def _tiling(self, scene: Scene, tier: str) -> tuple[int, int]:
        return self.processor.tiling((scene.width, scene.height), tier)


def choose_questions(scene: Scene, rng: np.random.Generator, quotas: Quotas, with_caption: bool) -> list[Question]:
    """Questions about one scene in random order, at most some of each family; a caption comes first."""
    left = dict(quotas)
    chosen = [caption(scene)] if with_caption else []
    questions = all_questions(scene)
    for index in rng.permutation(len(questions)):
        question = questions[int(index)]
        if left.get(question.family, 0):
            left[question.family] -= 1
            chosen.append(question)
    return chosen


def random_plan(rng: np.random.Generator) -> ExecutionPlan:
    """Any insertion position and top-k, with up to four blocks behind it dropped."""
    insertion = int(rng.choice(INSERTIONS))
    dropped = rng.permutation(np.arange(insertion, MODEL_BLOCKS))[: int(rng.integers(5))]
    kept = tuple(block for block in range(MODEL_BLOCKS) if block not in dropped)
    return ExecutionPlan("high", insertion, int(rng.choice(TOP_KS)), kept)


def pack(
    processor: MolmoEProcessor,
    scenes: list[Scene],
    questions: list[list[Question]],
    tier: str,
    plan: ExecutionPlan,
    text_tokens: int,
) -> PackedBatch:
    """One batch of scenes with equal tilings; questions that no longer fit in `text_tokens` are left out."""
    requests = [processor(Image.fromarray(draw_scene(scene)), "", tier) for scene in scenes]
    bare = len(processor.prompt_ids(""))
    prefix = requests[0]["input_ids"].shape[1] - bare
    length = prefix + text_tokens
    size = (len(scenes), length)
    ids, labels = torch.full(size, -1), torch.full(size, IGNORE)
    families = torch.full(size, -1)
    positions = torch.arange(length).expand(size).clone()
    # Which stretch a token belongs to: 0 is the image, questions count from 1, padding is alone.
    stretch = torch.zeros(size, dtype=torch.long)
    stretch[:, prefix:] = 10_000 + torch.arange(text_tokens)
    for row, (request, asked) in enumerate(zip(requests, questions, strict=True)):
        ids[row, :prefix] = request["input_ids"][0, :prefix]
        start = prefix
        for number, question in enumerate(asked, 1):
            prompt, answer = processor.prompt_ids(question.text), processor.encode(f" {question.answer}")
            answer = [*answer, processor.eos_id]
            stop = start + len(prompt) + len(answer) - 1  # the end token is predicted, never fed
            if stop > length:
                continue
            ids[row, start:stop] = torch.tensor([*prompt, *answer[:-1]])
            labels[row, stop - len(answer) : stop] = torch.tensor(answer)
            families[row, stop - len(answer) : stop - 1] = FAMILY_NAMES.index(question.family)
            positions[row, start:stop] = prefix + torch.arange(stop - start)
            stretch[row, start:stop] = number
            start = stop
    same = stretch[:, :, None] == stretch[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & (same | (stretch[:, None, :] == 0))
    inputs = {key: value for key, value in collate(requests).items() if key != "input_ids"}
    return PackedBatch({"input_ids": ids, **inputs}, positions, mask, labels, families, plan)
