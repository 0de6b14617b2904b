"""Accesses that are encoded in batches read as any other event."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hiverd.state.accesses import AccessEncoder
from hiverd.state.journal import encode_event
from hiverd.wire.events import FileOperation, FsRequestEvent, FsResponseEvent

WALL_SECONDS = 1_764_000_000.123456
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.integers(1, 1 << 60), st.sampled_from(["read", "write", "delete"]), TEXTS, TEXTS)
def test_the_same_as_one_by_one(event_id: int, operation: FileOperation, mount: str, path: str) -> None:
    encoder = AccessEncoder(WALL_SECONDS, "local")
    request = FsRequestEvent(access="allowed", mount=mount, path=path, operation=operation)
    assert encoder.request(event_id, operation, mount, path) == encode_event(request, event_id, WALL_SECONDS)
    response = FsResponseEvent(backend="local", request_id=event_id, duration_ms=0)
    assert encoder.response(event_id + 1, event_id) == encode_event(response, event_id + 1, WALL_SECONDS)
