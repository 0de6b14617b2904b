"""One stream of an HTTP/2 connection: what has come on it and was not taken yet, and the way to send on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes

from hiverd.http.framing import Headers

if TYPE_CHECKING:
    from hiverd.egress.http2_connection import Http2Connection


class StreamLostError(ConnectionResetError):
    """The stream was broken off, or its connection. The text is safe to show."""


class Http2Stream:
    """Made by its connection. One task reads, one sends; `close` when both are done."""

    def __init__(self, connection: Http2Connection, number: int) -> None:
        self.number = number
        self.trailers: Headers = []
        """What followed the body, once that has ended."""
        self.ended = False
        """The peer sends no more."""
        self.lost: str | None = None
        """Why nothing can be sent or received any more."""
        self.on_lost: Callable[[], None] | None = None
        """Called once when that happens."""
        self.sent_end = False
        self._connection = connection
        self._data = bytearray()
        self._held_bytes = 0
        self._taken_bytes = 0
        self._incoming = asyncio.Event()
        self.room = asyncio.Event()
        """Set when there may be room to send again."""

    @property
    def readable(self) -> bool:
        """`read` would not wait."""
        return bool(self._data) or self.ended or self.lost is not None

    @property
    def empty(self) -> bool:
        """All that has come was taken."""
        return not self._data

    async def read(self) -> bytes:
        """All that has come; empty at the end. The peer may send as much again once this is called the next time.

        Raises `StreamLostError`.
        """
        self._acknowledge()
        while not self._data:
            if self.ended:
                return b""
            if self.lost is not None:
                raise StreamLostError(self.lost)
            self._incoming.clear()
            await self._incoming.wait()
        data = bytes(self._data)
        self._data.clear()
        self._taken_bytes, self._held_bytes = self._held_bytes, 0
        return data

    def send_fields(self, fields: Headers, *, end: bool = False) -> None:
        """Queues a header list: head, interim head or trailers. Raises `StreamLostError`."""
        self._connection.send_fields(self, fields, end=end)

    async def send(self, data: bytes, *, end: bool = False) -> None:
        """Sends as the peer takes it. Raises `StreamLostError`."""
        await self._connection.send_data(self, data, end=end)

    async def flush(self) -> None:
        """Sends what is queued. Raises `OSError`."""
        await self._connection.flush()

    def reset(self, code: ErrorCodes, reason: str) -> None:
        """Breaks the stream off on both sides. Idempotent."""
        if self.lost is None:
            self._connection.reset(self.number, code)
            self.lose(reason)

    def close(self) -> None:
        """The exchange is over: what has not ended is broken off, what was not taken is dropped."""
        self.on_lost = None
        if not (self.ended and self.sent_end):
            # After a whole answer the rest of the request is merely not wanted (RFC 9113 8.1).
            answered = self.sent_end and not self._connection.client
            self.reset(ErrorCodes.NO_ERROR if answered else ErrorCodes.CANCEL, "it was given up")
        self._drop()
        self._connection.forget(self)

    # Called by the connection

    def receive(self, data: bytes, flow_bytes: int) -> None:
        """`flow_bytes` counts padding as well (RFC 9113 6.1)."""
        self._data += data
        self._held_bytes += flow_bytes
        self._incoming.set()

    def end(self) -> None:
        """The peer has ended its side."""
        self.ended = True
        self._incoming.set()

    def lose(self, reason: str) -> None:
        """Wakes whoever waits."""
        if self.lost is not None:
            return
        self.lost = reason
        if not self.ended:
            self._drop()
        self._incoming.set()
        self.room.set()
        tell, self.on_lost = self.on_lost, None
        if tell is not None:
            tell()

    def _drop(self) -> None:
        self._data.clear()
        self._taken_bytes += self._held_bytes
        self._held_bytes = 0
        self._acknowledge()

    def _acknowledge(self) -> None:
        taken, self._taken_bytes = self._taken_bytes, 0
        if taken:
            self._connection.acknowledge(self.number, taken)
