"""One client connection over a socket pair, on both event loops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from hiverd.http.connection import READ_BYTES, Connection, UpstreamError

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Scenario = Callable[[Connection, socket.socket], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    async def connect_and_run(scenario: Scenario) -> None:
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        connection = Connection(loop, near, b"host:80")
        await loop.create_connection(lambda: connection, sock=near)
        try:
            await asyncio.wait_for(scenario(connection, far), 20)
        finally:
            connection.abort()
            far.close()
            await asyncio.sleep(0)  # lets the transport close its socket

    def run_scenario(scenario: Scenario) -> None:
        if request.param == "uvloop":
            uvloop.run(connect_and_run(scenario))
        else:
            asyncio.run(connect_and_run(scenario))

    return run_scenario


def test_exchanges_follow_each_other(run: Run) -> None:
    async def scenario(connection: Connection, far: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert not connection.stale()
            connection.begin(GET, "GET")
            assert await loop.sock_recv(far, 1000) == GET
            await loop.sock_sendall(far, OK)
            assert (await connection.response()).status == 200
            assert await connection.read() == (b"ok", False)
            assert connection.finish()

    run(scenario)


def test_a_close_is_seen_before_the_loop_tells(run: Run) -> None:
    async def scenario(connection: Connection, far: socket.socket) -> None:
        assert not connection.stale()
        far.close()
        assert connection.idle
        assert connection.stale()

    run(scenario)


def test_unasked_bytes_are_seen_before_the_loop_tells(run: Run) -> None:
    async def scenario(connection: Connection, far: socket.socket) -> None:
        far.send(OK)
        assert connection.stale()

    run(scenario)


def test_much_that_is_no_body_does_not_stop_the_reading(run: Run) -> None:
    async def scenario(connection: Connection, far: socket.socket) -> None:
        connection.begin(GET, "GET")
        interim = b"HTTP/1.1 103 Early Hints\r\nX: " + b"x" * 60_000 + b"\r\n\r\n"
        chunks = b"00000001;" + b"x" * 4000 + b"\r\nx\r\n"
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        data = interim * 5 + head + chunks * 100 + b"0\r\n\r\n"
        assert len(data) > 5 * READ_BYTES
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(far, data))
        assert (await connection.response()).status == 200
        body, more = b"", True
        while more:
            piece, more = await connection.read()
            body += piece
        assert body == b"x" * 100
        await sending
        assert connection.finish()

    run(scenario)


def test_what_came_before_a_loss_is_delivered_first(run: Run) -> None:
    async def scenario(connection: Connection, far: socket.socket) -> None:
        connection.begin(GET, "GET")
        far.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfirst")
        far.close()
        assert (await connection.response()).status == 200
        assert await connection.read() == (b"first", True)
        with pytest.raises(UpstreamError) as lost:
            await connection.read()
        assert not lost.value.unanswered

    run(scenario)


@pytest.mark.parametrize(("answer", "unanswered"), [(b"", True), (b"H", False)])
def test_an_unanswered_request_is_told_apart(run: Run, answer: bytes, unanswered: bool) -> None:
    async def scenario(connection: Connection, far: socket.socket) -> None:
        connection.begin(GET, "GET")
        await asyncio.get_running_loop().sock_recv(far, 1000)
        far.send(answer)
        far.close()
        with pytest.raises(UpstreamError) as lost:
            await connection.response()
        assert lost.value.unanswered is unanswered

    run(scenario)


def test_abort_wakes_every_waiter(run: Run) -> None:
    async def scenario(connection: Connection, far: socket.socket) -> None:
        connection.begin(GET + b"x" * 10_000_000, "GET")
        waits = [asyncio.create_task(wait) for wait in (connection.response(), connection.drain())]
        consent = asyncio.create_task(connection.continued())
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in (*waits, consent))
        connection.abort("enough")
        connection.abort("again")
        await asyncio.wait((*waits, consent))
        with pytest.raises(UpstreamError, match="enough"):
            await waits[0]
        await waits[1]
        await consent

    run(scenario)
