"""Accesses that are encoded in batches read as any other event."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from hiverd.state.accesses import AccessEncoder
from hiverd.state.journal import encode_event
from hiverd.wire.events import FileOperation, FsRequestEvent, FsResponseEvent

WALL_SECONDS = 1_764_000_000.123456
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def members(line: bytes) -> list[tuple[str, object]]:
    """Names and values of a line of ASCII JSON in their order. How a character is written, DEL for one, may differ."""
    assert line.isascii()
    return list(json.loads(line).items())


@given(st.integers(1, 1 << 60), st.sampled_from(["read", "write", "delete"]), TEXTS, TEXTS)
def test_the_same_as_one_by_one(event_id: int, operation: FileOperation, mount: str, path: str) -> None:
    encoder = AccessEncoder(WALL_SECONDS, "local")
    request = FsRequestEvent(access="allowed", mount=mount, path=path, operation=operation)
    line = encoder.request(event_id, operation, mount, path)
    assert members(line) == members(encode_event(request, event_id, WALL_SECONDS))
    response = FsResponseEvent(backend="local", request_id=event_id, duration_ms=0)
    line = encoder.response(event_id + 1, event_id)
    assert members(line) == members(encode_event(response, event_id + 1, WALL_SECONDS))
