"""Pictures as training sequences: one image, many questions behind it, none of which sees another.

Image tokens are most of a prompt. Packed, they are paid once for all questions of a picture: every question attends to
the image and to itself alone, at the positions it would have on its own, so that what is learned is what is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from envs.knobs import TIERS
from envs.processing.processor import MolmoEProcessor, collate
from recipes.sums_and_signs.language_files import build_processor
from recipes.sums_and_signs.pictures import FORMAT_NAMES, NOTATIONS, Picture, draw_picture, make_picture
from recipes.sums_and_signs.questions import FAMILIES, Question, all_questions, caption

IGNORE: Final = -100
FAMILY_NAMES: Final = (*FAMILIES, "caption")
_SEEDS_PER_STEP: Final = 1000


@dataclass(frozen=True)
class PackingSettings:
    """How batches are drawn.

    Args:
        images: pictures a step, by tier; they cost about the same.
        tiers: how often each tier is drawn.
        small_shares: by tier, the share of pictures with small digits; few where they cannot be read.
        text_tokens: tokens of questions and answers behind each image.
        captions_until: part of the steps over which the share of pictures with a caption falls from `captions` to 0.
        captions: that share at the first step.
        signs_share: share of steps with signs; the others show digits and sums, two of three sums.
        quotas: most questions of each family about one picture.
    """

    images: tuple[int, int, int] = (24, 14, 9)
    tiers: tuple[float, float, float] = (0.6, 0.15, 0.25)
    small_shares: tuple[float, float, float] = (0.1, 0.3, 0.6)
    text_tokens: int = 112
    captions_until: float = 0.4
    captions: float = 0.6
    signs_share: float = 0.4
    quotas: Mapping[str, int] = field(default_factory=lambda: {"value": 4, "total": 2, "more": 2, "colors": 1})


@dataclass(frozen=True)
class PackedBatch:
    """Pictures of one tiling: model inputs of batch B and length T, and what each position should say next.

    `labels` (B, T) is -100 but where an answer's token or its end is due. Where an answer's first token is due,
    `families` (B, T) is the question's family and `things` what its answer is made from; -1 elsewhere.
    """

    inputs: dict[str, Tensor]
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    families: Tensor
    things: Tensor
    signs: bool


@dataclass
class PackedPictures(Dataset[PackedBatch]):
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
        tier = int(rng.choice(len(TIERS), p=self.settings.tiers))
        signs = bool(rng.random() < self.settings.signs_share)
        pictures = self._pictures(rng, step, tier, signs)
        until = self.settings.captions_until
        share = self.settings.captions * max(0.0, 1 - step / self.steps / until) if until else 0.0
        asked = [_choose(picture, rng, self.settings.quotas, rng.random() < share) for picture in pictures]
        return pack(self.processor, pictures, asked, TIERS[tier], self.settings.text_tokens, signs)

    def _pictures(self, rng: np.random.Generator, step: int, tier: int, signs: bool) -> list[Picture]:
        """Pictures of one canvas, and of the tiling that the first of them has."""
        name = str(rng.choice(FORMAT_NAMES))
        # No picture is drawn twice in a run.
        first = (self.seed * 10_000_000 + step) * _SEEDS_PER_STEP
        pictures: list[Picture] = []
        tiling = None
        for seed in range(first, first + _SEEDS_PER_STEP):
            notation = "signs" if signs else NOTATIONS[int(rng.random() < 2 / 3)]
            picture = make_picture(self.stream, seed, name, notation, self.settings.small_shares[tier])
            found = self.processor.tiling((picture.width, picture.height), TIERS[tier])
            tiling = tiling or found
            if found == tiling:
                pictures.append(picture)
            if len(pictures) == self.settings.images[tier]:
                break
        return pictures


def _choose(
    picture: Picture, rng: np.random.Generator, quotas: Mapping[str, int], with_caption: bool
) -> list[Question]:
    """Questions about one picture in random order, at most some of each family; a caption comes first."""
    left = dict(quotas)
    chosen = [caption(picture)] if with_caption else []
    questions = all_questions(picture)
    for index in rng.permutation(len(questions)):
        question = questions[int(index)]
        if left.get(question.family, 0):
            left[question.family] -= 1
            chosen.append(question)
    return chosen


def pack(
    processor: MolmoEProcessor,
    pictures: list[Picture],
    questions: list[list[Question]],
    tier: str,
    text_tokens: int,
    signs: bool,
) -> PackedBatch:
    """One batch of pictures with equal tilings; questions that no longer fit in `text_tokens` are left out."""
    requests = [processor(Image.fromarray(draw_picture(picture)), "", tier) for picture in pictures]
    prefix = requests[0]["input_ids"].shape[1] - len(processor.prompt_ids(""))
    length = prefix + text_tokens
    size = (len(pictures), length)
    ids, labels = torch.full(size, -1), torch.full(size, IGNORE)
    families, things = torch.full(size, -1), torch.full(size, -1)
    positions = torch.arange(length).expand(size).clone()
    # Which stretch a token belongs to: 0 is the image, questions count from 1, padding is alone.
    stretch = torch.zeros(size, dtype=torch.long)
    stretch[:, prefix:] = 10_000 + torch.arange(text_tokens)
    for row, (request, asked) in enumerate(zip(requests, questions, strict=True)):
        ids[row, :prefix] = request["input_ids"][0, :prefix]
        start = prefix
        for number, question in enumerate(asked, 1):
            prompt = processor.prompt_ids(question.text)
            answer = [*processor.encode(f" {question.answer}"), processor.eos_id]
            stop = start + len(prompt) + len(answer) - 1  # the end token is predicted, never fed
            if stop > length:
                continue
            ids[row, start:stop] = torch.tensor([*prompt, *answer[:-1]])
            labels[row, stop - len(answer) : stop] = torch.tensor(answer)
            families[row, stop - len(answer)] = FAMILY_NAMES.index(question.family)
            things[row, stop - len(answer)] = question.things
            positions[row, start:stop] = prefix + torch.arange(stop - start)
            stretch[row, start:stop] = number
            start = stop
    same = stretch[:, :, None] == stretch[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & (same | (stretch[:, None, :] == 0))
    inputs = {key: value for key, value in collate(requests).items() if key != "input_ids"}
    return PackedBatch({"input_ids": ids, **inputs}, positions, mask, labels, families, things, signs)
