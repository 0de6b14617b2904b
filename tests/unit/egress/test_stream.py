"""A stream's end: what was written is sent, unless nobody takes it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from hiverd.egress import stream
from hiverd.egress.relay import relay
from hiverd.egress.stream import Stream

SIZE = 2_000_000


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    yield near, far
    near.close()
    far.close()


async def _read_all(sock: socket.socket, pause_seconds: float = 0.0) -> int:
    total = 0
    while data := await asyncio.get_running_loop().sock_recv(sock, 100_000):
        total += len(data)
        await asyncio.sleep(pause_seconds)
    return total


async def test_a_slow_reader_gets_all_of_it(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_SHUTDOWN_SECONDS", 0.05)
    monkeypatch.setattr(stream, "_FLUSH_SECONDS", 0.3)
    near = await Stream.over(pair[0])
    writing = asyncio.create_task(near.write(bytes(SIZE)))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(near.close())
    assert await _read_all(pair[1], pause_seconds=0.1) == SIZE  # some two seconds, and never 0.3 without progress
    await closing
    await asyncio.gather(writing, return_exceptions=True)


async def test_who_takes_nothing_is_cut(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_FLUSH_SECONDS", 0.2)
    near = await Stream.over(pair[0])
    writing = asyncio.create_task(near.write(bytes(SIZE)))
    await asyncio.sleep(0.01)
    began = time.monotonic()
    await near.close()
    assert 0.15 < time.monotonic() - began < 2
    await asyncio.gather(writing, return_exceptions=True)


async def test_who_sends_without_end_is_not_listened_to_without_end(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "LINGER_SECONDS", 0.3)
    near = await Stream.over(pair[0])

    async def flood() -> None:
        while True:
            await asyncio.get_running_loop().sock_sendall(pair[1], bytes(10_000))

    flooding = asyncio.create_task(flood())
    began = time.monotonic()
    await near.linger()
    await near.close()
    assert 0.2 < time.monotonic() - began < 2
    assert isinstance((await asyncio.gather(flooding, return_exceptions=True))[0], OSError)


async def test_a_relay_ends_when_both_directions_have(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = socket.socketpair()
    with right:
        left.setblocking(False)
        right.setblocking(False)
        loop = asyncio.get_running_loop()
        one, other = await Stream.over(pair[0]), await Stream.to(left)
        relaying = asyncio.create_task(relay(one, other))
        await loop.sock_sendall(pair[1], b"up")
        assert await loop.sock_recv(right, 10) == b"up"
        pair[1].shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(right, 10) == b""
        await loop.sock_sendall(right, b"down")
        assert await loop.sock_recv(pair[1], 10) == b"down"
        assert not relaying.done()
        right.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(relaying, 5)
        await asyncio.gather(one.close(), other.close())
