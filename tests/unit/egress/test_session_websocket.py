"""WebSockets through a session: passed as they are, on record, and cut with the rules (PROTOCOL 5.2 and 7)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import websockets
from websockets.sync.server import ServerConnection, serve

from support.egress import Agent, Rig, eventually, request, scripted
from support.upstreams import SocketUpstream


class WebSocketUpstream:
    """Echoes; `seen` holds the headers of each handshake."""

    def __init__(self, handler: Callable[[ServerConnection], None]) -> None:
        self.seen: list[Any] = []

        def handle(connection: ServerConnection) -> None:
            assert connection.request is not None
            self.seen.append(connection.request.headers)
            with contextlib.suppress(websockets.ConnectionClosed):
                handler(connection)

        self._server = serve(handle, "127.0.0.1", 0, compression="deflate", close_timeout=0.5)
        self.address = f"127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


@pytest.fixture
def upstream() -> Iterator[WebSocketUpstream]:
    made = WebSocketUpstream(echo)
    yield made
    made.close()


def rule(address: str, **more: Any) -> dict[str, Any]:
    return {"access": "allow", "host": "ws.test", "override": {"host": address, **more.pop("override", {})}, **more}


async def connected(rig: Rig, *, secure: bool = False) -> websockets.ClientConnection:
    """A client that offers compression, through a session."""
    agent = await rig.agent(443 if secure else 80)
    agent.writer.transport.pause_reading()
    sock = agent.sock.dup()
    agent.writer.transport.abort()
    sock.setblocking(False)
    return await websockets.connect(
        f"{'wss' if secure else 'ws'}://ws.test/chat",
        sock=sock,
        ssl=rig.agent_context() if secure else None,
        proxy=None,
    )


async def test_messages_pass_and_are_on_record(make_rig: Any, upstream: WebSocketUpstream) -> None:
    rig = await make_rig(rule(upstream.address, override={"headers": {"x-key": "top-secret"}}))
    async with await connected(rig) as client:
        await client.send("hello top-secret")
        assert await client.recv() == "hello top-secret"
        await client.send(["frag", "ments"])
        assert await client.recv() == "fragments"
        await client.send(b"\0" * 70_000)
        assert await client.recv() == b"\0" * 70_000
        await client.send("x" * 65_537)
        assert await client.recv() == "x" * 65_537
        await (await client.ping())
        assert "Sec-WebSocket-Extensions" not in client.response.headers
    assert upstream.seen[0]["x-key"] == "top-secret"
    assert "Sec-WebSocket-Extensions" not in upstream.seen[0]
    await rig.idle()
    assert rig.summary()[:2] == ["allowed GET ws.test/chat", "1: 101"]
    up = [chunk.body for chunk in rig.chunks if chunk.label == "up"]
    down = [chunk.body for chunk in rig.chunks if chunk.label == "down"]
    messages = ["hello [redacted]", "fragments", "[binary 70000 bytes]", "[text 65537 bytes]"]
    assert up == [*messages, "[ping]", "[close 1000]"]
    assert [text for text in down if text != "[ping]"] == [*messages, "[pong]", "[close 1000]"]


async def test_a_denied_upgrade(make_rig: Any, upstream: WebSocketUpstream) -> None:
    rig = await make_rig(rule(upstream.address, paths=["/other"]))
    with pytest.raises(websockets.InvalidStatus) as caught:
        await connected(rig)
    assert caught.value.response.status_code == 403
    assert rig.summary() == ["denied GET ws.test/chat", "1: 403"]


async def test_a_change_of_the_rules_cuts_it(make_rig: Any, upstream: WebSocketUpstream) -> None:
    rig = await make_rig(rule(upstream.address))
    client = await connected(rig)
    await client.send("a")
    await client.recv()
    rig.change([rule(upstream.address, methods=["GET"])])
    await client.send("still")
    assert await client.recv() == "still"
    rig.change([rule(upstream.address, paths=["/other"])])
    async with asyncio.timeout(2):
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()


async def test_an_upstream_that_does_not_switch_has_its_answer_relayed(make_rig: Any) -> None:
    with SocketUpstream(scripted(b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno!")) as plain:
        rig = await make_rig(rule(plain.address))
        agent: Agent = await rig.agent()
        fields = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
        answer = await agent.get("http://ws.test/", *fields)
        assert (answer.status, answer.body) == (404, b"no!")
        assert (await agent.get("http://ws.test/", *fields)).status == 404
    assert rig.summary()[:3] == ["allowed GET ws.test/", "1: 404", "1: 'no!'"]


async def test_a_switch_with_a_body_is_a_request_like_others(make_rig: Any) -> None:
    """Otherwise the upstream would take the first messages for the body."""
    with SocketUpstream(scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", keep=False)) as plain:
        rig = await make_rig(rule(plain.address))
        agent = await rig.agent()
        await agent.send(request("http://ws.test/", "Connection: Upgrade", "Upgrade: websocket", body=b"body"))
        assert (await agent.answer()).status == 200
    assert rig.requests[0].body == "body"


async def test_either_side_that_leaves_ends_the_other(make_rig: Any) -> None:
    ended = threading.Event()

    def hold(connection: ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            connection.recv()
            if connection.recv() == "close":
                connection.socket.close()
                return
        ended.set()

    made = WebSocketUpstream(hold)
    try:
        rig = await make_rig(rule(made.address))
        client = await connected(rig)
        await client.send("a")
        client.transport.abort()
        await eventually(ended.is_set, what="the upstream is let go")
        client = await connected(rig)
        await client.send("a")
        await client.send("close")
        async with asyncio.timeout(5):
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
    finally:
        made.close()


async def test_a_flood_waits_for_the_journal(make_rig: Any, upstream: WebSocketUpstream) -> None:
    rig = await make_rig(rule(upstream.address))
    client = await connected(rig)
    await client.send("first")
    await client.recv()
    room = asyncio.Event()
    rig.events.room = room.wait
    before = len(rig.events.recorded)
    await client.send("held")
    await asyncio.sleep(0.3)
    assert len(rig.events.recorded) == before
    room.set()
    assert await client.recv() == "held"
    client.transport.abort()


async def test_wss(make_rig: Any, upstream_authority: Any) -> None:
    def handler(connection: Any) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        key = next(
            line.split(b": ")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key")
        )
        accept = websockets.utils.accept_key(key.decode()).encode()
        connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n\x81\x05early" % accept
        )
        connection.recv(100)

    with SocketUpstream(handler, upstream_authority.context("ws.test")) as upstream:
        rig = await make_rig(rule(upstream.address))
        client = await connected(rig, secure=True)
        assert await client.recv() == "early"
        client.transport.abort()
        await rig.idle()
    assert rig.chunks[0].body == "early"
