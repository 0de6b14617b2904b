"""What a session leaves on record (PROTOCOL 5.9 and 7), and what that may cost."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from typing import Any

import msgspec
import pytest

from hiverd.egress import exchange, outlet
from hiverd.egress.recorder import MAX_BODY_BYTES, MAX_CHUNK_BYTES
from hiverd.wire.events import EgressChunkEvent, EgressRequestEvent, EgressResponseEvent
from support.egress import eventually, read_head, request, scripted
from support.upstreams import HttpUpstream, SocketUpstream, lead


def answer(body: bytes, *fields: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


async def test_a_request_is_told_as_the_agent_wrote_it(make_rig: Any, plain: HttpUpstream) -> None:
    override = {
        "prefix_path": "/v1",
        "query": {"key": "query-secret"},
        "headers": {"Authorization": "Bearer header-secret"},
    }
    rig = await make_rig(lead("api.test", plain, override=override))
    got = await (await rig.agent()).get(
        "http://API.test/a%20b?x=1", "X-Two: 1", "X-Two: 2", method="POST", body=b"body"
    )
    assert plain.seen[0].path == "/v1/a%20b?key=query-secret&x=1"
    assert plain.seen[0].header("host") == "API.test"
    event = rig.requests[0]
    assert (event.host, event.method, event.path, event.query) == ("api.test", "POST", "/a%20b", "x=1")
    assert (event.body, event.upstream) == ("body", plain.address)
    assert event.headers["X-Two"] == "1, 2"
    assert event.headers["Authorization"] == "[redacted]"
    # The upstream sends it all back: the agent may see what the upstream says, the record does not.
    assert b"header-secret" in got.body
    recorded = b"".join(msgspec.json.encode(event) for event in rig.events.recorded)
    assert b"secret" not in recorded
    assert recorded.count(b"[redacted]") == 3


async def test_what_is_injected_is_not_told_in_headers_and_bodies_of_either_side(make_rig: Any) -> None:
    back = answer(b'{"token": "body-secret"}', "Location: /?key=query-secret", "X-Echo: Bearer header-secret")
    override = {
        "query": {"key": "query-secret"},
        "headers": {"authorization": "Bearer header-secret"},
        "body": {"token": "body-secret"},
    }
    with SocketUpstream(scripted(back, keep=False)) as upstream:
        rig = await make_rig(lead("api.test", upstream, override=override))
        await (await rig.agent()).get(method="POST", body=b'{"mine": "header-secret"}')
    assert b"secret" not in b"".join(msgspec.json.encode(event) for event in rig.events.recorded)
    assert json.loads(rig.requests[0].body) == {"mine": "[redacted]"}


@pytest.mark.parametrize("cut", range(1, 13))
async def test_a_secret_is_found_across_pieces(make_rig: Any, cut: int) -> None:
    def serve(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b"<top-secret>"[:cut], b"<top-secret>"[cut:]):
            if piece:
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                agent_has_it.acquire(5)
        connection.sendall(b"0\r\n\r\n")

    agent_has_it = Permits()
    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("api.test", upstream, override={"headers": {"x-key": "top-secret"}}))
        agent = await rig.agent()
        await agent.send(request("http://api.test/"))
        await agent.head()
        for piece in (b"<top-secret>"[:cut], b"<top-secret>"[cut:]):
            if piece:
                await agent.expect(b"%x\r\n%b\r\n" % (len(piece), piece))
                agent_has_it.release()
        await agent.expect(b"0\r\n\r\n")
        await rig.recorded(3)
        await eventually(lambda: "".join(chunk.body for chunk in rig.chunks) == "<[redacted]>", what="all is on record")


class Permits:
    """A semaphore whose waits have a limit that fails."""

    def __init__(self) -> None:
        import threading

        self._semaphore = threading.Semaphore(0)

    def release(self) -> None:
        self._semaphore.release()

    def acquire(self, seconds: float) -> None:
        assert self._semaphore.acquire(timeout=seconds)


@pytest.mark.parametrize(
    ("coding", "encode"), [("gzip", gzip.compress), ("deflate", __import__("zlib").compress), ("identity", bytes)]
)
async def test_compressed_text_is_recorded_as_text_and_passes_as_it_is(make_rig: Any, coding: str, encode: Any) -> None:
    text = "Grüße, " * 50_000
    packed = encode(text.encode())
    with SocketUpstream(scripted(answer(packed, f"Content-Encoding: {coding}"))) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        got = await (await rig.agent()).get(
            "http://api.test/", f"Content-Encoding: {coding}", method="POST", body=encode(b"the agent's")
        )
    assert (got.body, got.headers["content-encoding"]) == (packed, coding)
    assert rig.requests[0].body == "the agent's"
    assert "".join(chunk.body for chunk in rig.chunks) == text
    assert max(len(chunk.body.encode()) for chunk in rig.chunks) <= MAX_CHUNK_BYTES + 4


@pytest.mark.parametrize("field", ["Content-Type: image/png", "Content-Encoding: br", "Content-Type: application/zip"])
async def test_what_is_no_text_is_not_recorded(make_rig: Any, field: str) -> None:
    with SocketUpstream(scripted(answer(b"\0\1\2", field))) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        assert (await (await rig.agent()).get("http://api.test/", field, method="POST", body=b"\0")).body == b"\0\1\2"
    assert rig.summary() == ["allowed POST api.test/", "1: 200"]
    assert rig.requests[0].body is None


@pytest.mark.parametrize("size", [MAX_BODY_BYTES - 1, MAX_BODY_BYTES, MAX_BODY_BYTES + 1, 3 * MAX_BODY_BYTES])
async def test_a_body_is_recorded_up_to_a_limit(make_rig: Any, plain: HttpUpstream, size: int) -> None:
    rig = await make_rig(lead("api.test", plain))
    await (await rig.agent()).get(method="POST", body=b"x" * size)
    assert len(plain.seen[0].body) == size
    assert rig.requests[0].body == "x" * min(size, MAX_BODY_BYTES)
    assert rig.outlet.recording.left_bytes == outlet.RECORDED_BODIES_BYTES


async def test_bodies_on_the_way_to_the_record_share_a_limit(
    make_rig: Any, plain: HttpUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "RECORDED_BODIES_BYTES", 10)
    rig = await make_rig(lead("api.test", plain))
    for _ in range(2):
        await (await rig.agent()).get(method="POST", body=b"0123456789abc")
        assert rig.outlet.recording.left_bytes == 10
    assert [event.body for event in rig.requests] == ["0123456789"] * 2
    assert plain.seen[1].body == b"0123456789abc"


async def test_a_slow_body_does_not_keep_its_request_off_the_record(
    make_rig: Any, plain: HttpUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "RECORD_SECONDS", 0.1)
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    await agent.send(request("http://api.test/", "Content-Length: 8", method="POST") + b"half")
    await rig.recorded(1)
    assert rig.requests[0].body == "half"
    await agent.send(b"more")
    assert (await agent.answer()).status == 200
    assert rig.summary()[:2] == ["allowed POST api.test/", "1: 200"]


@pytest.mark.parametrize("unwanted", [EgressRequestEvent, EgressResponseEvent, EgressChunkEvent])
async def test_what_is_not_wanted_is_not_captured_but_counted(
    make_rig: Any, plain: HttpUpstream, unwanted: type[Any]
) -> None:
    rig = await make_rig(lead("api.test", plain))
    rig.events.unwanted = {unwanted}
    await (await rig.agent()).get(method="POST", body=b"body")
    asked, responded, *chunks = rig.events.recorded
    assert (asked.headers is None, asked.body is None) == (unwanted is EgressRequestEvent,) * 2
    assert (responded.headers is None) == (unwanted is EgressResponseEvent)
    assert responded.request_id == 1
    assert all((chunk.body == "") == (unwanted is EgressChunkEvent) for chunk in chunks)
    assert len(chunks) >= 1


async def test_text_waits_for_the_journal_to_have_room(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    room = asyncio.Event()
    room.set()
    rig.events.room = room.wait
    agent = await rig.agent()
    await agent.send(request("http://api.test/text/50000000"))
    answering = asyncio.create_task(agent.answer())
    await rig.recorded(10)
    room.clear()
    await asyncio.sleep(0.1)
    before = len(rig.events.recorded)
    await asyncio.sleep(0.5)
    assert len(rig.events.recorded) == before
    room.set()
    assert (await answering).body == b"x" * 50_000_000
    await eventually(lambda: sum(len(chunk.body) for chunk in rig.chunks) == 50_000_000, what="all is on record")


async def test_a_denied_agent_waits_for_the_journal_too(make_rig: Any) -> None:
    rig = await make_rig()
    room = asyncio.Event()
    rig.events.room = room.wait
    agent = await rig.agent()
    await agent.send(request("http://api.test/"))
    await asyncio.sleep(0.3)
    assert rig.events.recorded == []
    room.set()
    assert (await agent.answer()).status == 403


# -- bodies that a rule changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("override", "coding", "sent", "arrived"),
    [
        ({"body": {"b": 2}}, None, b'{"a": 1}', {"a": 1, "b": 2}),
        ({"body": {"b": 2}}, "gzip", gzip.compress(b'{"a": 1}'), {"a": 1, "b": 2}),
        ({"body": {"b": 2}, "body_strategy": "replace"}, None, b'{"a": 1}', {"b": 2}),
        ({"body": "[1]"}, None, b'{"a": 1}', [1]),
    ],
    ids=["merge", "merge-gzip", "replace", "text"],
)
async def test_bodies_that_are_changed(
    make_rig: Any, plain: HttpUpstream, override: Any, coding: str | None, sent: bytes, arrived: Any, chunked: bool
) -> None:
    rig = await make_rig(lead("api.test", plain, override=override))
    agent = await rig.agent()
    fields = [] if coding is None else [f"Content-Encoding: {coding}"]
    if chunked:
        await agent.send(request("http://api.test/", "Transfer-Encoding: chunked", *fields, method="POST"))
        await agent.send(b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(sent), sent))
    else:
        await agent.send(request("http://api.test/", *fields, method="POST", body=sent))
    assert (await agent.answer()).status == 200
    seen = plain.seen[0]
    assert json.loads(seen.body) == arrived
    assert seen.header("content-length") == str(len(seen.body))
    assert (seen.header("content-encoding"), seen.header("transfer-encoding")) == (None, None)
    assert json.loads(rig.requests[0].body) == {"a": 1}
    assert rig.outlet.held_bodies.left_bytes == outlet.HELD_BODIES_BYTES
    assert (await agent.get(method="POST")).status == 200


async def test_a_body_is_made_where_there_is_none(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain, override={"body": {"b": 2}}))
    agent = await rig.agent()
    await agent.get(method="POST")
    await agent.send(request("http://api.test/", "Expect: 100-continue", "Content-Length: 2", method="PUT"))
    await agent.expect(b"HTTP/1.1 100 Continue\r\n\r\n")
    await agent.send(b"{}")
    assert (await agent.answer()).status == 200
    assert [seen.body for seen in plain.seen] == [b'{"b":2}'] * 2
    assert plain.seen[1].header("expect") is None


async def test_a_body_that_is_too_large_to_be_changed(
    make_rig: Any, plain: HttpUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hiverd.egress.overrides.MAX_MERGED_BODY_BYTES", 1000)
    monkeypatch.setattr(outlet, "HELD_BODIES_BYTES", 1500)
    rig = await make_rig(lead("api.test", plain, override={"body": {"b": 2}}))
    assert (await (await rig.agent()).get(method="POST", body=b"x" * 1001)).status == 413
    first = await rig.agent()
    await first.send(request("http://api.test/", "Content-Length: 1000", method="POST") + b"x" * 999)
    await eventually(lambda: rig.outlet.held_bodies.left_bytes == 501, what="the body is held")
    assert (await (await rig.agent()).get(method="POST", body=b"x" * 502)).status == 503
    await first.send(b"x")
    assert (await first.answer()).status == 200
    assert rig.outlet.held_bodies.left_bytes == 1500
    assert [event.status for event in rig.responses] == [413, 503, 200]
