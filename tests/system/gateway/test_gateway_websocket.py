"""WebSockets through the gateway: both real ends speak the `websockets` library (PROTOCOL 3.13, RFC 6455)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from hiverd.netns import ThreadSocketFactory
from hiverd.wire.events import Event, IngressChunkEvent, IngressRequestEvent, IngressResponseEvent
from support.gateway import Front, RecordedEvents, Target, answering, eventually, upstream

pytestmark = pytest.mark.system


def url(front: Front, port: int, rest: str = "/") -> str:
    return f"ws://127.0.0.1:{front.port}/proxy/{port}{rest}"


@contextlib.asynccontextmanager
async def websocket_server(
    namespace: str, handler: Callable[[ServerConnection], Awaitable[None]], **options: Any
) -> AsyncIterator[int]:
    listener = await ThreadSocketFactory().listen_tcp(namespace, "127.0.0.1", 0)
    async with serve(handler, sock=listener, max_size=None, **options):
        yield listener.getsockname()[1]


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


def chunks(front: Front) -> list[tuple[str | None, str]]:
    return [(event.label, event.body) for event in front.target.events.of(IngressChunkEvent)]


async def test_messages_both_ways(front: Front, namespace: str) -> None:
    async with websocket_server(namespace, echo) as port:
        async with connect(url(front, port, "/a%20b?x=1"), max_size=None) as client:
            for message in ("hé", b"\x00\xff", "", b"", "x" * 300_000, b"y" * 3_000_000):
                await client.send(message)
                assert await asyncio.wait_for(client.recv(), 20) == message
        assert client.close_code == 1000
    request, response, *_ = front.target.events.recorded
    assert isinstance(request, IngressRequestEvent)
    assert (request.method, request.path, request.query) == ("GET", "/a%20b", "x=1")
    assert isinstance(response, IngressResponseEvent)
    assert (response.request_id, response.status) == (1, 101)
    assert chunks(front)[:4] == [("up", "hé"), ("down", "hé"), ("up", "[binary 2 bytes]"), ("down", "[binary 2 bytes]")]
    assert ("down", "[text 300000 bytes]") in chunks(front)
    assert ("up", "[close 1000]") in chunks(front)


async def test_handshake_fields(front: Front, namespace: str) -> None:
    seen: list[Any] = []

    async def handler(connection: ServerConnection) -> None:
        assert connection.request is not None
        seen.append((connection.request.path, list(connection.request.headers.raw_items())))
        seen.append(connection.subprotocol)
        await connection.wait_closed()

    async with websocket_server(namespace, handler, subprotocols=["v2", "v1"]) as port:
        async with connect(
            url(front, port, "/p?q"), subprotocols=[websockets.Subprotocol("v1")], origin=websockets.Origin("http://o")
        ) as client:
            assert client.subprotocol == "v1"
            assert client.response is not None
            assert "Sec-WebSocket-Extensions" not in client.response.headers
        path, fields = seen[0]
        names = [name.lower() for name, _ in fields]
        assert path == "/p?q"
        assert fields[0] == ("Host", f"127.0.0.1:{port}")
        assert ("Origin", "http://o") in fields
        assert ("X-Forwarded-For", "127.0.0.1") in fields
        assert ("X-Forwarded-Proto", "http") in fields
        assert "sec-websocket-extensions" not in names
        assert names.count("sec-websocket-key") == names.count("connection") == names.count("upgrade") == 1
        assert seen[1] == "v1"


async def test_the_server_closes(front: Front, namespace: str) -> None:
    async def handler(connection: ServerConnection) -> None:
        await connection.close(4001, "büy")

    async with websocket_server(namespace, handler) as port, connect(url(front, port)) as client:
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), 10)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "büy")
    assert ("down", "[close 4001 büy]") in chunks(front)


async def test_the_client_closes(front: Front, namespace: str) -> None:
    ended: asyncio.Future[tuple[int | None, str | None]] = asyncio.get_running_loop().create_future()

    async def handler(connection: ServerConnection) -> None:
        await connection.wait_closed()
        ended.set_result((connection.close_code, connection.close_reason))

    async with websocket_server(namespace, handler) as port:
        async with connect(url(front, port)) as client:
            await client.close(4002, "gone")
        assert await asyncio.wait_for(ended, 10) == (4002, "gone")
    assert ("up", "[close 4002 gone]") in chunks(front)


async def test_pings_of_the_server_are_answered_and_recorded(front: Front, namespace: str) -> None:
    async def handler(connection: ServerConnection) -> None:
        await (await connection.ping(b"p"))
        await connection.send("done")
        await connection.wait_closed()

    async with websocket_server(namespace, handler) as port, connect(url(front, port)) as client:
        assert await asyncio.wait_for(client.recv(), 10) == "done"
    assert chunks(front)[:3] == [("down", "[ping]"), ("up", "[pong]"), ("down", "done")]


async def test_a_refused_handshake_is_relayed(front: Front, namespace: str) -> None:
    for framing, body in (
        (b"Content-Length: 4", b"no!\n"),
        (b"Transfer-Encoding: chunked", b"4\r\nno!\n\r\n0\r\n\r\n"),
    ):
        answer = b"HTTP/1.1 401 Nope\r\nX-Why: because\r\n" + framing + b"\r\n\r\n" + body
        async with upstream(namespace, answering(answer)) as up:
            with pytest.raises(websockets.InvalidStatus) as refused:
                await connect(url(front, up.port))
        response = refused.value.response
        assert response.status_code == 401
        assert response.headers["X-Why"] == "because"
        assert response.body == b"no!\n"
    assert [event.status for event in front.target.events.of(IngressResponseEvent)] == [401, 401]


async def test_nothing_listens(front: Front) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        await connect(url(front, 9))
    assert refused.value.response.status_code == 502
    assert b"nothing listens" in refused.value.response.body
    assert [event.status for event in front.target.events.of(IngressResponseEvent)] == [502]


@pytest.mark.parametrize(("port", "status"), [(1024, 403), (0, 400)])
async def test_ports_that_are_not_open(front: Front, port: int, status: int) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        await connect(url(front, port))
    assert refused.value.response.status_code == status


async def test_the_wait_ends_when_the_client_leaves(namespace: str) -> None:
    with Front(Target(namespace), refused_patience_seconds=600) as front:
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(
            b"GET /proxy/9/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==\r\n\r\n"
        )
        await eventually(lambda: bool(front.target.events.of(IngressRequestEvent)), "the request event")
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: bool(front.target.events.of(IngressResponseEvent)), "the end of the wait")


def accept_of(head: bytes) -> bytes:
    key = next(line.split(b": ")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
    return base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())  # noqa: S324


def speaking(
    after_handshake: bytes, *, extra: bytes = b"", accept: bytes | None = None, then_close: bool = True
) -> Any:
    """A hand-made WebSocket server: handshake, then some bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + (accept_of(head) if accept is None else accept) + b"\r\n" + extra + b"\r\n"
        )
        writer.write(after_handshake)
        await writer.drain()
        if not then_close:
            await reader.read()

    return handle


@pytest.mark.parametrize(
    ("extra", "accept"),
    [
        (b"", b"d3Jvbmc="),
        (b"Sec-WebSocket-Extensions: permessage-deflate\r\n", None),
        (b"Sec-WebSocket-Protocol: unasked\r\n", None),
    ],
)
async def test_false_handshakes(front: Front, namespace: str, extra: bytes, accept: bytes | None) -> None:
    async with upstream(namespace, speaking(b"", extra=extra, accept=accept)) as up:
        with pytest.raises(websockets.InvalidStatus) as refused:
            await connect(url(front, up.port))
        assert refused.value.response.status_code == 502


@pytest.mark.parametrize(
    "frames",
    [
        b"\x81\x81\x00\x00\x00\x00a",  # masked by a server
        b"\xc1\x01a",  # a reserved bit
        b"\x83\x00",  # an unknown opcode
        b"\x89\x7e\x00\x80" + b"x" * 128,  # a control frame that is too long
        b"\x80\x01a",  # a continuation of nothing
        b"\x88\x01a",  # a close code cut short
        b"\x88\x02\x03\xed",  # close code 1005 on the wire
        b"\x81\x02\xff\xfe",  # text that is not UTF-8
        b"\x81\x7f\x80\x00\x00\x00\x00\x00\x00\x00",  # a length with the top bit
    ],
)
async def test_hostile_frames_end_the_conversation(front: Front, namespace: str, frames: bytes) -> None:
    async with upstream(namespace, speaking(frames, then_close=False)) as up, connect(url(front, up.port)) as client:
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), 10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1011
        await eventually(lambda: up.open == 0, "the upstream is closed")


async def test_a_close_without_a_code_and_a_lost_connection(front: Front, namespace: str) -> None:
    async with (
        upstream(namespace, speaking(b"\x88\x00", then_close=False)) as up,
        connect(url(front, up.port)) as client,
    ):
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), 10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1005
    async with upstream(namespace, speaking(b"\x81\x01a")) as up, connect(url(front, up.port)) as client:
        assert await asyncio.wait_for(client.recv(), 10) == "a"
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), 10)
        assert closed.value.rcvd is None


async def test_a_message_without_end_is_bounded(front: Front, namespace: str) -> None:
    endless = b"\x01\x7f" + struct.pack("!Q", 1 << 40) + b"x" * (17 * 1024 * 1024)
    async with (
        upstream(namespace, speaking(endless, then_close=False)) as up,
        connect(url(front, up.port), max_size=None) as client,
    ):
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), 60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


class CountedEvents(RecordedEvents):
    """Keeps nothing."""

    count = 0

    def emit(self, event: Event) -> int:
        self.count += 1
        return self.count


async def test_a_flood_of_tiny_frames_leaves_room_for_others(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await speaking(b"")(reader, writer)
        while True:
            writer.write(b"\x8a\x00" * 100_000)
            await writer.drain()

    events = front.target.events = CountedEvents()
    async with upstream(namespace, handle) as up, connect(url(front, up.port)):
        await eventually(lambda: events.count > 1000, "the flood has begun")
        delays = []
        for _ in range(21):
            begin = time.monotonic()
            await asyncio.to_thread(front.call, int)
            delays.append(time.monotonic() - begin)
        # Without a pause between frames the loop is held for as long as the flood lasts; a busy machine needs room.
        assert sorted(delays)[10] < 5


async def test_a_slow_client_slows_the_server(front: Front, namespace: str) -> None:
    sent = 0

    async def handler(connection: ServerConnection) -> None:
        nonlocal sent
        for _ in range(400):
            await connection.send(b"z" * 100_000)
            sent += 1

    async with (
        websocket_server(namespace, handler) as port,
        connect(url(front, port), max_queue=1) as client,
    ):
        settled = -1
        while settled != sent:
            settled = sent
            await asyncio.sleep(0.5)
        assert 0 < settled < 250
        received = 0
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                received += len(await asyncio.wait_for(client.recv(), 20))
        assert received == 400 * 100_000
