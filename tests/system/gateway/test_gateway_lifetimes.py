"""How long exchanges and connections last: streams, early leavers, kept connections (PROTOCOL 3.13)."""

from __future__ import annotations

import asyncio
import json

import pytest

from hiverd.wire.events import IngressChunkEvent, IngressRequestEvent, IngressResponseEvent
from support.gateway import (
    Front,
    Target,
    answering,
    connected,
    eventually,
    open_descriptors,
    read_request,
    upstream,
    url,
)
from support.plain import plain_client

pytestmark = pytest.mark.system

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


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
        plain_client() as client,
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

    async with upstream(namespace, handle) as up, plain_client() as client:
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

    async with upstream(namespace, handle) as up, plain_client() as client:
        await asyncio.gather(*[client.get(url(front, up.port)) for _ in range(4)])
        hanging = asyncio.create_task(client.get(url(front, up.port, "/hang")))
        await hanging
        front.call(front.gateway.forget, "sandbox-1")
        await eventually(lambda: up.open == 0, "the upstream's connections are closed")
        assert (await client.get(url(front, up.port))).status_code == 200


async def test_forgetting_a_sandbox_ends_the_wait_for_its_servers(namespace: str) -> None:
    with Front(Target(namespace), refused_patience_seconds=600) as front:
        async with plain_client(timeout=20) as client:
            waiting = asyncio.create_task(client.get(url(front, 9)))
            await eventually(lambda: bool(front.target.events.recorded), "the request event")
            front.call(front.gateway.forget, "sandbox-1")
            assert (await waiting).status_code == 502


async def test_idle_connections_are_closed(namespace: str) -> None:
    with Front(Target(namespace), idle_seconds=0.3, max_idle_per_sandbox=2) as front:
        async with upstream(namespace, answering(OK)) as up, plain_client() as client:
            await asyncio.gather(*[client.get(url(front, up.port)) for _ in range(8)])
            assert front.call(front.gateway.connection_count, "sandbox-1") <= 2
            await eventually(lambda: up.open == 0, "idle connections are closed")
            assert front.call(front.gateway.connection_count, "sandbox-1") == 0


async def test_events_of_an_exchange(front: Front, namespace: str) -> None:
    response = b"HTTP/1.1 201 Made\r\nContent-Type: application/json\r\nX-A: 1\r\nX-A: 2\r\nContent-Length: 2\r\n\r\n{}"
    async with upstream(namespace, answering(response)) as up, plain_client() as client:
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

    async with upstream(namespace, handle) as up, plain_client() as client:
        assert (await client.get(url(front, up.port))).status_code == 200
        answer = await client.request(method, url(front, up.port), content=b"x" if method != "GET" else None)
        assert answer.status_code == status
        assert up.connections == (2 if status == 200 else 1)
    assert len(front.target.events.of(IngressResponseEvent)) == 2


async def test_a_kept_connection_that_is_already_closed_costs_no_request(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)

    async with upstream(namespace, handle) as up, plain_client() as client:
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
