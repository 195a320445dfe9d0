"""The embedded task: scenes of handwritten digits and shapes, drawn on demand, and questions about them."""

from collections.abc import Sequence

import numpy as np

from envs.data.sample import Sample
from envs.data.scenes.layout import Scene, SceneObject, make_scene
from envs.data.scenes.questions import FAMILIES, Question, all_questions, caption
from envs.data.scenes.splits import SceneImage, fresh_scenes, load_scenes

__all__ = [
    "FAMILIES",
    "Question",
    "Scene",
    "SceneImage",
    "SceneObject",
    "all_questions",
    "caption",
    "fresh_scenes",
    "load",
    "load_scenes",
    "make_scene",
]


def load(split: str, limit: int | None = None, seed: int = 0) -> Sequence[Sample]:
    """At most `limit` samples of a split, picked at random by `seed`, in the order of the split.

    Raises:
        UserError: no such split.
    """
    samples = load_scenes(split)
    if limit is None or limit >= len(samples):
        return samples
    chosen = np.random.default_rng([seed, len(samples)]).permutation(len(samples))[:limit]
    return tuple(samples[index] for index in sorted(chosen.tolist()))
