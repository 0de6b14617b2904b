"""ASGI answers that take their time: JSON that is held open, and event streams (PROTOCOL 0.7)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Final, Generic, TypeVar

import msgspec
from litestar.types import Receive, Scope, Send

from hiverd.api.errors import error_body
from hiverd.wire.sse import comment

log = logging.getLogger(__name__)

T = TypeVar("T")

PROMPT_SECONDS: Final = 1.0
"""An answer that is ready by then is sent as an ordinary response with its true status."""
SSE_HEARTBEAT_SECONDS: Final = 2.0
SSE_COMMENT: Final = comment("keep-alive")
JSON_TYPE: Final = b"application/json; charset=utf-8"

_open_streams: set[asyncio.Task[Any]] = set()


async def close_all_streams() -> None:
    """The server stops: ends every long answer, so that no open stream delays it."""
    for task in list(_open_streams):
        task.cancel()
    if _open_streams:
        await asyncio.wait(set(_open_streams), timeout=5.0)


class HeldJson(Generic[T]):
    """Answers with the JSON that `work` returns, however long it takes.

    The published client gives up after 3 s without a byte, and JSON may begin with white space: so after a second the
    headers go out with status 200, and a space every `keepalive_seconds` until the document is ready. An error after
    that moment can only be told in the body, as `{"error": ...}`. A caller who leaves cancels `work` if
    `cancel_on_disconnect`.
    """

    def __init__(
        self,
        work: Coroutine[Any, Any, T],
        *,
        encode: Callable[[T], bytes] = msgspec.json.encode,
        prompt_status: int = 200,
        cancel_on_disconnect: bool,
        keepalive_seconds: float,
        name: str,
    ) -> None:
        self._work = work
        self._encode = encode
        self._prompt_status = prompt_status
        self._cancel_on_disconnect = cancel_on_disconnect
        self._keepalive_seconds = keepalive_seconds
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.create_task(self._work, name=self._name)
        task.add_done_callback(_consume)
        try:
            await while_connected(receive, self._answer(task, send))
        finally:
            if self._cancel_on_disconnect and not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _answer(self, task: asyncio.Task[T], send: Send) -> None:
        await asyncio.wait({task}, timeout=PROMPT_SECONDS)
        if task.done():
            status, body = self._outcome(task)
            if status == 204:
                body = b""
            await _start(send, status, [] if status == 204 else [(b"content-type", JSON_TYPE)], len(body))
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        await _start(send, 200, [(b"content-type", JSON_TYPE)])
        while not task.done():
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.wait({task}, timeout=self._keepalive_seconds)
        await send({"type": "http.response.body", "body": self._outcome(task)[1], "more_body": False})

    def _outcome(self, task: asyncio.Task[T]) -> tuple[int, bytes]:
        if task.cancelled():
            return 503, b'{"error":"the request was cancelled because the server is stopping"}'
        error = task.exception()
        if error is None:
            return self._prompt_status, self._encode(task.result())
        if isinstance(error, Exception):
            return error_body(error)
        raise error


class EventStream:
    """Server-sent events from an async generator of ready frames. Headers go out at once.

    The generator itself yields comments when nothing happens; it is closed when the client leaves.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            headers = [
                (b"content-type", b"text/event-stream"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await _start(send, 200, headers)
            # A first comment: some clients and proxies see the headers only with the first byte of the body.
            await send({"type": "http.response.body", "body": comment(), "more_body": True})
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _start(send: Send, status: int, headers: list[tuple[bytes, bytes]], length: int | None = None) -> None:
    if length is not None and status != 204:
        headers = [*headers, (b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` until it is done or the client has left; then it is cancelled."""
    worker = asyncio.create_task(work, name="stream")
    watcher = asyncio.create_task(_disconnected(receive), name="disconnect-watcher")
    _open_streams.add(worker)
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        _open_streams.discard(worker)
        for task in (worker, watcher):
            task.cancel()
        await asyncio.wait({worker, watcher})
    if not worker.cancelled() and (error := worker.exception()) is not None:
        raise error


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _consume(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
