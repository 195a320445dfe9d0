"""A request's body, from a client that may be slow, wrong or hostile, to a question, an image and a budget.

JSON: `{"question": TEXT, "budget_ms": NUMBER, "image": BASE64 or null}`. Multipart: the same fields, `image` a file.
"""

import asyncio
import base64
import json
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from starlette.requests import ClientDisconnect, Request

from envs.budgets import check_budget
from envs.data.sample import Sample
from envs.errors import UserError
from envs.processing.images import image_size
from ray_ctrl.pipeline import make_sample
from ray_ctrl.serve.settings import ReplicaSettings

FIELDS = ("question", "budget_ms", "image")


class Refused(Exception):
    """The answer to a request that is not served: status, one line, and seconds after which to try again."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, " ".join(message.split()), retry_after_s


@dataclass(frozen=True)
class Asked:
    """A request that can be answered, its image decoded."""

    sample: Sample
    budget_ms: float


async def read(request: Request, settings: ReplicaSettings) -> Asked:
    """Reads, checks and decodes a request.

    Raises:
        Refused: with a status of 400 to 499.
    """
    try:
        async with asyncio.timeout(settings.read_timeout_s):
            body = await _body(request, int(settings.max_body_mb * 1e6))
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {settings.read_timeout_s:g} s: send it faster") from None
    except ClientDisconnect:
        raise Refused(499, "the client has closed the connection") from None
    return await asyncio.to_thread(_asked, body, request.headers.get("content-type", ""), settings)


async def _body(request: Request, limit: int) -> bytes:
    """The body of at most `limit` bytes; a longer one is not read to its end."""
    too_large = Refused(413, f"the body is above {limit / 1e6:g} MB: send a smaller image")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _asked(body: bytes, content_type: str, settings: ReplicaSettings) -> Asked:
    try:
        fields = _multipart(body, content_type) if "multipart/form-data" in content_type else _json(body)
        unknown = sorted(set(fields) - set(FIELDS))
        if unknown or not {"question", "budget_ms"} <= set(fields):
            raise UserError(
                f"fields {', '.join(sorted(map(str, fields)))}: give question, budget_ms and, if any, image"
            )
        if isinstance(fields["budget_ms"], bool):
            raise UserError("budget_ms is a truth value: give a number of milliseconds")
        budget_ms = check_budget(fields["budget_ms"])
        if budget_ms > settings.max_budget_ms:
            raise UserError(f"a budget of {budget_ms:g} ms is above the limit of {settings.max_budget_ms:g} ms")
        image = fields.get("image") or None
        if image is not None:
            width, height = image_size(image)
            if width * height > settings.max_megapixels * 1e6:
                limit = f"{settings.max_megapixels:g} million"
                raise Refused(413, f"the image is {width} x {height}, above {limit} pixels: send a smaller one")
        return Asked(make_sample(image, fields["question"]), budget_ms)
    except UserError as error:
        raise Refused(400, error.message) from None


def _json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON: send JSON, or multipart/form-data with its content type") from None
    if not isinstance(fields, dict):
        raise UserError(f"the body is a JSON {type(fields).__name__}: send an object")
    if fields.get("image") is not None:
        try:
            fields["image"] = base64.b64decode(str(fields["image"]).rpartition(",")[2], validate=True)
        except ValueError:
            raise UserError("the image is not base64: encode the file's bytes") from None
        if not fields["image"]:
            raise UserError("the image is empty: send a file, or null for a question without an image")
    return fields


def _multipart(body: bytes, content_type: str) -> dict[str, Any]:
    header = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
    parsed = BytesParser(policy=HTTP).parsebytes(header + body)
    fields: dict[str, Any] = {}
    for part in parsed.iter_parts() if parsed.is_multipart() else ():
        name = part.get_param("name", header="content-disposition")
        content = _content(part)
        if name == "image":
            if not content and part.get_filename():
                raise UserError(f"the image {part.get_filename()!r} is empty: send a file with content")
            fields["image"] = content
        else:
            fields[str(name)] = content.decode("utf-8", "replace")
    if not fields:
        raise UserError("the multipart body has no fields: check its boundary")
    return fields


def _content(part: Message) -> bytes:
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else b""
