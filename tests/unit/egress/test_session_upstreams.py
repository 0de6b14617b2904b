"""Connections to upstreams: kept, given up, cut, and never read ahead without bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import pytest

from hiverd.egress import agent_http1, stream, uplinks, upload
from support.egress import eventually, read_head, request, scripted
from support.upstreams import Authority, HttpUpstream, SocketUpstream, lead

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Holding:
    """An upstream that reads a head, sends `first`, then waits for the end; `ended` is set when that comes."""

    def __init__(self, first: bytes = b"") -> None:
        self.first = first
        self.heads: list[bytes] = []
        self.ended = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        try:
            self.heads.append(read_head(connection))
            connection.sendall(self.first)
            while connection.recv(65536):
                pass
        finally:
            self.ended.set()


async def test_a_connection_is_shared_by_agents_one_after_the_other(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    for _ in range(3):
        agent = await rig.agent()
        await agent.get()
        agent.leave()
    assert plain.connections == 1
    await asyncio.gather(*[(await rig.agent()).get("http://api.test/slow/0.2") for _ in range(4)])
    assert plain.connections == 4


async def test_idle_connections_are_closed_after_a_while(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplinks, "IDLE_SECONDS", 0.2)
    holding = Holding(OK)
    with SocketUpstream(holding) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        await (await rig.agent()).get()
        await eventually(holding.ended.is_set, what="the idle connection is closed")
    assert len(rig.outlet.uplinks) == 0


class Fickle:
    """Closes its first connection when the second request of it comes."""

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.requests: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        first = not self.requests
        while head := read_head(connection):
            self.requests.append(head.split(b" ", 1)[0])
            if first and len(self.requests) == 2:
                return
            connection.sendall(OK)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
async def test_a_connection_that_was_just_closed_is_replaced_once(make_rig: Any, method: str) -> None:
    fickle = Fickle()
    with SocketUpstream(fickle) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.get()
        assert (await agent.get(method=method)).body == b"ok"
    assert upstream.connections == 2
    assert fickle.requests == [b"GET", method.encode(), method.encode()]
    assert rig.summary()[-3:] == [f"allowed {method} api.test/", "4: 200", "4: 'ok'"]


@pytest.mark.parametrize(("method", "body"), [("POST", b""), ("PUT", b"x")])
async def test_what_might_have_been_done_is_not_repeated(make_rig: Any, method: str, body: bytes) -> None:
    fickle = Fickle()
    with SocketUpstream(fickle) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.get()
        assert (await agent.get(method=method, body=body)).status == 502
    assert fickle.requests == [b"GET", method.encode()]
    assert rig.summary()[-2:] == [f"allowed {method} api.test/", "4: 502"]


async def test_a_fresh_connection_that_closes_is_not_tried_again(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    assert (await (await rig.agent()).get("http://api.test/close")).status == 502
    assert plain.connections == 1
    assert rig.summary() == ["allowed GET api.test/close", "1: 502"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_an_answer_that_is_cut_is_cut_for_the_agent_too(make_rig: Any, plain: HttpUpstream, version: str) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    await agent.send(request("http://api.test/cut", version=version))
    with pytest.raises((h11.RemoteProtocolError, ConnectionResetError)):
        await agent.answer()
    assert rig.summary() == ["allowed GET api.test/cut", "1: 200", "1: 'half'"]


async def test_a_chunked_answer_that_is_cut_does_not_look_whole_to_http_1_0(make_rig: Any) -> None:
    """There the end of the connection is the end of the body, so it must be broken off instead."""
    cut = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwh"
    with SocketUpstream(scripted(cut, keep=False)) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.send(request("http://api.test/", version="1.0"))
        with pytest.raises(ConnectionResetError):
            await agent.rest()


@pytest.mark.parametrize(
    "answer",
    [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", b"", b"HTTP/1.1 2"],
)
async def test_an_upstream_that_speaks_no_http_is_a_502(make_rig: Any, answer: bytes) -> None:
    with SocketUpstream(scripted(answer, keep=False)) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        assert (await (await rig.agent()).get()).status == 502
    assert rig.summary() == ["allowed GET api.test/", "1: 502"]


async def test_an_upstream_that_refuses_is_a_502_that_says_so(make_rig: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    rig = await make_rig({"access": "allow", "host": "api.test", "override": {"host": address}})
    answer = await (await rig.agent()).get()
    assert (answer.status, answer.body) == (502, b"the upstream cannot be connected to: Connection refused\n")
    assert rig.summary() == ["allowed GET api.test/", "1: 502"]


LEAVING = [
    ("leave", request("http://api.test/"), b""),
    ("reset", request("http://api.test/"), b""),
    ("finish_sending", request("http://api.test/"), b""),
    ("leave", request("http://api.test/"), b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx"),
    ("leave", request("http://api.test/", "Content-Length: 5", method="POST") + b"x", b""),
    ("reset", request("http://api.test/", "Transfer-Encoding: chunked", method="POST") + b"1\r\nx\r\n", b""),
    ("leave", request("http://api.test/", method="POST", body=b"whole"), b""),
    ("leave", request("http://api.test/", "Expect: 100-continue", "Content-Length: 5", method="PUT"), b""),
]


@pytest.mark.parametrize(("how", "sent", "answer"), LEAVING)
async def test_an_upstream_is_let_go_when_the_agent_leaves(make_rig: Any, how: str, sent: bytes, answer: bytes) -> None:
    """An agent that closes its side of the connection has left, as usual for proxies: TCP does not tell the difference
    between one that reads on and one that has ended."""
    holding = Holding(answer)
    with SocketUpstream(holding) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.send(sent)
        await eventually(lambda: len(holding.heads) > 0, what="the request arrives")
        if answer:
            await agent.head()
        getattr(agent, how)()
        await eventually(holding.ended.is_set, what="the upstream is let go", seconds=2)
        await rig.idle()
    assert [event.status for event in rig.responses] == [200 if answer else 0]
    assert upstream.connections == 1


async def test_an_agent_that_leaves_causes_no_second_request(make_rig: Any) -> None:
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        seen.append(read_head(connection))
        connection.sendall(OK)
        while head := read_head(connection):
            seen.append(head)

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.get()
        await agent.send(request("http://api.test/again"))
        await eventually(lambda: len(seen) == 2, what="the second request arrives on the kept connection")
        agent.leave()
        await rig.idle()
        assert (len(seen), upstream.connections) == (2, 1)


class Meter:
    """An upstream that sends, or takes, as fast as it can, and counts."""

    def __init__(self) -> None:
        self.bytes = 0

    def send(self, connection: socket.socket) -> None:
        read_head(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            self.bytes += connection.send(b"x" * 65536)


async def _settled(count: Callable[[], int]) -> int:
    last, steady = -1, 0
    async with asyncio.timeout(20):
        while steady < 5:
            await asyncio.sleep(0.1)
            steady = steady + 1 if count() == last else 0
            last = count()
    return last


@pytest.mark.parametrize("secure", [False, True])
async def test_a_slow_reader_slows_the_upstream(make_rig: Any, secure: bool, upstream_authority: Any) -> None:
    meter = Meter()
    context = upstream_authority.context("api.test") if secure else None
    with SocketUpstream(meter.send, context) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await (rig.secure_agent() if secure else rig.agent(receive_bytes=65536))
        await agent.send(request("https://api.test/"))
        await agent.head()
        sent = await _settled(lambda: meter.bytes)
        assert sent < 16 << 20  # what the kernel's buffers take on three connections
        async with asyncio.timeout(10):
            await agent.reader.readexactly(sent)
        assert await _settled(lambda: meter.bytes) > sent


async def test_a_slow_upstream_slows_the_agent(make_rig: Any) -> None:
    go = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        read_head(connection)
        go.wait(20)
        taken = 0
        while taken < 50_000_000:
            taken += len(connection.recv(1 << 20))
        connection.sendall(OK)

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        agent.writer.write(request("http://api.test/", "Content-Length: 50000000", method="POST") + bytes(50_000_000))
        transport = agent.writer.transport
        left = await _settled(transport.get_write_buffer_size)
        assert left > 30_000_000
        go.set()
        assert (await agent.answer()).status == 200


async def test_an_upstream_that_takes_no_body_is_given_up(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "STALL_SECONDS", 0.3)
    done = threading.Event()

    def serve(connection: socket.socket) -> None:
        read_head(connection)
        done.wait(20)

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        agent.writer.write(request("http://api.test/", "Content-Length: 50000000", method="POST") + bytes(50_000_000))
        answer = await agent.answer()
        assert (answer.status, answer.body) == (502, b"it does not take the request's body\n")
        done.set()
        agent.drop()


async def test_a_head_has_its_time_as_a_whole(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_http1, "HEAD_SECONDS", 0.5)
    rig = await make_rig()
    agent = await rig.agent()
    for byte in b"GET / HTTP/1.1\r\nHost: api.test\r\nX: ":
        await agent.send(bytes((byte,)))
        await asyncio.sleep(0.02)
    assert (await agent.answer()).status == 408
    assert await agent.rest() == b""
    assert rig.summary() == ["denied ? 11.0.0.1:80/", "1: 408"]


async def test_a_connection_without_requests_is_closed(
    make_rig: Any, plain: HttpUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_http1, "IDLE_SECONDS", 0.2)
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    await agent.get()
    assert await agent.rest() == b""
    assert len(rig.requests) == 1


async def test_a_body_that_stalls_is_given_up(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_http1, "BODY_STALL_SECONDS", 0.2)
    holding = Holding()
    with SocketUpstream(holding) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.agent()
        await agent.send(request("http://api.test/", "Content-Length: 5", method="POST") + b"x")
        assert await agent.ended()
        await eventually(holding.ended.is_set, what="the upstream is let go")
    assert rig.summary() == ["allowed POST api.test/", "1: 0"]


@pytest.mark.parametrize("head", ["X: " + "y" * 70_000, "\r\n".join(f"X-{index}: 1" for index in range(1100))])
async def test_endless_heads_are_refused(make_rig: Any, head: str) -> None:
    rig = await make_rig()
    agent = await rig.agent()
    await agent.send(request("http://api.test/", head))
    assert (await agent.answer()).status in (400, 431)
    assert rig.responses[0].status in (400, 431)


async def test_kept_connections_of_older_rules_are_not_used_again(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    idle, busy = await rig.agent(), await rig.agent()
    await busy.send(request("http://api.test/slow/0.5"))
    await idle.get()
    await eventually(lambda: plain.connections == 2, what="both are under way")
    rig.change([lead("api.test", plain)])
    assert (await busy.answer()).status == 200  # what was allowed when it began is answered
    await (await rig.agent()).get()
    assert plain.connections == 3


async def test_a_connection_does_not_serve_a_rule_below_a_denied_address(make_rig: Any, plain: HttpUpstream) -> None:
    target = {"host": f"upstream.test:{plain.port}"}
    rig = await make_rig(
        {"access": "allow", "host": "api.test", "paths": ["/first"], "override": target},
        {"access": "deny", "host": "127.*"},
        {"access": "allow", "host": "api.test", "override": target},
        hosts={"upstream.test": "127.0.0.1"},
    )
    agent = await rig.agent()
    assert (await agent.get("http://api.test/first")).status == 200
    assert (await agent.get("http://api.test/second")).status == 403
    assert rig.summary()[-2:] == ["denied GET api.test/second", "4: 403"]


async def test_a_slow_reader_gets_all_of_an_answer_that_closes(
    make_rig: Any, plain: HttpUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_SHUTDOWN_SECONDS", 0.1)
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent(receive_bytes=16384)
    await agent.send(request("http://api.test/bytes/3000000", "Connection: close"))
    await asyncio.sleep(1)
    assert len(await agent.rest()) > 3_000_000


@pytest.mark.parametrize("notify", [False, True])
@pytest.mark.parametrize("length", [b"Content-Length: 1000000\r\n", b""])
async def test_a_slow_reader_gets_all_of_what_a_closing_upstream_sent_with_tls(
    make_rig: Any, upstream_authority: Authority, length: bytes, notify: bool
) -> None:
    def serve(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n%b\r\n" % length + bytes(1_000_000))
        if notify:
            with contextlib.suppress(OSError):
                connection.unwrap()  # type: ignore[attr-defined]

    with SocketUpstream(serve, upstream_authority.context("api.test")) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.secure_agent()
        await agent.send(request("https://api.test/"))
        await asyncio.sleep(0.3)
        if length or notify:
            assert len((await agent.answer()).body) == 1_000_000
        else:  # it has not told where the end is, so it might have been cut
            assert await agent.ended()


async def test_an_error_of_ours_denies(make_rig: Any, plain: HttpUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await make_rig(lead("api.test", plain))

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rig.outlet.policy, "judge_request", fail)
    answer = await (await rig.agent()).get()
    assert (answer.status, b"bug" in answer.body) == (502, False)
    assert rig.summary() == ["denied GET api.test/", "1: 502"]
    assert plain.seen == []
