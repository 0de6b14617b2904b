"""HTTP through the gateway: a real uvicorn, a real network namespace, real servers in it (PROTOCOL 3.13)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from hiverd.wire.events import IngressChunkEvent, IngressRequestEvent, IngressResponseEvent
from unit.gateway.harness import (
    Front,
    RecordedEvents,
    Target,
    answering,
    eventually,
    network_namespace,
    open_descriptors,
    read_request,
    upstream,
)

pytestmark = pytest.mark.system

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    with network_namespace() as path:
        yield path


@pytest.fixture(scope="module")
def shared_front(namespace: str) -> Iterator[Front]:
    with Front(Target(namespace), refused_patience_seconds=1.0) as front:
        yield front


@pytest.fixture
def front(shared_front: Front) -> Front:
    shared_front.target.events = RecordedEvents()
    shared_front.call(shared_front.gateway.forget, "sandbox-1")
    return shared_front


def url(front: Front, port: int | str, rest: str = "/") -> str:
    return f"http://127.0.0.1:{front.port}/proxy/{port}{rest}"


async def raw_exchange(front: Front, request: bytes) -> bytes:
    """Sends bytes to the gateway's server; everything that comes back until it closes."""
    async with connected(front) as (reader, writer):
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 20)


@contextlib.asynccontextmanager
async def connected(front: Front) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the gateway's server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "REPORT"])
async def test_every_method(front: Front, namespace: str, method: str) -> None:
    seen: list[Any] = []
    async with upstream(namespace, answering(OK, seen=seen)) as up, httpx.AsyncClient() as client:
        if method == "HEAD":
            async with upstream(namespace, answering(OK[:-2], seen=seen)) as head_up:
                answer = await client.request(method, url(front, head_up.port, "/x"))
                assert answer.headers["content-length"] == "2"
        else:
            answer = await client.request(method, url(front, up.port, "/x"))
            assert answer.text == "ok"
        assert answer.status_code == 200
        assert seen[0][0] == f"{method} /x HTTP/1.1"


@pytest.mark.parametrize(
    ("rest", "target"),
    [
        ("", "/"),
        ("/", "/"),
        ("?a=1", "/?a=1"),
        ("/a%20b/%2e%2e//c;d?x=%2F&y=a+b&x", "/a%20b/%2e%2e//c;d?x=%2F&y=a+b&x"),
    ],
)
async def test_the_target_is_sent_unchanged(front: Front, namespace: str, rest: str, target: str) -> None:
    seen: list[Any] = []
    async with upstream(namespace, answering(OK, seen=seen)) as up:
        request = f"GET /proxy/{up.port}{rest} HTTP/1.1\r\nHost: gate\r\nConnection: close\r\n\r\n".encode()
        assert (await raw_exchange(front, request)).endswith(b"\r\n\r\nok")
        assert seen[0][0] == f"GET {target} HTTP/1.1"


async def test_request_headers(front: Front, namespace: str) -> None:
    seen: list[Any] = []
    async with upstream(namespace, answering(OK, seen=seen)) as up, httpx.AsyncClient() as client:
        headers = [
            ("X-A", "1"),
            ("Mcp-Session-Id", "s"),
            ("X-A", "2"),
            ("Connection", "X-Private"),
            ("X-Private", "p"),
            ("X-Forwarded-For", "10.0.0.9"),
            ("TE", "trailers"),
        ]
        await client.get(url(front, up.port), headers=headers)
        fields = seen[0][1]
        assert fields[0] == ("Host", f"127.0.0.1:{up.port}")
        assert [field for field in fields if field[0] in ("X-A", "Mcp-Session-Id")] == [
            ("X-A", "1"),
            ("Mcp-Session-Id", "s"),
            ("X-A", "2"),
        ]
        assert ("X-Forwarded-For", "10.0.0.9, 127.0.0.1") in fields
        assert ("X-Forwarded-Host", f"127.0.0.1:{front.port}") in fields
        assert ("X-Forwarded-Proto", "http") in fields
        assert not {"Connection", "X-Private", "Te"} & {name for name, _ in fields}


async def test_response_headers(front: Front, namespace: str) -> None:
    response = (
        b"HTTP/1.1 302 Found\r\nSet-Cookie: a=1\r\nLocation: /elsewhere\r\nServer: mine\r\nDate: then\r\n"
        b"Keep-Alive: timeout=5\r\nConnection: X-Hop\r\nX-Hop: 1\r\nSet-Cookie: b=2\r\nContent-Length: 0\r\n\r\n"
    )
    async with upstream(namespace, answering(response)) as up, httpx.AsyncClient() as client:
        answer = await client.get(url(front, up.port))
        assert answer.status_code == 302
        assert answer.headers.raw == [
            (b"set-cookie", b"a=1"),
            (b"location", b"/elsewhere"),
            (b"server", b"mine"),
            (b"date", b"then"),
            (b"set-cookie", b"b=2"),
            (b"content-length", b"0"),
        ]


@pytest.mark.parametrize(
    ("response", "status", "body"),
    [
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nX-T: 1\r\n\r\n",
            200,
            b"abcde",
        ),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\nEtag: x\r\n\r\n", 304, b""),
        (b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nbad", 500, b"bad"),
        (b"HTTP/1.1 599 Odd\r\nContent-Length: 0\r\n\r\n", 599, b""),
    ],
)
async def test_framings(front: Front, namespace: str, response: bytes, status: int, body: bytes) -> None:
    async with upstream(namespace, answering(response)) as up, httpx.AsyncClient() as client:
        for _ in range(3):
            answer = await client.get(url(front, up.port))
            assert (answer.status_code, answer.content) == (status, body)
        assert up.connections == 1


async def test_a_server_that_announces_its_close_is_not_asked_again(front: Front, namespace: str) -> None:
    response = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with upstream(namespace, answering(response)) as up, httpx.AsyncClient() as client:
        for count in (1, 2):
            assert (await client.get(url(front, up.port))).text == "ok"
            assert up.connections == count


async def test_a_body_that_ends_with_the_connection(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.0 200 OK\n\nfirst ")
        await writer.drain()
        writer.write(b"second")

    async with upstream(namespace, handle) as up, httpx.AsyncClient() as client:
        for _ in range(2):
            assert (await client.get(url(front, up.port))).text == "first second"
        assert up.connections == 2


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "::"])
async def test_loopback_listeners_are_reached(front: Front, namespace: str, address: str) -> None:
    seen: list[Any] = []
    async with upstream(namespace, answering(OK, seen=seen), address=address) as up, httpx.AsyncClient() as client:
        assert (await client.get(url(front, up.port))).text == "ok"
        host = "[::1]" if ":" in address else "127.0.0.1"
        assert seen[0][1][0] == ("Host", f"{host}:{up.port}")


@pytest.mark.parametrize("port", ["0", "65536", "-1", "abc", "80a", "", "000080", "%38%30", "+80"])
async def test_invalid_ports(front: Front, port: str) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.get(url(front, port))
        assert answer.status_code == 400
        assert "port" in answer.json()["error"]
    assert front.target.events.recorded == []


@pytest.mark.parametrize("port", [1024, 1025, 1026, 1028])
async def test_reserved_ports(front: Front, port: int) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.get(url(front, port))
        assert answer.status_code == 403
        assert answer.json()["error"]


async def test_nothing_listens(front: Front) -> None:
    async with httpx.AsyncClient() as client:
        begin = time.monotonic()
        answer = await client.get(url(front, 9))
        assert 0.9 < time.monotonic() - begin < 5
        assert (answer.status_code, answer.content) == (502, b"")
    request, response = front.target.events.recorded
    assert isinstance(request, IngressRequestEvent)
    assert isinstance(response, IngressResponseEvent)
    assert (response.request_id, response.status) == (1, 502)


async def test_waits_for_a_server_that_comes_up(namespace: str) -> None:
    with Front(Target(namespace), refused_patience_seconds=20) as front:
        async with httpx.AsyncClient(timeout=30) as client:
            request = asyncio.create_task(client.post(url(front, 8123), content=b"body"))
            await eventually(lambda: bool(front.target.events.recorded), "the request event before the dial succeeds")
            assert front.target.events.of(IngressRequestEvent)[0].body == "body"
            seen: list[Any] = []
            async with upstream(namespace, answering(OK, seen=seen), port=8123):
                assert (await request).text == "ok"
                assert seen[0][2] == b"body"


@pytest.mark.parametrize("body", [b"", b"Content-Length: 4\r\n\r\nbody", b"Content-Length: 400\r\n\r\nbody"])
async def test_the_wait_ends_when_the_client_leaves(namespace: str, body: bytes) -> None:
    with Front(Target(namespace), refused_patience_seconds=600) as front:
        async with connected(front) as (_, writer):
            writer.write(b"POST /proxy/9/ HTTP/1.1\r\nHost: x\r\n" + (body or b"\r\n"))
            await eventually(lambda: bool(front.target.events.of(IngressRequestEvent)), "the request event")
            assert front.target.events.of(IngressResponseEvent) == []
            writer.close()
            await eventually(lambda: bool(front.target.events.of(IngressResponseEvent)), "the end of the wait")
            assert front.call(front.gateway.connection_count, "sandbox-1") == 0


async def test_a_namespace_that_is_gone(namespace: str) -> None:
    with Front(Target("/run/netns/there-is-no-such-namespace")) as front:
        async with httpx.AsyncClient() as client:
            begin = time.monotonic()
            answer = await client.get(url(front, 80))
            assert answer.status_code == 502
            assert answer.json()["error"]
            assert time.monotonic() - begin < 5


async def test_the_hosts_loopback_is_never_dialled() -> None:
    """A workload without a namespace of its own must not turn 127.0.0.1 into this host."""
    with Front(Target(None)) as front:
        async with httpx.AsyncClient() as client:
            answer = await client.get(url(front, front.port))
            assert answer.status_code == 502


async def test_uploads_stream_both_ways_at_once(front: Front, namespace: str) -> None:
    """Each piece is echoed before the next one is sent."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while line := await reader.readline():
            piece = await reader.readexactly(int(line, 16) + 2)
            writer.write(line + piece)
            if piece == b"\r\n":
                break

    async with upstream(namespace, echo) as up, connected(front) as (reader, writer):
        writer.write(f"POST /proxy/{up.port}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        for text in (b"one", b"three"):
            writer.write(b"%x\r\n%b\r\n" % (len(text), text))
            assert await asyncio.wait_for(reader.readexactly(len(text) + 5), 10) == b"%x\r\n%b\r\n" % (
                len(text),
                text,
            )
        writer.write(b"0\r\n\r\n")
        assert await asyncio.wait_for(reader.readexactly(5), 10) == b"0\r\n\r\n"
    assert [chunk.body for chunk in front.target.events.of(IngressChunkEvent)] == ["one", "three"]


async def test_server_sent_events_are_flushed(front: Front, namespace: str) -> None:
    release = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(3):
            writer.write(b"data: %d\n\n" % number)
            await writer.drain()
            await release.wait()
            release.clear()

    async with (
        upstream(namespace, handle) as up,
        httpx.AsyncClient() as client,
        client.stream("GET", url(front, up.port)) as answer,
    ):
        pieces = answer.aiter_bytes()
        for number in range(3):
            assert await asyncio.wait_for(anext(pieces), 10) == b"data: %d\n\n" % number
            release.set()
    assert [chunk.body for chunk in front.target.events.of(IngressChunkEvent)] == [
        f"data: {number}\n\n" for number in range(3)
    ]


async def test_a_client_that_leaves_ends_the_upstream(front: Front, namespace: str) -> None:
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        try:
            assert await reader.read() == b""
        finally:
            ended.set()

    async with upstream(namespace, handle) as up, httpx.AsyncClient() as client:
        async with client.stream("GET", url(front, up.port)) as answer:
            assert await anext(answer.aiter_bytes()) == b"data: 1\n\n"
        await asyncio.wait_for(ended.wait(), 10)
        await eventually(lambda: front.call(front.gateway.connection_count, "sandbox-1") == 0, "no connection left")


async def test_a_client_that_leaves_before_the_answer(front: Front, namespace: str) -> None:
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        try:
            await reader.read()
        finally:
            ended.set()

    async with upstream(namespace, handle) as up, connected(front) as (_, writer):
        writer.write(f"GET /proxy/{up.port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await eventually(lambda: up.open == 1, "the upstream is reached")
        writer.close()
        await asyncio.wait_for(ended.wait(), 10)
        await eventually(lambda: len(front.target.events.of(IngressResponseEvent)) == 1, "the response event")


async def test_forgetting_a_sandbox_closes_all_its_connections(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, _ = await read_request(reader)
        writer.write(OK)
        if "/hang" in line:
            await reader.read()
        else:
            await handle(reader, writer)

    async with upstream(namespace, handle) as up, httpx.AsyncClient() as client:
        await asyncio.gather(*[client.get(url(front, up.port)) for _ in range(4)])
        hanging = asyncio.create_task(client.get(url(front, up.port, "/hang")))
        await hanging
        front.call(front.gateway.forget, "sandbox-1")
        await eventually(lambda: up.open == 0, "the upstream's connections are closed")
        assert (await client.get(url(front, up.port))).status_code == 200


async def test_forgetting_a_sandbox_ends_the_wait_for_its_servers(namespace: str) -> None:
    with Front(Target(namespace), refused_patience_seconds=600) as front:
        async with httpx.AsyncClient(timeout=20) as client:
            waiting = asyncio.create_task(client.get(url(front, 9)))
            await eventually(lambda: bool(front.target.events.recorded), "the request event")
            front.call(front.gateway.forget, "sandbox-1")
            assert (await waiting).status_code == 502


async def test_idle_connections_are_closed(namespace: str) -> None:
    with Front(Target(namespace), idle_seconds=0.3, max_idle_per_sandbox=2) as front:
        async with upstream(namespace, answering(OK)) as up, httpx.AsyncClient() as client:
            await asyncio.gather(*[client.get(url(front, up.port)) for _ in range(8)])
            assert front.call(front.gateway.connection_count, "sandbox-1") <= 2
            await eventually(lambda: up.open == 0, "idle connections are closed")
            assert front.call(front.gateway.connection_count, "sandbox-1") == 0


async def test_events_of_an_exchange(front: Front, namespace: str) -> None:
    response = b"HTTP/1.1 201 Made\r\nContent-Type: application/json\r\nX-A: 1\r\nX-A: 2\r\nContent-Length: 2\r\n\r\n{}"
    async with upstream(namespace, answering(response)) as up, httpx.AsyncClient() as client:
        touches = front.target.touches
        await client.post(url(front, up.port, "/p%20q?x=%31"), json={"a": "é"})
        assert front.target.touches == touches + 1
    request, answer, chunk = front.target.events.recorded
    assert isinstance(request, IngressRequestEvent)
    assert (request.port, request.method, request.path, request.query) == (str(up.port), "POST", "/p%20q", "x=%31")
    assert json.loads(request.body or "") == {"a": "é"}
    assert request.headers is not None
    assert request.headers["Content-Type"] == "application/json"
    assert isinstance(answer, IngressResponseEvent)
    assert (answer.request_id, answer.status) == (1, 201)
    assert answer.headers == {"Content-Type": "application/json", "X-A": "1, 2", "Content-Length": "2"}
    assert chunk == IngressChunkEvent(request_id=1, body="{}")


async def test_a_slow_upload_is_recorded_before_it_ends(front: Front, namespace: str) -> None:
    async with upstream(namespace, answering(OK)) as up, connected(front) as (reader, writer):
        writer.write(f"POST /proxy/{up.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\nhalf".encode())
        await eventually(lambda: bool(front.target.events.recorded), "the request event")
        assert front.target.events.of(IngressRequestEvent)[0].body == "half"
        writer.write(b"done")
        assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)


async def test_expect_continue_waits_for_the_target(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Expect: 100-continue" in head
        if b"/refuse" in head:
            writer.write(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        if b"/consent" in head:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(4) == b"body"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    async with upstream(namespace, handle) as up:
        for path, word in (("consent", b"100"), ("silent", b"100"), ("refuse", b"417")):
            async with connected(front) as (reader, writer):
                writer.write(
                    f"POST /proxy/{up.port}/{path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                    "Content-Length: 4\r\n\r\n".encode()
                )
                first = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                assert first.startswith(b"HTTP/1.1 " + word)
                if word == b"100":
                    writer.write(b"body")
                    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).startswith(b"HTTP/1.1 200")


async def test_an_early_answer_to_an_unfinished_upload(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await reader.read()

    async with upstream(namespace, handle) as up, connected(front) as (reader, writer):
        writer.write(f"POST /proxy/{up.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nstart".encode())
        assert (await asyncio.wait_for(reader.readuntil(b"big"), 10)).startswith(b"HTTP/1.1 413")
        await eventually(lambda: up.open == 0, "the unfinished request's connection is closed", within_seconds=5)


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("PUT", 200), ("POST", 502)])
async def test_a_kept_connection_that_the_server_drops(front: Front, namespace: str, method: str, status: int) -> None:
    """The server closes instead of answering the second request: only an idempotent one may be sent again."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await read_request(reader)

    async with upstream(namespace, handle) as up, httpx.AsyncClient() as client:
        assert (await client.get(url(front, up.port))).status_code == 200
        answer = await client.request(method, url(front, up.port), content=b"x" if method != "GET" else None)
        assert answer.status_code == status
        assert up.connections == (2 if status == 200 else 1)
    assert len(front.target.events.of(IngressResponseEvent)) == 2


async def test_a_kept_connection_that_is_already_closed_costs_no_request(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)

    async with upstream(namespace, handle) as up, httpx.AsyncClient() as client:
        for _ in range(20):
            assert (await client.post(url(front, up.port), content=b"x")).status_code == 200
            await eventually(lambda: up.open == 0, "the server has closed")


async def test_ten_thousand_requests_leave_no_descriptor(namespace: str) -> None:
    with Front(Target(namespace)) as front:
        async with upstream(namespace, answering(OK)) as up:

            async def requests(count: int) -> None:
                async with connected(front) as (reader, writer):
                    for _ in range(count):
                        writer.write(f"GET /proxy/{up.port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                        await reader.readuntil(b"\r\n\r\nok")

            await requests(10)
            front.call(front.gateway.forget, "sandbox-1")
            await eventually(lambda: up.open == 0, "quiet")
            before = open_descriptors()
            await asyncio.gather(*[requests(1250) for _ in range(8)])
            assert up.connections <= 20
            front.call(front.gateway.forget, "sandbox-1")
            await eventually(lambda: open_descriptors() <= before, "all descriptors are closed")
