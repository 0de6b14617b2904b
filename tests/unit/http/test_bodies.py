"""Which bodies are put on record."""

from __future__ import annotations

import pytest

from hiverd.http.bodies import is_text
from hiverd.http.framing import Headers

JSON: Headers = [(b"content-type", b"application/json; charset=utf-8")]


@pytest.mark.parametrize(
    ("content_type", "text"),
    [
        ("text/plain", True),
        ("TEXT/HTML; charset=x", True),
        ("application/json", True),
        ("application/problem+json", True),
        ("image/svg+xml", True),
        ("application/javascript", True),
        ("application/x-www-form-urlencoded", True),
        ("text/event-stream", True),
        ("", True),
        ("application/octet-stream", False),
        ("image/png", False),
        ("multipart/form-data; boundary=json", False),
        ("video/xml5", False),
    ],
)
def test_text_types(content_type: str, text: bool) -> None:
    assert is_text([(b"content-type", content_type.encode())]) is text


def test_no_type_is_text_and_compressed_is_not() -> None:
    assert is_text([])
    assert is_text([(b"content-encoding", b"identity")])
    assert not is_text([*JSON, (b"content-encoding", b"gzip")])
