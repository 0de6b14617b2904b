"""Which bodies are put on record (PROTOCOL 5.9)."""

from __future__ import annotations

from typing import Final

from hiverd.http.framing import Headers

_TEXT_SUBTYPES: Final = frozenset(
    (
        "json",
        "xml",
        "javascript",
        "x-javascript",
        "ecmascript",
        "x-www-form-urlencoded",
        "x-ndjson",
        "ndjson",
        "jsonl",
        "json-seq",
        "event-stream",
    )
)


def is_text(headers: Headers) -> bool:
    """Whether a body with these headers is recorded: uncompressed, and of a text type or of none (PROTOCOL 5.9)."""
    kind: bytes | None = None
    for name, value in headers:
        if name == b"content-type":
            kind = value
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            return False
    return kind is None or _is_text_type(kind.decode("latin-1"))


def _is_text_type(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind in ("", "text") or subtype in _TEXT_SUBTYPES or subtype.endswith(("+json", "+xml"))
