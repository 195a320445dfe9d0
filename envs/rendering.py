"""A picture of one episode: image, question, budget, choices and answer."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from envs.env_resources import EnvResources
from envs.knobs import TIERS, Knobs
from envs.schedule import Context

SIZE: Final = 384
LINE: Final = 16


def draw_episode(resources: EnvResources, context: Context, info: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """The episode about `context` as pixels (480, 384, 3).

    Args:
        info: final infos of the episode; empty before its end.
    """
    sample = resources.samples[context.sample]
    canvas = Image.new("RGB", (SIZE, SIZE + 6 * LINE), "white")
    if sample.image is not None:
        picture = sample.image.load().copy()
        picture.thumbnail((SIZE, SIZE))
        canvas.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    lines = [f"question: {sample.question}", f"budget: {context.budget_ms:.1f} ms"]
    if info:
        knobs = Knobs(TIERS[info["tier"]], info["insertion"], info["top_k"], info["blocks"])
        (outcome,) = resources.engine.outcomes([sample], [resources.space.plan(knobs)])
        lines += [
            f"choice: {knobs.tier} tier, p = {knobs.insertion}, {knobs.top_k} experts, {knobs.blocks} blocks",
            f"answer: {resources.engine.text(outcome)} (reference: {', '.join(sample.answers[:3])})",
            f"accuracy {info['accuracy']:.2f}, latency {info['latency_ms']:.1f} ms",
        ]
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for row, line in enumerate(lines):
        pen.text((4, SIZE + row * LINE), line[:64], fill="black", font=font)
    return np.asarray(canvas, np.uint8)
