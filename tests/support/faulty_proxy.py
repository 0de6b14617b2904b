"""A proxy in front of an HTTP service on loopback that fails on demand: refusals, cuts, stalls, before or after the
service has done what it was asked.

It knows as much of HTTP/1.1 as is needed to tell requests apart; each connection carries one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, Final, Literal, Self, TypeVar

from hiverd.testing.filesystem import FailureKind, Faults

T = TypeVar("T")

_PIECE: Final = 1 << 16
_HEAD_BYTES: Final = 1 << 18

Kind = FailureKind | Literal["stall"]


class FaultyProxy(Faults):
    """Runs in a thread of its own, so that a blocked event loop of the test does not stop it."""

    def __init__(self, upstream_port: int, *, refusal: int = 403) -> None:
        """`refusal` is the status with which the service refuses credentials."""
        self._upstream_port = upstream_port
        self._refusal = refusal
        self._requests = 0
        self._kind: Kind = "500"
        self._left = 0
        self._revoked = False
        self._stopping = asyncio.Event()
        self._ready = threading.Event()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="faulty proxy", daemon=True)

    # -- what a test asks for -----------------------------------------------------------------------------------------

    @property
    def requests(self) -> int:
        return self._requests

    def fail(self, kind: Kind, count: int) -> None:
        self._kind, self._left = kind, count

    def revoke(self) -> None:
        self._revoked = True

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    # -- the proxy ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[Any]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._guarded(self._connection(reader, writer), writer), name="proxied request")
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=_HEAD_BYTES)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _guarded(self, work: Coroutine[Any, Any, None], writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await work
        finally:
            writer.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        self._requests += 1
        kind: Kind | None = None
        if self._left > 0:
            self._left -= 1
            kind = self._kind
        if kind == "cut":
            return
        if b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(head, reader)
        if kind == "stall":
            await asyncio.sleep(3600)
        elif self._revoked:
            await _refuse(writer, self._refusal)
        elif kind is not None and kind.isdigit():
            await _refuse(writer, int(kind))
        else:
            await self._forward(head, body, writer, kind)

    async def _forward(self, head: bytes, body: bytes, writer: asyncio.StreamWriter, kind: Kind | None) -> None:
        from_upstream, to_upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        try:
            to_upstream.write(_closing(head, body) + body)
            await to_upstream.drain()
            answer_head = await from_upstream.readuntil(b"\r\n\r\n")
            while b" 100 " in answer_head.split(b"\r\n", 1)[0]:
                answer_head = await from_upstream.readuntil(b"\r\n\r\n")
            if kind == "lost-answer":
                await from_upstream.read(-1)
                return
            writer.write(_without(answer_head, b"connection", b"keep-alive", add=b"Connection: close"))
            if kind == "short-body":
                answer = await from_upstream.read(-1)
                writer.write(answer[: len(answer) // 2])
                await writer.drain()
                return
            while piece := await from_upstream.read(_PIECE):
                writer.write(piece)
                await writer.drain()
        finally:
            to_upstream.close()


def _field(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return None


async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    """All of it, without the framing of chunks."""
    if (_field(head, b"transfer-encoding") or b"").lower() == b"chunked":
        chunks = bytearray()
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            chunks += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
        return bytes(chunks)
    return await reader.readexactly(int(_field(head, b"content-length") or 0))


def _closing(head: bytes, body: bytes) -> bytes:
    if _field(head, b"transfer-encoding") is not None:
        head = _without(head, b"transfer-encoding", add=b"Content-Length: %d" % len(body))
    return _without(head, b"connection", b"expect", add=b"Connection: close")


def _without(head: bytes, *names: bytes, add: bytes) -> bytes:
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in names]
    return b"\r\n".join([first, *kept, add, b"", b""])


async def _refuse(writer: asyncio.StreamWriter, status: int) -> None:
    reason = HTTPStatus(status).phrase.encode()
    writer.write(b"HTTP/1.1 %d %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % (status, reason))
    await writer.drain()
