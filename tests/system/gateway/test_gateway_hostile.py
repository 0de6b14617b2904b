"""What a hostile server in a sandbox can do to the gateway and to its clients: nothing but fail its own answer."""

from __future__ import annotations

import asyncio
import random
import time

import h11
import psutil
import pytest

from hiverd.wire.events import IngressRequestEvent, IngressResponseEvent
from support.gateway import Front, read_request, upstream

pytestmark = pytest.mark.system

SMUGGLED = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nstolen!"


async def ask(front: Front, port: int, method: str) -> tuple[int | None, bytes]:
    """(status, body) of one request as a strict client reads it; status None if the connection was broken off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    client = h11.Connection(h11.CLIENT)
    request = h11.Request(method=method, target=f"/proxy/{port}/", headers=[("Host", "x"), ("Connection", "close")])
    writer.write(client.send(request) or b"")
    writer.write(client.send(h11.EndOfMessage()) or b"")
    status: int | None = None
    body = b""
    try:
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                client.receive_data(await asyncio.wait_for(reader.read(65536), 20))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert client.trailing_data == (b"", False)
                assert await asyncio.wait_for(reader.read(), 20) == b"", "bytes behind the end of the response"
                return status, body
            else:
                return None, body
    except h11.RemoteProtocolError as error:
        # The only fault that a client may meet is an answer that is cut short.
        if "without sending" not in str(error):
            raise
        return None, body
    finally:
        writer.close()
        await writer.wait_closed()


HEADS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\nhello" + SMUGGLED,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n" + SMUGGLED,
    b"HTTP/1.1 200 OK\r\nX: 1\r\n\tfolded: 2\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: a\rContent-Length: 999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + SMUGGLED,
    b"HTTP/1.1 100 Continue\r\n\r\n" * 500,
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2p1\r\n",
    b"\x00" * 1000,
    b"",
]


@pytest.mark.parametrize("answer", HEADS, ids=[str(number) for number in range(len(HEADS))])
async def test_heads_that_are_refused(front: Front, namespace: str, answer: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        await writer.drain()

    async with upstream(namespace, handle) as up:
        status, body = await ask(front, up.port, "GET")
    if status == 200:  # the head was sound, and the fault came later
        raise AssertionError(body)
    assert status in (502, None)
    assert b"stolen" not in body
    (response,) = front.target.events.of(IngressResponseEvent)
    assert response.request_id == 1


async def test_bytes_behind_a_response_never_reach_a_client(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + SMUGGLED)
            await writer.drain()

    async with upstream(namespace, handle) as up:
        for _ in range(5):
            assert await ask(front, up.port, "GET") == (200, b"ok")
        assert up.connections == 5


async def test_an_unasked_answer_on_a_kept_connection_never_reaches_a_client(front: Front, namespace: str) -> None:
    """The classic desynchronisation: the extra answer comes after the exchange, waiting for the next client."""
    poisoned = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.write(SMUGGLED)
            await writer.drain()
            poisoned.set()

    async with upstream(namespace, handle) as up:
        for method in ("GET", "POST", "GET"):
            poisoned.clear()
            assert await ask(front, up.port, method) == (200, b"ok")
            await asyncio.wait_for(poisoned.wait(), 10)


@pytest.mark.parametrize("framing", [b"Content-Length: 10", b"Transfer-Encoding: chunked"])
async def test_a_body_cut_short_is_cut_short_for_the_client(front: Front, namespace: str, framing: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n5\r\nhel")
        await writer.drain()

    async with upstream(namespace, handle) as up:
        status, _ = await ask(front, up.port, "GET")
        assert status is None


PARTS = [
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.0 404 No\r\n",
    b"HTTP/1.1 204 No\r\n",
    b"HTTP/1.1 304 No\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Up\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length: 5, 5\r\n",
    b"content-length:\t5 \r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding:chunked\n",
    b"Connection: close\r\n",
    b"Connection: content-length, transfer-encoding\r\n",
    b"Connection: keep-alive, x\r\n",
    b"Upgrade: websocket\r\n",
    b"X: \xff\xfe\r\n",
    b"X \r\n",
    b" x: y\r\n",
    b"X: a\x0bb\r\n",
    b"\r\n",
    b"\r\n",
    b"\n",
    b"\r",
    b"hello",
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"0\r\nX: y\r\n\r\n",
    b"FFFFFFFFFFFFFFFF\r\n",
    SMUGGLED,
    b"\x00\x01",
]


@pytest.mark.parametrize("seed", range(6))
async def test_random_answers(front: Front, namespace: str, seed: int) -> None:
    """Whatever the server says, in whatever pieces: a well-formed answer or a broken connection, and in time."""
    random_parts = random.Random(seed)
    scripts: list[list[bytes]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in scripts[-1]:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    async with upstream(namespace, handle) as up:
        for _ in range(80):
            script = [random_parts.choice(PARTS) for _ in range(random_parts.randrange(12))]
            scripts.append([random_parts.choice(PARTS[:2]), *script] if random_parts.random() < 0.8 else script)
            await asyncio.wait_for(ask(front, up.port, random_parts.choice(["GET", "HEAD", "POST"])), 20)
    events = front.target.events
    assert len(events.of(IngressRequestEvent)) == len(events.of(IngressResponseEvent)) == 80


async def test_many_tiny_chunks_leave_room_for_others(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\n")
        while True:
            writer.write(b"1\r\nx\r\n" * 50_000)
            await writer.drain()

    async with upstream(namespace, handle) as up:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(f"GET /proxy/{up.port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())

        async def swallow() -> None:
            while await reader.read(1 << 20):
                pass

        swallowing = asyncio.create_task(swallow())
        delays = []
        for _ in range(30):
            begin = time.monotonic()
            await asyncio.to_thread(front.call, int)
            delays.append(time.monotonic() - begin)
        swallowing.cancel()
        writer.close()
        assert sorted(delays)[15] < 0.25


async def test_a_slow_reader_slows_the_server_and_memory_stays_flat(front: Front, namespace: str) -> None:
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 1000000000\r\n\r\n")
        piece = bytes(1_000_000)
        for _ in range(1000):
            writer.write(piece)
            await writer.drain()
            sent += 1

    async with upstream(namespace, handle) as up:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=65536)
        writer.write(f"GET /proxy/{up.port}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        before = psutil.Process().memory_info().rss
        settled = -1
        while settled != sent:
            settled = sent
            await asyncio.sleep(0.5)
        assert 0 < settled < 100, "the server was not slowed"
        await reader.readuntil(b"\r\n\r\n")
        received = 0
        highest = 0
        while piece := await reader.read(1 << 20):
            received += len(piece)
            highest = max(highest, psutil.Process().memory_info().rss)
        assert received == 1_000_000_000
        assert highest - before < 64 * 1024 * 1024
        writer.close()
        await writer.wait_closed()


async def test_a_slow_server_slows_the_upload_and_memory_stays_flat(front: Front, namespace: str) -> None:
    release = asyncio.Event()
    total = 300_000_000

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await release.wait()
        received = 0
        while received < total:
            received += len(await reader.read(1 << 20))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    async with upstream(namespace, handle) as up:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        head = (
            f"POST /proxy/{up.port}/ HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {total}\r\n\r\n"
        )
        writer.write(head.encode())
        before = psutil.Process().memory_info().rss
        sent = 0

        async def upload() -> None:
            nonlocal sent
            while sent < total:
                writer.write(bytes(1_000_000))
                await writer.drain()
                sent += 1_000_000

        uploading = asyncio.create_task(upload())
        settled = -1
        while settled != sent:
            settled = sent
            await asyncio.sleep(0.5)
        assert 0 < settled < 100_000_000, "the client was not slowed"
        release.set()
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).startswith(b"HTTP/1.1 200")
        await uploading
        assert psutil.Process().memory_info().rss - before < 64 * 1024 * 1024
        writer.close()
        await writer.wait_closed()
