"""The ingress events of one exchange: what they hold and in which order they come."""

from __future__ import annotations

from typing import Any

from hiverd.gateway import capture
from hiverd.gateway.capture import IngressRecorder
from hiverd.http.framing import Headers
from hiverd.wire.events import Event, IngressChunkEvent, IngressRequestEvent, IngressResponseEvent
from support.gateway import RecordedEvents

JSON: Headers = [(b"content-type", b"application/json; charset=utf-8")]
PNG: Headers = [(b"content-type", b"image/png")]


def recorder(events: RecordedEvents, **changes: Any) -> IngressRecorder:
    arguments: dict[str, Any] = {
        "port": "8000",
        "method": "POST",
        "path": b"/a%20b",
        "query": b"x=1",
        "headers": JSON,
    }
    return IngressRecorder(events, **(arguments | changes))


def test_order_and_content() -> None:
    events = RecordedEvents()
    record = recorder(events)
    record.request_body(b'{"a":')
    record.request_body(b"1}")
    assert events.recorded == []
    record.request()
    record.response(201, JSON)
    record.response_body(b"caf\xc3", last=False)
    record.response_body(b"\xa9", last=False)
    record.response_body(b"", last=True)
    record.close()
    request, response, *chunks = events.recorded
    assert request == IngressRequestEvent(
        port="8000",
        method="POST",
        path="/a%20b",
        query="x=1",
        headers={"Content-Type": "application/json; charset=utf-8"},
        body='{"a":1}',
    )
    assert isinstance(response, IngressResponseEvent)
    assert (response.request_id, response.status) == (1, 201)
    assert response.headers == {"Content-Type": "application/json; charset=utf-8"}
    assert chunks == [IngressChunkEvent(request_id=1, body="caf"), IngressChunkEvent(request_id=1, body="é")]


def test_a_response_without_request_records_both_in_order() -> None:
    events = RecordedEvents()
    recorder(events).response(200, [])
    assert [type(event) for event in events.recorded] == [IngressRequestEvent, IngressResponseEvent]


def test_exactly_one_response() -> None:
    events = RecordedEvents()
    record = recorder(events)
    record.close()
    record.close()
    record.response(200, [])
    assert [event.status for event in events.of(IngressResponseEvent)] == [502]


def test_the_request_is_recorded_once_the_limit_is_reached() -> None:
    events = RecordedEvents()
    record = recorder(events)
    record.request_body(b"x" * (capture.MAX_BODY_BYTES - 1))
    assert events.recorded == []
    record.request_body(b"yz")
    record.request_body(b"more")
    (request,) = events.of(IngressRequestEvent)
    assert len(request.body) == capture.MAX_BODY_BYTES
    assert request.body.endswith("xy")


def test_binary_bodies_are_left_out() -> None:
    events = RecordedEvents()
    record = recorder(events, headers=PNG)
    record.request_body(b"\x89PNG")
    record.response(200, PNG)
    record.response_body(b"\x89PNG", last=True)
    assert [type(event) for event in events.recorded] == [IngressRequestEvent, IngressResponseEvent]
    assert events.of(IngressRequestEvent)[0].body is None


def test_large_writes_are_split() -> None:
    events = RecordedEvents()
    record = recorder(events)
    record.response(200, [])
    record.response_body("é".encode() * capture.MAX_BODY_BYTES, last=True)
    chunks = events.of(IngressChunkEvent)
    assert "".join(chunk.body for chunk in chunks) == "é" * capture.MAX_BODY_BYTES
    assert all(len(chunk.body.encode()) <= capture.MAX_BODY_BYTES for chunk in chunks)


def test_unwanted_types_take_an_id_and_nothing_else() -> None:
    events = RecordedEvents()
    unwanted: set[type[Event]] = {IngressRequestEvent, IngressResponseEvent, IngressChunkEvent}
    events.unwanted = unwanted
    record = recorder(events)
    record.request_body(b"secret")
    record.response(200, JSON)
    record.response_body(b"secret", last=True)
    record.message("down", "secret")
    assert len(events.recorded) == 4
    assert "secret" not in repr(events.recorded)
    assert events.of(IngressRequestEvent)[0].headers is None


def test_websocket_messages() -> None:
    events = RecordedEvents()
    record = recorder(events)
    record.request()
    record.message("up", "hé")
    record.message("down", b"\x00\x01")
    record.message("down", "x" * (64 * 1024))
    record.message("down", "é" * (32 * 1024 + 1))
    record.control("down", "ping")
    record.control("up", "pong")
    record.closing("up", 4001, "bye")
    record.closing("down", 1000, "")
    chunks = events.of(IngressChunkEvent)
    assert [chunk.label for chunk in chunks] == ["up", "down", "down", "down", "down", "up", "up", "down"]
    assert [chunk.body for chunk in chunks] == [
        "hé",
        "[binary 2 bytes]",
        "x" * (64 * 1024),
        "[text 65538 bytes]",
        "[ping]",
        "[pong]",
        "[close 4001 bye]",
        "[close 1000]",
    ]
