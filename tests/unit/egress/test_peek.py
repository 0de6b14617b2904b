"""Looking without taking, on real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from hiverd.egress import openings
from hiverd.egress.openings import first_kind, opening, upstream_speaks_first
from hiverd.egress.peek import PEEK_BYTES, Peeker


class Ends(NamedTuple):
    agent: socket.socket
    ours: socket.socket
    peeker: Peeker


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    """A TCP connection as the gate accepts it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        agent = socket.create_connection(listener.getsockname())
        agent.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours, _ = listener.accept()
        ours.setblocking(False)
        with agent, ours:
            yield Ends(agent, ours, Peeker(ours))


async def test_bytes_are_seen_as_they_come_and_stay(ends: Ends) -> None:
    ends.agent.sendall(b"ab")
    assert await ends.peeker.more()
    assert ends.peeker.data == b"ab"
    waiting = asyncio.create_task(ends.peeker.more())
    await asyncio.sleep(0.02)
    assert not waiting.done(), "bytes that were seen are no news"
    ends.agent.sendall(b"c")
    assert await waiting
    assert ends.peeker.data == b"abc"
    ends.agent.close()
    assert not await ends.peeker.more()
    assert not ends.peeker.blocked
    assert ends.ours.recv(10) == b"abc"


async def test_a_wait_that_is_given_up_leaves_the_socket_as_it_was(ends: Ends) -> None:
    ends.agent.sendall(b"ab")
    assert await ends.peeker.more()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await ends.peeker.more()
    assert ends.ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    ends.agent.sendall(b"c")
    assert await ends.peeker.more()
    assert ends.peeker.data == b"abc"


@pytest.mark.parametrize("half_close", [False, True])
async def test_what_an_urgent_byte_hides_is_known_to_be_there(ends: Ends, half_close: bool) -> None:
    ends.agent.sendall(b"GE")
    assert await ends.peeker.more()
    ends.agent.send(b"T", socket.MSG_OOB)
    ends.agent.sendall(b" / HTTP/1.1\r\n")
    if half_close:
        ends.agent.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(5):
        assert await first_kind(ends.peeker) == "refused"


async def test_the_end_of_the_buffer_is_no_end(ends: Ends) -> None:
    ends.agent.setblocking(False)
    sent = 0
    while sent <= PEEK_BYTES:
        sent += ends.agent.send(bytes(PEEK_BYTES))
    async with asyncio.timeout(5):
        while await ends.peeker.more():
            pass
    assert ends.peeker.blocked
    assert len(ends.peeker.data) == PEEK_BYTES


@pytest.mark.parametrize(
    ("data", "kind"), [(b"GET / HT", "http"), (b"\x16\3", "tls"), (b"\0", "opaque"), (b"PRI * HTTP/2", "refused")]
)
async def test_openings(ends: Ends, data: bytes, kind: str) -> None:
    ends.agent.sendall(data)
    assert await opening(ends.peeker) == kind


async def test_a_part_that_ends_is_opaque_and_nothing_is_nothing(ends: Ends) -> None:
    ends.agent.sendall(b"PIN")
    ends.agent.shutdown(socket.SHUT_WR)
    assert await opening(ends.peeker) == "opaque"


async def test_a_connection_that_ends_without_a_word(ends: Ends) -> None:
    ends.agent.close()
    assert await opening(ends.peeker) is None


async def test_silence(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openings, "SILENCE_SECONDS", 0.02)
    monkeypatch.setattr(openings, "FIRST_BYTES_SECONDS", 0.05)
    assert await opening(ends.peeker) == "silent"
    ends.agent.sendall(b"GE")
    assert await first_kind(ends.peeker) == "refused", "the next bytes could make a request of it"


async def test_who_speaks_first(ends: Ends) -> None:
    one, other = socket.socketpair()
    with one, other:
        other.setblocking(False)
        waiting = asyncio.create_task(upstream_speaks_first(ends.peeker, other))
        await asyncio.sleep(0.02)
        one.sendall(b"220 hello\r\n")
        assert await waiting
        ends.agent.sendall(b"x")
        assert await upstream_speaks_first(ends.peeker, other) is False, "the agent did not wait"
        assert other.recv(100) == b"220 hello\r\n"
