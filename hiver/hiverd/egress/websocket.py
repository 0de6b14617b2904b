"""WebSockets pass as they are; their messages are read along the way, for the record (PROTOCOL 7, RFC 6455)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final, Literal

from hiverd.egress.recorder import Attempt
from hiverd.egress.stream import Stream
from hiverd.http.connection import Connection, UpstreamError

MAX_SHOWN_BYTES: Final = 64 * 1024

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_CONTROL: Final = {_PING: "[ping]", _PONG: "[pong]"}


async def relay_websocket(agent: Stream, upstream: Connection, attempt: Attempt) -> None:
    """Until one side ends. Raises nothing but cancellation."""
    tasks = [
        asyncio.create_task(_up(agent, upstream, Frames(attempt, "up")), name="egress-websocket-up"),
        asyncio.create_task(_down(agent, upstream, Frames(attempt, "down")), name="egress-websocket-down"),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _up(agent: Stream, upstream: Connection, frames: Frames) -> None:
    with contextlib.suppress(OSError):
        while data := await agent.read():
            frames.feed(data)
            upstream.write(data)
            await upstream.drain()


async def _down(agent: Stream, upstream: Connection, frames: Frames) -> None:
    with contextlib.suppress(OSError, UpstreamError):
        more = True
        while more:
            data, more = await upstream.read()
            frames.feed(data)
            await agent.write(data)


class Frames:
    """Reads one direction. What does not look like WebSocket is no longer read, and passes all the same."""

    def __init__(self, attempt: Attempt, label: Literal["up", "down"]) -> None:
        self._attempt = attempt
        self._label: Literal["up", "down"] = label
        self._head = b""
        self._opcode = _CONTINUATION
        self._final = False
        self._mask = b""
        self._left = 0
        self._size = 0
        self._payload = bytearray()
        self._message = bytearray()
        self._message_bytes = 0
        self._message_opcode = _CONTINUATION

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the direction."""
        while data:
            if self._left == 0:
                self._head += data[:1]
                data = data[1:]
                if not self._begin_frame():
                    continue
            else:
                taken = data[: self._left]
                if len(self._payload) < MAX_SHOWN_BYTES:
                    self._payload += taken
                self._left -= len(taken)
                data = data[len(taken) :]
            if self._left == 0:
                self._end_frame()

    def _begin_frame(self) -> bool:
        """True once the head of a frame is whole (RFC 6455 5.2)."""
        head = self._head
        if len(head) < 2:
            return False
        size, masked = head[1] & 0x7F, bool(head[1] & 0x80)
        extended = {126: 2, 127: 8}.get(size, 0)
        if len(head) < 2 + extended + (4 if masked else 0):
            return False
        self._left = self._size = int.from_bytes(head[2 : 2 + extended]) if extended else size
        self._mask = head[2 + extended :]
        self._opcode, self._final = head[0] & 0x0F, bool(head[0] & 0x80)
        self._head = b""
        return True

    def _end_frame(self) -> None:
        content = _unmasked(bytes(self._payload), self._mask)
        self._payload.clear()
        if self._opcode == _CLOSE:
            code = int.from_bytes(content[:2]) if len(content) >= 2 else 1005
            reason = content[2:].decode("utf-8", "replace")
            self._attempt.message(f"[close {code} {reason}]" if reason else f"[close {code}]", self._label)
        elif self._opcode in _CONTROL:
            self._attempt.message(_CONTROL[self._opcode], self._label)
        else:
            self._gather(content)

    def _gather(self, content: bytes) -> None:
        if self._opcode != _CONTINUATION:
            self._message_opcode = self._opcode
        self._message_bytes += self._size
        if len(self._message) <= MAX_SHOWN_BYTES:
            self._message += content
        if not self._final:
            return
        kind = "text" if self._message_opcode == _TEXT else "binary"
        shown = f"[{kind} {self._message_bytes} bytes]"
        if kind == "text" and self._message_bytes <= MAX_SHOWN_BYTES:
            shown = self._message.decode("utf-8", "replace")
        self._message.clear()
        self._message_bytes = 0
        self._attempt.message(shown, self._label)


def _unmasked(content: bytes, mask: bytes) -> bytes:
    if not mask:
        return content
    pattern = int.from_bytes((mask * (len(content) // 4 + 1))[: len(content)])
    return (int.from_bytes(content) ^ pattern).to_bytes(len(content))
