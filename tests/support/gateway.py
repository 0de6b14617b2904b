"""A gateway behind a real uvicorn in a thread of its own, a real network namespace, and upstreams inside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, Self, cast

import uvicorn

from hiverd.contracts.isolation import Workload
from hiverd.gateway import Gateway
from hiverd.netns import ThreadSocketFactory
from hiverd.wire.events import Event

_PROXY_PATH = re.compile(rb"/proxy/([^/]*)(.*)", re.DOTALL)


class RecordedEvents:
    """An `EventSink` that keeps everything; the id of an event is its place, from 1."""

    def __init__(self) -> None:
        self.unwanted: set[type[Event]] = set()
        self.recorded: list[Event] = []
        self.waits = 0
        """How often somebody asked for room."""

    def wants(self, event_type: type[Event]) -> bool:
        return event_type not in self.unwanted

    def emit(self, event: Event) -> int:
        self.recorded.append(event)
        return len(self.recorded)

    async def room(self) -> None:
        self.waits += 1

    def of(self, event_type: type[Any]) -> list[Any]:
        return [event for event in self.recorded if isinstance(event, event_type)]


class Target:
    """A `GatewayTarget` whose workload is nothing but a network namespace."""

    def __init__(self, namespace: str | None, addresses: tuple[str, ...] = ("127.0.0.1", "::1")) -> None:
        self.workload = cast(
            "Workload",
            SimpleNamespace(sandbox_id="sandbox-1", network_namespace=namespace, ingress_addresses=addresses),
        )
        self.events = RecordedEvents()
        self.touches = 0

    def touch(self) -> None:
        self.touches += 1


class Front:
    """uvicorn with a small router in front of a gateway: `/proxy/{port}/...`. Runs in a thread while entered."""

    def __init__(self, target: Target, **options: Any) -> None:
        self.target = target
        self.options = options
        self.gateway: Gateway
        self.loop_errors: list[str] = []
        self._loop: asyncio.AbstractEventLoop
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app,
                http="httptools",
                ws="wsproto",
                loop="uvloop",
                interface="asgi3",
                proxy_headers=False,
                lifespan="off",
                log_config=None,
                access_log=False,
                date_header=False,
                server_header=False,
                ws_ping_interval=None,
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._thread = threading.Thread(target=self._run, name="front")

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        match = _PROXY_PATH.fullmatch(scope["raw_path"])
        assert match is not None, scope["raw_path"]
        await self.gateway(scope, receive, send, self.target, match[1].decode(), match[2])

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._loop.set_exception_handler(lambda _, context: self.loop_errors.append(str(context)))
            self.gateway = Gateway(ThreadSocketFactory(), **self.options)
            await self._server.serve(sockets=[self._listener])
            await self.gateway.close()

        import uvloop

        uvloop.run(serve())

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function on the front's own loop and returns its result."""

        async def run() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline, "uvicorn does not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(15)
        self._listener.close()
        assert not self._thread.is_alive()
        assert not self.loop_errors, self.loop_errors


@contextlib.contextmanager
def network_namespace() -> Iterator[str]:
    """The nsfs path of a new network namespace with its loopback up.

    Not by `ip netns`: its first use on a machine makes a mount of its folder, which nothing removes.
    """
    with tempfile.NamedTemporaryFile(prefix="hiver-netns-") as handle:
        subprocess.run(["unshare", f"--net={handle.name}", "ip", "link", "set", "lo", "up"], check=True)
        try:
            yield handle.name
        finally:
            subprocess.run(["umount", handle.name], check=True)


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Upstream:
    """A server in a namespace that treats each connection with a handler, and counts connections."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connections = 0
        self.open = 0


@contextlib.asynccontextmanager
async def upstream(
    namespace: str, handler: Handler, *, address: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Upstream]:
    """Runs `handler` for each connection to a new listener inside the namespace."""
    listener = await ThreadSocketFactory().listen_tcp(namespace, address, port)
    state = Upstream(listener.getsockname()[1])
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        state.connections += 1
        state.open += 1
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            state.open -= 1
            tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, sock=listener)
    try:
        yield state
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tuple(tasks), timeout=5)


async def read_request(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]], bytes]:
    """(request line, header fields, body), the body de-chunked. Raises IncompleteReadError at the end of the stream."""
    head = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
    fields = [(name, value) for name, _, value in (line.partition(": ") for line in head[1:])]
    lower = {name.lower(): value for name, value in fields}
    if lower.get("transfer-encoding") == "chunked":
        body = b""
        while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
        return head[0], fields, body
    return head[0], fields, await reader.readexactly(int(lower.get("content-length", "0")))


def answering(response: bytes, *, seen: list[Any] | None = None) -> Handler:
    """A handler that answers every request with the same bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read_request(reader)
            if seen is not None:
                seen.append(request)
            writer.write(response)
            await writer.drain()

    return handle


async def eventually(condition: Callable[[], bool], what: str, *, within_seconds: float = 10.0) -> None:
    """Waits until the condition holds; fails the test if it does not in time."""
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.01)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


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
