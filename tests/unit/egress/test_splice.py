"""Bytes that pass within the kernel: all of them, both ways, to the end, whether many at once or few."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from hiverd.egress import splice
from hiverd.egress.splice import Splicer

SECONDS = 20.0


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection, as low-water marks are TCP's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


@pytest.fixture
async def ends() -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """What a splicer has joined, from outside."""
    client, agent_side = tcp_pair()
    upstream_side, server = tcp_pair()
    splicer = Splicer()
    joining = asyncio.create_task(splicer.join(agent_side, upstream_side))
    yield client, server
    for sock in (client, server):
        sock.close()
    await asyncio.wait_for(joining, SECONDS)
    splicer.close()
    for sock in (agent_side, upstream_side):
        sock.close()


async def receive(sock: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    async with asyncio.timeout(SECONDS):
        while len(data) < count:
            piece = await loop.sock_recv(sock, 1 << 20)
            assert piece, "the end came too soon"
            data += piece
    return bytes(data)


async def test_few_bytes_after_many_arrive_and_the_other_way_too(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    loop = asyncio.get_running_loop()
    for size in (1, 8 << 20, 3, 100_000, 1 << 20, 7, 65_536, 1):
        data = os.urandom(size)
        for source, target in ((client, server), (server, client)):
            sending = asyncio.create_task(loop.sock_sendall(source, data))
            assert await receive(target, size) == data
            await sending


async def test_one_direction_may_end_before_the_other(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, b"question")
    client.shutdown(socket.SHUT_WR)
    assert await receive(server, 8) == b"question"
    assert await asyncio.wait_for(loop.sock_recv(server, 1), SECONDS) == b""
    await loop.sock_sendall(server, b"answer")
    assert await receive(client, 6) == b"answer"


async def test_a_flow_that_pauses_is_waited_for_without_a_mark(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the pause: the mark goes once, and the wait has no more timer."""
    marks: list[int] = []
    real = splice._wait_for

    def note(sock: socket.socket, count: int) -> None:
        marks.append(count)
        with contextlib.suppress(OSError):
            real(sock, count)

    monkeypatch.setattr(splice, "_wait_for", note)
    client, server = ends
    loop = asyncio.get_running_loop()
    sending = asyncio.create_task(loop.sock_sendall(client, bytes(8 << 20)))
    await receive(server, 8 << 20)
    await sending
    async with asyncio.timeout(SECONDS):
        while not marks or marks[-1] != 1:
            await asyncio.sleep(0.001)
    before = len(marks)
    await asyncio.sleep(splice._GATHER_SECONDS * 10)
    assert len(marks) == before
