"""HTTP/2 with the agent: exchanges, bodies both ways, and what ends them."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from h2.errors import ErrorCodes
from h2.events import PingAckReceived

from support.http2 import WAIT_SECONDS, Http2Client, Rig, rig
from support.upstreams import HttpUpstream, SocketUpstream, lead
from support.waiting import until_async


@pytest.fixture
def upstream() -> Iterator[HttpUpstream]:
    with HttpUpstream() as upstream:
        yield upstream


@pytest.fixture
async def connected(upstream: HttpUpstream, tmp_path: Path) -> AsyncIterator[tuple[Rig, Http2Client]]:
    async with rig([lead("api.test", upstream)], tmp_path) as made:
        yield made, await made.connect()


async def test_many_exchanges_share_a_connection(connected: tuple[Rig, Http2Client], upstream: HttpUpstream) -> None:
    made, client = connected
    numbers = [await client.request(f"/n/{number}?q={number}") for number in range(50)]
    answers = [await client.answer(number) for number in numbers]
    assert [json.loads(answer.body)["path"] for answer in answers] == [f"/n/{n}?q={n}" for n in range(50)]
    assert {answer.status for answer in answers} == {200}
    assert made.statuses == [200] * 50
    assert {event.host for event in made.events("request")} == {"api.test"}


async def test_a_request_arrives_as_http_1(connected: tuple[Rig, Http2Client], upstream: HttpUpstream) -> None:
    _, client = connected
    fields = [(b"cookie", b"a=1"), (b"x-one", b"1"), (b"cookie", b"b=2"), (b"te", b"trailers")]
    await client.get("/here", fields=fields)
    seen = upstream.seen[0]
    assert seen.headers == [
        ("Host", "api.test"), ("X-One", "1"), ("Cookie", "a=1; b=2"), ("Te", "trailers"), ("Connection", "te"),
    ]  # fmt: skip


async def test_bodies_go_both_ways(connected: tuple[Rig, Http2Client], upstream: HttpUpstream) -> None:
    _, client = connected
    body = bytes(range(256)) * 4096
    number = await client.request("/post", method="POST", end=False)
    await client.send(number, body, end=True)
    answer = await client.answer(number)
    assert upstream.seen[0].body == body
    assert upstream.seen[0].header("transfer-encoding") == "chunked"
    assert json.loads(answer.body)["body"] == body.decode("latin-1")


async def test_a_told_length_is_passed_on(connected: tuple[Rig, Http2Client], upstream: HttpUpstream) -> None:
    _, client = connected
    number = await client.request("/post", method="POST", fields=[(b"content-length", b"5")], end=False)
    await client.send(number, b"hello", end=True)
    assert (await client.answer(number)).status == 200
    assert upstream.seen[0].header("content-length") == "5"
    assert upstream.seen[0].header("transfer-encoding") is None


async def test_consent_to_a_body_is_asked_for_and_passed_on(connected: tuple[Rig, Http2Client]) -> None:
    _, client = connected
    fields = [(b"content-length", b"5"), (b"expect", b"100-continue")]
    number = await client.request("/post", method="POST", fields=fields, end=False)
    await client.until(lambda: client.answers[number].interim, "100")
    await client.send(number, b"hello", end=True)
    answer = await client.answer(number)
    assert (answer.interim, answer.status) == ([100], 200)


async def test_trailers_come_down(connected: tuple[Rig, Http2Client]) -> None:
    _, client = connected
    answer = await client.get("/trailers")
    assert answer.body == b"body\n"
    assert answer.trailers == [(b"x-trailer", b"here")]


async def test_trailers_go_up(tmp_path: Path) -> None:
    received: list[bytes] = []
    with SocketUpstream(lambda connection: _read_until(connection, b"\r\n\r\n", 2, received)) as upstream:
        async with rig([lead("api.test", upstream)], tmp_path) as made:
            client = await made.connect()
            number = await client.request("/post", method="POST", end=False)
            await client.send(number, b"hello")
            client.h2.send_headers(number, [(b"x-sum", b"1")], end_stream=True)
            await client.flush()
            assert (await client.answer(number)).status == 204
    assert received[0].endswith(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")


@pytest.mark.parametrize(
    ("method", "path", "status", "length"),
    [("HEAD", "/bytes/7", 200, b"7"), ("GET", "/status/204", 204, None), ("GET", "/status/304", 304, b"0")],
)
async def test_answers_without_a_body(
    connected: tuple[Rig, Http2Client], method: str, path: str, status: int, length: bytes | None
) -> None:
    _, client = connected
    answer = await client.get(path, method=method)
    assert (answer.status, answer.ended, bytes(answer.body)) == (status, True, b"")
    assert dict(answer.fields).get(b"content-length") == length


async def test_what_no_rule_allows_is_answered_403(connected: tuple[Rig, Http2Client]) -> None:
    made, client = connected
    answer = await client.get("/", authority="other.test")
    assert answer.status == 403
    assert [event.access for event in made.events("request")] == ["denied"]
    assert (await client.get("/")).status == 200  # the connection goes on


async def test_an_upstream_that_is_not_there_is_answered_502(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        rule = {"access": "allow", "host": "api.test", "override": {"host": f"127.0.0.1:{closed.getsockname()[1]}"}}
        async with rig([rule], tmp_path) as made:
            client = await made.connect()
            assert (await client.get("/")).status == 502
            assert made.statuses == [502]


async def test_an_answer_that_breaks_off_ends_its_stream_alone(connected: tuple[Rig, Http2Client]) -> None:
    _, client = connected
    answer = await client.get("/cut")
    assert (answer.status, bytes(answer.body), answer.ended) == (200, b"half", False)
    assert answer.reset == ErrorCodes.INTERNAL_ERROR
    assert (await client.get("/")).status == 200


async def test_a_slow_agent_slows_the_upstream(tmp_path: Path) -> None:
    sent = [0]
    with SocketUpstream(lambda connection: _send_for_ever(connection, sent)) as upstream:
        async with rig([lead("api.test", upstream)], tmp_path) as made:
            client = await made.connect()
            client.take = False
            number = await client.request("/")
            await client.until(lambda: len(client.answers[number].body) == 65_535, "a full window")
            before = -1
            while before != sent[0]:  # the buffers on the way fill
                before = sent[0]
                await asyncio.sleep(0.3)
            assert before < 32 << 20
            other = await client.request("/")
            await client.until(lambda: client.answers[other].status == 200, "another answer")


async def test_a_slow_upstream_slows_the_agent(tmp_path: Path) -> None:
    release = threading.Event()
    with SocketUpstream(lambda connection: release.wait(30) and None) as upstream:
        async with rig([lead("api.test", upstream)], tmp_path) as made:
            client = await made.connect()
            number = await client.request("/", method="POST", end=False)
            task = asyncio.create_task(client.send(number, b"x" * (64 << 20)))
            windows = -1
            while windows != len(client.events):  # the buffers on the way fill
                windows = len(client.events)
                await asyncio.sleep(0.3)
            assert client.h2.local_flow_control_window(number) == 0
            assert windows < 1000
            task.cancel()
            release.set()


async def test_a_stream_that_the_agent_breaks_off_ends_the_upstreams_work(tmp_path: Path) -> None:
    gone = threading.Event()
    with SocketUpstream(lambda connection: _wait_for_end(connection, gone)) as upstream:
        async with rig([lead("api.test", upstream)], tmp_path) as made:
            client = await made.connect()
            number = await client.request("/")
            await _until(lambda: upstream.connections == 1, "the upstream's connection")
            await _until(lambda: bool(made.events("request")), "the request's event")
            client.h2.reset_stream(number)
            await client.flush()
            await _until(gone.is_set, "the end of the upstream's connection")
            await _until(lambda: made.statuses != [], "the response's event")
            assert made.outlet.http2_streams == 0


async def test_an_agent_that_leaves_ends_the_upstreams_work(tmp_path: Path) -> None:
    gone = threading.Event()
    with SocketUpstream(lambda connection: _wait_for_end(connection, gone)) as upstream:
        async with rig([lead("api.test", upstream)], tmp_path) as made:
            client = await made.connect()
            await client.request("/")
            await _until(lambda: upstream.connections == 1, "the upstream's connection")
            await client.close()
            await _until(gone.is_set, "the end of the upstream's connection")
            await asyncio.wait_for(made.tasks[0], WAIT_SECONDS)


async def test_streams_go_on_after_the_agents_goaway(connected: tuple[Rig, Http2Client]) -> None:
    made, client = connected
    number = await client.request("/slow/0.3")
    client.h2.close_connection(last_stream_id=0)
    await client.flush()
    client.h2.state_machine.state = type(client.h2.state_machine.state).CLIENT_OPEN  # the library stops here
    assert (await client.answer(number)).status == 200
    await client.until(lambda: client.closed, "the connection's end")
    assert made.statuses == [200]


async def test_the_connection_says_goaway_when_the_server_stops(connected: tuple[Rig, Http2Client]) -> None:
    made, client = connected
    number = await client.request("/slow/5")
    await _until(lambda: bool(made.events("request")), "the request's event")
    made.tasks[0].cancel()
    await client.until(lambda: client.closed, "the connection's end")
    assert client.error == ErrorCodes.NO_ERROR
    assert not client.answers[number].ended
    with pytest.raises(asyncio.CancelledError):
        await made.tasks[0]


async def test_an_idle_connection_is_closed(
    upstream: HttpUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hiverd.egress.agent_http2.IDLE_SECONDS", 0.3)
    async with rig([lead("api.test", upstream)], tmp_path) as made:
        client = await made.connect()
        assert (await client.get("/slow/0.6")).status == 200  # not idle
        client.h2.ping(b"12345678")  # nor is this a use of it
        await client.flush()
        await client.until(lambda: client.closed, "the connection's end")
        assert client.error == ErrorCodes.NO_ERROR
        assert made.statuses == [200]


async def test_pings_are_answered(connected: tuple[Rig, Http2Client]) -> None:
    _, client = connected
    client.h2.ping(b"12345678")
    await client.flush()
    await client.until(lambda: any(isinstance(event, PingAckReceived) for event in client.events), "the ping's echo")


async def test_an_answer_before_the_body_has_ended_ends_the_stream(tmp_path: Path) -> None:
    with SocketUpstream(_answer_early) as upstream:
        async with rig([lead("api.test", upstream)], tmp_path) as made:
            client = await made.connect()
            number = await client.request("/", method="POST", end=False)
            await client.send(number, b"x" * 10_000)
            await client.until(lambda: client.answers[number].reset is not None, "the end of the stream")
            answer = client.answers[number]
            assert (answer.status, answer.ended, answer.reset) == (413, True, ErrorCodes.NO_ERROR)


async def test_a_change_of_the_rules_holds_for_the_next_request(connected: tuple[Rig, Http2Client]) -> None:
    made, client = connected
    assert (await client.get("/")).status == 200
    made.outlet.change(Rig.rules([]))
    assert (await client.get("/")).status == 403


async def _until(probe: Any, what: str) -> None:
    async def ask() -> bool:
        return bool(probe())

    await until_async(ask, seconds=WAIT_SECONDS, what=what)


def _read_until(connection: socket.socket, mark: bytes, count: int, received: list[bytes]) -> None:
    data = b""
    while data.count(mark) < count:
        data += connection.recv(65536)
    received.append(data)
    connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")


def _send_for_ever(connection: socket.socket, sent: list[int]) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)
        sent[0] += 65536


def _wait_for_end(connection: socket.socket, gone: threading.Event) -> None:
    try:
        while connection.recv(65536):
            pass
    finally:
        gone.set()


def _answer_early(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n")
    while connection.recv(65536):
        pass
