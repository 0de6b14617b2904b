"""Frames of server-sent events (PROTOCOL 2). All ASCII: a published client decodes every network chunk on its own,
so a character split between two chunks would end its stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec

CONTENT_TYPE: Final = "text/event-stream"
HEADERS: Final[Mapping[str, str]] = {
    "Content-Type": CONTENT_TYPE,
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

_encoder: Final = msgspec.json.Encoder()
_LINE_BREAKS: Final = bytes.maketrans(b"\r\n", b"  ")


def to_ascii(document: bytes) -> bytes:
    """The same JSON document in ASCII, on one line."""
    if not document.isascii():
        return json.dumps(json.loads(document), separators=(",", ":")).encode("ascii")
    # Line breaks cannot stand inside JSON strings, so they are white space here.
    return document.translate(_LINE_BREAKS) if b"\n" in document or b"\r" in document else document


def frame(
    data: Mapping[str, Any] | msgspec.Struct | bytes,
    *,
    id: int | None = None,  # noqa: A002 -- the field's name in the standard
    event: str | None = None,
) -> bytes:
    """One frame. `data` is an object, or the bytes of a JSON document in UTF-8. `event` must be a constant of ours."""
    document = to_ascii(data if isinstance(data, bytes) else _encoder.encode(data))
    head = b"" if id is None else b"id: %d\n" % id
    if event is not None:
        head += b"event: %s\n" % event.encode("ascii")
    return b"%sdata: %s\n\n" % (head, document)


def comment(text: str = "") -> bytes:
    """A line that clients ignore: keeps a silent stream alive. `text` must be a constant of ours."""
    return b": %s\n\n" % text.encode("ascii") if text else b":\n\n"
