"""HTTP through the gateway: a real uvicorn, a real network namespace, real servers in it (PROTOCOL 3.13)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from hiverd.wire.events import IngressRequestEvent, IngressResponseEvent
from support.gateway import (
    Front,
    Target,
    answering,
    connected,
    eventually,
    raw_exchange,
    read_request,
    upstream,
    url,
)
from support.plain import plain_client

pytestmark = pytest.mark.system

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "REPORT"])
async def test_every_method(front: Front, namespace: str, method: str) -> None:
    seen: list[Any] = []
    async with upstream(namespace, answering(OK, seen=seen)) as up, plain_client() as client:
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
    async with upstream(namespace, answering(OK, seen=seen)) as up, plain_client() as client:
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
    async with upstream(namespace, answering(response)) as up, plain_client() as client:
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
    async with upstream(namespace, answering(response)) as up, plain_client() as client:
        for _ in range(3):
            answer = await client.get(url(front, up.port))
            assert (answer.status_code, answer.content) == (status, body)
        assert up.connections == 1


async def test_a_server_that_announces_its_close_is_not_asked_again(front: Front, namespace: str) -> None:
    response = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with upstream(namespace, answering(response)) as up, plain_client() as client:
        for count in (1, 2):
            assert (await client.get(url(front, up.port))).text == "ok"
            assert up.connections == count


async def test_a_body_that_ends_with_the_connection(front: Front, namespace: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.0 200 OK\n\nfirst ")
        await writer.drain()
        writer.write(b"second")

    async with upstream(namespace, handle) as up, plain_client() as client:
        for _ in range(2):
            assert (await client.get(url(front, up.port))).text == "first second"
        assert up.connections == 2


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "::"])
async def test_loopback_listeners_are_reached(front: Front, namespace: str, address: str) -> None:
    seen: list[Any] = []
    async with upstream(namespace, answering(OK, seen=seen), address=address) as up, plain_client() as client:
        assert (await client.get(url(front, up.port))).text == "ok"
        host = "[::1]" if ":" in address else "127.0.0.1"
        assert seen[0][1][0] == ("Host", f"{host}:{up.port}")


@pytest.mark.parametrize("port", ["0", "65536", "-1", "abc", "80a", "", "000080", "%38%30", "+80"])
async def test_invalid_ports(front: Front, port: str) -> None:
    async with plain_client() as client:
        answer = await client.get(url(front, port))
        assert answer.status_code == 400
        assert "port" in answer.json()["error"]
    assert front.target.events.recorded == []


@pytest.mark.parametrize("port", [1024, 1025, 1026, 1028])
async def test_reserved_ports(front: Front, port: int) -> None:
    async with plain_client() as client:
        answer = await client.get(url(front, port))
        assert answer.status_code == 403
        assert answer.json()["error"]


async def test_nothing_listens(front: Front) -> None:
    async with plain_client() as client:
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
        async with plain_client(timeout=30) as client:
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
        async with plain_client() as client:
            begin = time.monotonic()
            answer = await client.get(url(front, 80))
            assert answer.status_code == 502
            assert answer.json()["error"]
            assert time.monotonic() - begin < 5


async def test_the_hosts_loopback_is_never_dialled() -> None:
    """A workload without a namespace of its own must not turn 127.0.0.1 into this host."""
    with Front(Target(None)) as front:
        async with plain_client() as client:
            answer = await client.get(url(front, front.port))
            assert answer.status_code == 502
