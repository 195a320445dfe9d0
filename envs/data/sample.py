"""One question: the image it is about, the accepted answers and the metric.

Samples are small, frozen and picklable: the image is a reference, read or drawn only when its pixels are needed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from envs.errors import UserError
from envs.processing.images import FileImage, ImageRef, excerpt

__all__ = ["FileImage", "ImageRef", "Sample", "content_id"]


@dataclass(frozen=True)
class Sample:
    """A question with its accepted answers.

    Args:
        id: content hash, stable between runs and unique in a split.
        image: the image in question; None for a text-only request.
        question: the text as asked, options of a multiple-choice question included.
        answers: accepted answers, one per annotator if the metric counts annotators.
        metric: how an answer is scored, a name of `envs.data.scoring.METRICS`.
        style: prompt style of the published model, such as `vqa2`; None for a plain question.
        family: kind of question, for tables; None if the source has no kinds.
    """

    id: str
    image: ImageRef | None
    question: str
    answers: tuple[str, ...]
    metric: str = "vqa"
    style: str | None = None
    family: str | None = None


def content_id(image_digest: str | None, question: str, answers: Sequence[str]) -> str:
    """A stable 16-digit hex id for a sample's content.

    Raises:
        UserError: half a character (a lone surrogate) in the question or an answer.
    """
    content = json.dumps([image_digest, question, list(answers)], ensure_ascii=False)
    try:
        return hashlib.sha256(content.encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        raise UserError(f"{excerpt(question)} contains half a character (a lone surrogate): give UTF-8 text") from None
