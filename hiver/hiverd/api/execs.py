"""Routes that run commands: exec, exec-stream, stdin (PROTOCOL 3.11, 3.12)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from json.encoder import encode_basestring_ascii
from typing import Final, TypeVar

from litestar import Controller, post
from litestar.params import FromPath
from litestar.status_codes import HTTP_200_OK, HTTP_204_NO_CONTENT
from litestar.types import ASGIApp, Receive, Scope, Send

from hiverd.api.bodies import judged
from hiverd.api.documents import describe, json_body
from hiverd.api.injected import AnyRequest, TheExecs, TheKeepalive, TheSandbox
from hiverd.api.streams import SSE_COMMENT, SSE_HEARTBEAT_SECONDS, EventStream, HeldJson
from hiverd.contracts.errors import InvalidError
from hiverd.contracts.isolation import Stream
from hiverd.sandboxes.execs import Command, Execs, RunningCommand, Utf8Pieces, command_of, shell_command
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.terminals import TerminalHub
from hiverd.wire.answers import ExecResult
from hiverd.wire.keys import check_exec_id
from hiverd.wire.requests import ExecRequest, StdinRequest, decode_exec, decode_stdin, parse_resize

T = TypeVar("T")

FRAME_CHARACTERS: Final = 5 << 10
"""Text per frame: escaped, a character becomes twelve at most, and a line stays below 64 KiB (PROTOCOL 2)."""


class ExecController(Controller):
    path = "/sandbox/{sandbox_ref:str}/v1/{key:str}"
    tags = ("commands",)

    @post(
        "/exec",
        status_code=HTTP_200_OK,
        summary="Run a command and collect its output",
        operation_class=json_body(ExecRequest),
        responses=describe(),
    )
    async def run(
        self, request: AnyRequest, sandbox: TheSandbox, execs: TheExecs, keepalive_seconds: TheKeepalive
    ) -> ASGIApp:
        """Takes as long as the command; leaving kills it with all that it started."""
        command = command_of(await judged(await request.body(), decode_exec))
        work = _nothing() if command is None else execs.run_buffered(sandbox, command)
        return HeldJson(
            work, cancel_on_disconnect=True, keepalive_seconds=keepalive_seconds, name=f"exec-{sandbox.key}"
        )

    @post(
        "/exec-stream/{exec_id:str}",
        status_code=HTTP_200_OK,
        summary="Run a command and stream its output, or attach to the entrypoint's terminal",
        operation_class=json_body(ExecRequest),
        responses=describe(),
    )
    async def stream(
        self,
        request: AnyRequest,
        sandbox: TheSandbox,
        exec_id: FromPath[str],
        execs: TheExecs,
    ) -> ASGIApp:
        """Server-sent events; `exit` is always the last. The command runs before the headers are sent."""
        check_exec_id(exec_id)
        decoded = await judged(await request.body(), decode_exec)
        command = command_of(decoded)
        if command is None and sandbox.terminal is not None:
            return EventStream(_attach(sandbox, exec_id, sandbox.terminal))
        if command is None:
            if not decoded.tty:
                raise InvalidError("the sandbox has no entrypoint tty to attach to", field="command")
            command = shell_command(decoded)
        return await _run(execs, sandbox, exec_id, command)

    @post(
        "/exec-stream/{exec_id:str}/stdin",
        status_code=HTTP_204_NO_CONTENT,
        summary="Write to a command's standard input, or resize its terminal",
        operation_class=json_body(StdinRequest),
        responses=describe({204: "Written"}),
    )
    async def stdin(
        self,
        request: AnyRequest,
        sandbox: TheSandbox,
        exec_id: FromPath[str],
        execs: TheExecs,
    ) -> None:
        data = (await judged(await request.body(), decode_stdin)).data
        await execs.write(sandbox, exec_id, data.encode("utf-8", "replace"), parse_resize(data))


async def _nothing() -> ExecResult:
    return ExecResult("", "", 0)


async def _run(execs: Execs, sandbox: Sandbox, exec_id: str, command: Command) -> ASGIApp:
    running = await execs.start(sandbox, exec_id, command, stdin=True)
    return _CommandStream(running, _frames(running, execs))


class _CommandStream(EventStream):
    """Ends the command with the answer, also if that is never begun."""

    def __init__(self, running: RunningCommand, frames: AsyncGenerator[bytes, None]) -> None:
        super().__init__(frames)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._running.close()


async def _frames(running: RunningCommand, execs: Execs) -> AsyncGenerator[bytes, None]:
    decoders: dict[Stream, Utf8Pieces] = {"stdout": Utf8Pieces(), "stderr": Utf8Pieces()}
    exit_code = 0
    async with aclosing(_with_heartbeat(running.pieces(execs.journal))) as pieces:
        async for piece in pieces:
            if piece is None:
                yield SSE_COMMENT
            elif isinstance(piece, int):
                exit_code = piece
            else:
                stream, data = piece
                yield _text_frames(stream, decoders[stream].feed(data))
    for stream, decoder in decoders.items():
        yield _text_frames(stream, decoder.feed(b"", final=True))
    yield _exit_frame(exit_code)


async def _attach(sandbox: Sandbox, exec_id: str, hub: TerminalHub) -> AsyncGenerator[bytes, None]:
    decoder = Utf8Pieces()
    sandbox.viewers.add(exec_id)
    try:
        async with aclosing(_with_heartbeat(hub.view())) as pieces:
            async for data in pieces:
                yield SSE_COMMENT if data is None else _text_frames("stdout", decoder.feed(data))
    finally:
        sandbox.viewers.discard(exec_id)
    yield _exit_frame(0)


async def _with_heartbeat(pieces: AsyncIterator[T]) -> AsyncGenerator[T | None, None]:
    """The same pieces, and None whenever there is none for a while."""
    step: asyncio.Future[T] | None = None
    try:
        while True:
            step = asyncio.ensure_future(anext(pieces))
            while not (await asyncio.wait({step}, timeout=SSE_HEARTBEAT_SECONDS))[0]:
                yield None
            try:
                yield step.result()
            except StopAsyncIteration:
                return
    finally:
        if step is not None and not step.done():
            step.cancel()
            await asyncio.wait({step})


def _text_frames(stream: Stream, text: str) -> bytes:
    name = stream.encode()
    head, tail = b'event: %s\ndata: {"text":' % name, b',"type":"%s"}\n\n' % name
    parts: list[bytes] = []
    for start in range(0, len(text), FRAME_CHARACTERS):
        escaped = encode_basestring_ascii(text[start : start + FRAME_CHARACTERS])
        parts += (head, escaped.encode("ascii"), tail)
    return b"".join(parts)


def _exit_frame(code: int) -> bytes:
    return b'event: exit\ndata: {"code":%d,"type":"exit"}\n\n' % code
