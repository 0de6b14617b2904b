"""Reaching servers inside a sandbox (PROTOCOL 3.13). The servers listen on 127.0.0.1 only (PROTOCOL 0.13)."""

from __future__ import annotations

import asyncio
import json
from importlib import resources
from typing import Any

import httpx
import websockets

from contract.scenarios.context import Context, read_until
from contract.scenarios.registry import scenario

PORT = 8765
READY_SECONDS = 20.0


def proxy(context: Context, sandbox: Any, path: str) -> str:
    """The URL of a path behind the client's `proxy_url`, joined as this release documents it."""
    base = sandbox.proxy_url(PORT)
    assert base.endswith("/") == context.marks_its_creates
    return str(base) + (path.removeprefix("/") if base.endswith("/") else path)


async def with_server(context: Context) -> Any:
    """A sandbox in which `inner_server.py` listens."""
    sandbox = await context.create()
    source = resources.files("contract").joinpath("inner_server.py").read_text()
    await context.write(sandbox, "/workspace/inner_server.py", source)
    process = await sandbox.exec_stream(f"exec python3 -u /workspace/inner_server.py {PORT}")
    await read_until(process, "listening\n", seconds=READY_SECONDS)
    return sandbox


@scenario()
async def http_passes_through(context: Context) -> None:
    sandbox = await with_server(context)
    async with httpx.AsyncClient(timeout=10) as http:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            body = b"" if method == "GET" else b"a body \xff\x00"
            answer = await http.request(
                method, proxy(context, sandbox, "/echo/a%20b?x=1&y=%26"), content=body, headers={"x-mine": "yes"}
            )
            assert answer.status_code == 207
            assert answer.headers["x-inner"] == "present"
            seen = json.loads(answer.content)
            assert seen["method"] == method
            assert seen["path"] == "/echo/a%20b?x=1&y=%26"
            assert seen["body"] == body.hex()
            assert seen["headers"]["x-mine"] == "yes"
            assert seen["headers"]["host"] == f"127.0.0.1:{PORT}" or seen["headers"]["host"].endswith(f":{PORT}")
        head = await http.head(proxy(context, sandbox, "/echo/"))
        assert head.status_code == 207
        assert head.content == b""


@scenario()
async def the_root_is_reached_as_it_is(context: Context) -> None:
    sandbox = await with_server(context)
    async with httpx.AsyncClient(timeout=10) as http:
        answer = await http.get(sandbox.proxy_url(PORT))
    assert json.loads(answer.content)["path"] == "/"


@scenario()
async def redirects_are_the_callers(context: Context) -> None:
    sandbox = await with_server(context)
    async with httpx.AsyncClient(timeout=10) as http:
        answer = await http.get(proxy(context, sandbox, "/redirect"))
    assert answer.status_code == 302
    assert answer.headers["location"] == "/elsewhere"


@scenario()
async def events_arrive_one_by_one(context: Context) -> None:
    """The inner server sends the next event only after the last one was acknowledged through another request."""
    sandbox = await with_server(context)
    async with (
        httpx.AsyncClient(timeout=10) as http,
        http.stream("GET", proxy(context, sandbox, "/sse")) as answer,
    ):
        assert answer.headers["content-type"] == "text/event-stream"
        lines = answer.aiter_lines()
        for number in range(3):
            while not (line := await anext(lines)):
                pass
            assert line == f"data: {number}"
            await http.post(proxy(context, sandbox, "/more"))


@scenario()
async def large_bodies_stream_both_ways(context: Context) -> None:
    sandbox = await with_server(context)

    async def pieces() -> Any:
        for _ in range(64):
            yield b"z" * 262_144

    async with httpx.AsyncClient(timeout=30) as http:
        answer = await http.post(proxy(context, sandbox, "/mirror"), content=pieces())
    assert answer.content == b"z" * (64 * 262_144)


@scenario()
async def websockets_pass_through(context: Context) -> None:
    sandbox = await with_server(context)
    url = proxy(context, sandbox, "/ws").replace("http://", "ws://")
    async with websockets.connect(url, open_timeout=10, close_timeout=5) as socket:
        assert not socket.protocol.extensions
        for message in ("text grüße", b"\x00binary\xff", "y" * 200_000):
            await socket.send(message)
            assert await asyncio.wait_for(socket.recv(), 10) == message


@scenario()
async def proxied_requests_are_events(context: Context) -> None:
    sandbox = await with_server(context)
    async with context.events(sandbox) as log, httpx.AsyncClient(timeout=10) as http:
        await http.post(proxy(context, sandbox, "/echo/e?q=1"), content=b"told")
        request = await log.wait_for(lambda event: event.type == "ingress.request", what="ingress.request")
        response = await log.wait_for(
            lambda event: event.type == "ingress.response" and event.request_id == request.id, what="ingress.response"
        )
    assert (request.port, request.method, request.path, request.query) == (str(PORT), "POST", "/echo/e", "q=1")
    assert request.body == "told"
    assert response.status == 207


@scenario(waits=True)
async def a_server_that_comes_up_late_is_waited_for(context: Context) -> None:
    sandbox = await context.create()
    await sandbox.exec_stream(f"sleep 2; cd /usr; exec python3 -m http.server {PORT} --bind 127.0.0.1")
    async with httpx.AsyncClient(timeout=30) as http:
        answer = await http.get(proxy(context, sandbox, "/"))
    assert answer.status_code == 200
