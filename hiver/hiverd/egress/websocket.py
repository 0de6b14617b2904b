"""WebSockets pass as they are; their messages are read along the way, for the record (PROTOCOL 7, RFC 6455)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, Literal

from hiverd.egress.stream import Stream
from hiverd.http.connection import Connection, UpstreamError

MAX_SHOWN_BYTES: Final = 64 * 1024
NOT_READ: Final = "[not readable from here on]"
STEP_BYTES: Final = 4 * 1024
"""Read between two looks at whether the journal has room: even of empty frames these are few enough."""

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_CONTROL: Final = {_PING: "[ping]", _PONG: "[pong]"}
_KNOWN: Final = frozenset((_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG))
_RESERVED_BITS: Final = 0x70

Label = Literal["up", "down"]
Tell = Callable[[str, Label], None]


async def relay_websocket(agent: Stream, upstream: Connection, tell: Tell, room: Callable[[], Awaitable[None]]) -> None:
    """Until one side ends. `tell` gets each message; nothing is read while `room` waits. Raises only cancellation."""
    tasks = [
        asyncio.create_task(_up(agent, upstream, Frames(tell, "up"), room), name="egress-websocket-up"),
        asyncio.create_task(_down(agent, upstream, Frames(tell, "down"), room), name="egress-websocket-down"),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _up(agent: Stream, upstream: Connection, frames: Frames, room: Callable[[], Awaitable[None]]) -> None:
    with contextlib.suppress(OSError):
        while data := await agent.read():
            await _record(frames, data, room)
            upstream.write(data)
            await upstream.drain()


async def _down(agent: Stream, upstream: Connection, frames: Frames, room: Callable[[], Awaitable[None]]) -> None:
    with contextlib.suppress(OSError, UpstreamError):
        more = True
        while more:
            data, more = await upstream.read()
            await _record(frames, data, room)
            await agent.write(data)


async def _record(frames: Frames, data: bytes, room: Callable[[], Awaitable[None]]) -> None:
    for start in range(0, len(data), STEP_BYTES):
        await room()
        frames.feed(data[start : start + STEP_BYTES])


class Frames:
    """Reads one direction. What does not look like WebSocket is no longer read, and passes all the same."""

    def __init__(self, tell: Tell, label: Label) -> None:
        self._tell = tell
        self._label: Label = label
        self._lost = False
        self._head = b""
        self._opcode = _CONTINUATION
        self._final = False
        self._mask = b""
        self._left = 0
        self._size = 0
        self._payload = bytearray()
        self._message = bytearray()
        self._message_bytes = 0
        self._message_opcode: int | None = None

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the direction."""
        position = 0
        while position < len(data) and not self._lost:
            if self._left:
                taken = data[position : position + self._left]
                position += len(taken)
                self._left -= len(taken)
                self._payload += taken[: MAX_SHOWN_BYTES + 1 - len(self._payload)]
            else:
                wanted = _head_bytes(self._head + data[position : position + 2])
                taken = data[position : position + wanted - len(self._head)]
                position += len(taken)
                self._head += taken
                if len(self._head) < wanted or len(self._head) < _head_bytes(self._head):
                    continue
                self._begin_frame()
            if not self._left and not self._lost:
                self._end_frame()

    def _begin_frame(self) -> None:
        """The head of a frame is whole (RFC 6455 5.2)."""
        head, self._head = self._head, b""
        self._opcode, self._final = head[0] & 0x0F, bool(head[0] & 0x80)
        if head[0] & _RESERVED_BITS or self._opcode not in _KNOWN:
            self._lost = True
            self._tell(NOT_READ, self._label)
            return
        masked = bool(head[1] & 0x80)
        self._mask = head[-4:] if masked else b""
        extended = head[2 : -4 if masked else None]
        self._left = self._size = int.from_bytes(extended) if extended else head[1] & 0x7F

    def _end_frame(self) -> None:
        content = _unmasked(bytes(self._payload), self._mask)
        self._payload.clear()
        if self._opcode == _CLOSE:
            code = int.from_bytes(content[:2]) if len(content) >= 2 else 1005
            reason = content[2:].decode("utf-8", "replace")
            self._tell(f"[close {code} {reason}]" if reason else f"[close {code}]", self._label)
        elif self._opcode in _CONTROL:
            self._tell(_CONTROL[self._opcode], self._label)
        else:
            self._gather(content)

    def _gather(self, content: bytes) -> None:
        if self._opcode != _CONTINUATION:
            self._message_opcode = self._opcode
        self._message_bytes += self._size
        self._message += content[: MAX_SHOWN_BYTES + 1 - len(self._message)]
        if not self._final:
            return
        kind = "text" if self._message_opcode == _TEXT else "binary"
        shown = f"[{kind} {self._message_bytes} bytes]"
        if kind == "text" and self._message_bytes <= MAX_SHOWN_BYTES:
            shown = self._message.decode("utf-8", "replace")
        self._message.clear()
        self._message_bytes = 0
        self._tell(shown, self._label)


def _head_bytes(head: bytes) -> int:
    """The size of a frame's head, given the beginning of it; at least two bytes are needed to tell more than that."""
    if len(head) < 2:
        return 2
    return 2 + {126: 2, 127: 8}.get(head[1] & 0x7F, 0) + (4 if head[1] & 0x80 else 0)


def _unmasked(content: bytes, mask: bytes) -> bytes:
    if not mask:
        return content
    pattern = int.from_bytes((mask * (len(content) // 4 + 1))[: len(content)])
    return (int.from_bytes(content) ^ pattern).to_bytes(len(content))
