"""One question to be answered: the image it is about, the answers accepted and how an answer is
scored.

Samples are small, frozen and picklable: the image is a reference, read or drawn only when the model
    needs its pixels.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from envs.errors import UserError


class ImageRef(ABC):
    """A lazy, picklable image.

    Implementations are frozen dataclasses and provide `digest` as a field or property.
    """

    digest: str
    """Hex digest of the image's content: two references with equal digests show the same image."""

    @abstractmethod
    def load(self) -> Image.Image:
        """The image as RGB with its EXIF orientation applied.

        Raises:
            UserError: the image cannot be read; the message names where it came from.
        """

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels after EXIF orientation.

        Override where that is known without decoding.
        """
        return self.load().size


@dataclass(frozen=True)
class FileImage(ImageRef):
    """An image file, identified by the SHA-256 of its bytes.

    Make one with `FileImage.open(path)`.
    """

    path: str
    digest: str
    known_size: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: str | Path) -> "FileImage":
        """Reference to the file at `path`.

        Its bytes are hashed now, its pixels are decoded on `load`.
        """
        try:
            with Path(path).open("rb") as file:
                return cls(str(path), hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UserError(
                f"cannot read image {path}: {error.strerror or error}; give the path of an image file"
            ) from None

    def load(self) -> Image.Image:
        from envs.model.images import open_image

        return open_image(self.path)

    @property
    def size(self) -> tuple[int, int]:
        from envs.model.images import image_size

        return self.known_size or image_size(self.path)


@dataclass(frozen=True)
class Sample:
    """A question with the answers accepted.

    Args:
        id: content hash, stable between runs and unique in a split.
        image: the image asked about; None for a text-only request.
        question: the text as asked, options of a multiple-choice question included.
        answers: accepted answers, one per annotator where the metric counts annotators.
        metric: how an answer is scored, a name of `envs.data.scoring.METRICS`.
        style: prompt style of the published model, such as `vqa2`; None for a plain question.
        family: kind of question, for tables; None where the source has no kinds.
    """

    id: str
    image: ImageRef | None
    question: str
    answers: tuple[str, ...]
    metric: str = "vqa"
    style: str | None = None
    family: str | None = None


def content_id(image_digest: str | None, question: str, answers: Sequence[str]) -> str:
    """A stable 16-digit hex id for a sample's content."""
    content = json.dumps([image_digest, question, list(answers)], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
