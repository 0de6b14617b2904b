"""uvicorn's HTTP/1.1 with a way for large bodies past it (`hiverd.files.direct`).

A body that passes through uvicorn is copied three times in user space and held by the interpreter; at a gigabyte that
is most of the time. So a handler may take over a request body of known length, or the body of its response, as long as
the connection is a plain socket. Afterwards the connection goes on as if the server had read and written it itself.

Keeps to what uvicorn's classes have had for years (`cycle.body`, `cycle.more_body`, `flow`); tests hold it to that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import httptools
from litestar.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hiverd.files.direct import Incoming, Outgoing

EXTENSION: Final = "hiver.direct"
WORTHWHILE_BYTES: Final = 1 << 20
"""Smaller bodies pass through the server: taking over costs some system calls."""


class DirectProtocol(HttpToolsProtocol):
    """One connection. Offers a `Takeover` to every request in its scope's extensions."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._body_bytes_seen = 0
        self._skip_bytes = 0
        self._taken: Incoming | None = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._body_bytes_seen = 0

    def on_headers_complete(self) -> None:
        # A client may send its next request early, and then `self.cycle` is already that one's: so each keeps its own.
        cast("dict[str, Any]", self.scope)["extensions"] = {EXTENSION: Takeover(self)}
        super().on_headers_complete()
        takeover = takeover_of(cast("Scope", self.scope))
        if takeover is not None and self.cycle is not None and self.cycle.scope is self.scope:
            takeover.cycle = self.cycle

    def on_body(self, body: bytes) -> None:
        self._body_bytes_seen += len(body)
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        if self._taken is not None:  # somebody resumed the reading: what is body and what is not cannot be told now
            self._taken.cut()
            self.transport.abort()
            return
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(data))
            self._skip_bytes -= skipped
            data = data[skipped:]
            if not data:
                return
        super().data_received(data)

    def socket_fd(self) -> int | None:
        """The connection's socket; None if there is more than that between us and the peer."""
        if self.transport.is_closing() or self.transport.get_extra_info("sslcontext") is not None:
            return None
        sock = self.transport.get_extra_info("socket")
        return None if sock is None else cast("int", sock.fileno())

    def take_body(self, cycle: RequestResponseCycle, length: int) -> Incoming | None:
        """Stops reading and hands over what has been read of the body. None if that is not possible or worthwhile."""
        fd = self.socket_fd()
        remaining = length - self._body_bytes_seen
        if fd is None or remaining < WORTHWHILE_BYTES or cycle.disconnected or cycle is not self.cycle:
            return None
        self.flow.pause_reading()
        if cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        early = bytes(cycle.body)
        cycle.body = bytearray()
        self._taken = Incoming(fd, early, remaining)
        return self._taken

    def return_body(self, cycle: RequestResponseCycle, incoming: Incoming) -> None:
        """Goes on with whatever follows the body. The parser would wait for the rest of it, so a new one takes over."""
        self._taken = None
        if incoming.interrupted:
            self.transport.abort()
        if self.transport.is_closing():
            return
        self._skip_bytes = incoming.remaining
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        cycle.more_body = False
        cycle.message_event.set()
        self.flow.resume_reading()

    async def take_response(self, cycle: RequestResponseCycle) -> Outgoing | None:
        """When all that was written is with the kernel. None if that is not possible."""
        if self.socket_fd() is None or cycle.chunked_encoding is not False or cycle.scope["method"] == "HEAD":
            return None
        self.transport.set_write_buffer_limits(0)
        await self.flow.drain()
        self.transport.set_write_buffer_limits()
        fd = self.socket_fd()
        if fd is None or cycle.disconnected or self.transport.get_write_buffer_size():
            return None
        return Outgoing(fd)

    def return_response(self, cycle: RequestResponseCycle, outgoing: Outgoing) -> None:
        cycle.expected_content_length -= outgoing.sent
        if outgoing.interrupted:
            self.transport.abort()


class Takeover:
    """What a handler finds in its scope."""

    def __init__(self, protocol: DirectProtocol) -> None:
        self._protocol = protocol
        self.cycle: RequestResponseCycle
        """Of the request in whose scope this is."""

    @asynccontextmanager
    async def body(self, length: int) -> AsyncIterator[Incoming | None]:
        """The request's body, `length` bytes by its Content-Length. None: it has to be received as usual.

        What is not taken of it is skipped. Nothing may `receive` meanwhile.
        """
        incoming = self._protocol.take_body(self.cycle, length)
        try:
            yield incoming
        finally:
            if incoming is not None:
                incoming.close()
                self._protocol.return_body(self.cycle, incoming)

    @asynccontextmanager
    async def response(self) -> AsyncIterator[Outgoing | None]:
        """After `http.response.start` with a Content-Length: the way for the body. None: it has to be sent as usual.

        What was sent counts as part of the body, whose end is to be marked as usual.
        """
        outgoing = await self._protocol.take_response(self.cycle)
        try:
            yield outgoing
        finally:
            if outgoing is not None:
                outgoing.close()
                self._protocol.return_response(self.cycle, outgoing)


def takeover_of(scope: Scope) -> Takeover | None:
    """None with another server or protocol."""
    return cast("Takeover | None", cast("dict[str, Any]", scope).get("extensions", {}).get(EXTENSION))


def body_length(scope: Scope) -> int | None:
    """The length of a body that is framed by nothing but its length."""
    length: int | None = None
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value)
    return length
