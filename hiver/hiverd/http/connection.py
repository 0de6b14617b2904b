"""The client side of one HTTP/1.1 connection, over any asyncio transport: one exchange at a time, pressure both ways.

Used as: `begin` (writes the request), any number of `write`/`drain` for the body, `response`, `read` until it says that
there is no more, then `reusable` decides between the pool and `abort`. Nothing here sets a time-out: whoever waits can
end the wait from another task with `abort`.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Final, cast

from hiverd.http.framing import Headers, ProtocolError
from hiverd.http.intake import Intake
from hiverd.http.responses import ResponseHead, ResponseParser

READ_BYTES: Final = 64 * 1024
"""Taken from the peer at a time, and to be consumed before more is read: so a peer that sends what is costly to parse,
such as tiny chunks, holds the event loop for no longer than this much takes."""

_of_thread = threading.local()


def read_buffer() -> memoryview:
    """One for all connections of an event loop: it is filled and copied from within one call of the loop."""
    buffer: memoryview | None = getattr(_of_thread, "buffer", None)
    if buffer is None:
        buffer = _of_thread.buffer = memoryview(bytearray(READ_BYTES))
    return buffer


class UpstreamError(Exception):
    """The peer broke off, or broke the protocol. The text is safe to show."""

    def __init__(self, message: str, *, unanswered: bool = False) -> None:
        super().__init__(message)
        self.unanswered = unanswered
        """No byte of an answer had arrived, so an idempotent request may be sent again (RFC 9110 9.2.2)."""


class Connection(asyncio.BufferedProtocol):
    """One connection to one upstream."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, authority: bytes) -> None:
        """`sock` is the connected socket under the transport; `authority` is `host:port` for the Host field."""
        self.authority = authority
        self.reused = False
        self._loop = loop
        self._sock = sock
        self._transport: asyncio.Transport | None = None
        self._parser: ResponseParser | None = None
        self._pieces: list[bytes] = []
        self._buffer = read_buffer()
        self._unread_bytes = 0
        self._answered = False
        self._error: UpstreamError | None = None
        self._closed = False
        self._intake: Intake | None = None
        self._reader: asyncio.Future[None] | None = None
        self._write_paused = False
        self._writers: list[asyncio.Future[None]] = []
        self._raw = False

    # What the user of the connection calls

    @property
    def idle(self) -> bool:
        """Open, with no exchange under way."""
        return self._parser is None and not self._closed

    @property
    def complete(self) -> bool:
        """The whole response has arrived (not necessarily been read)."""
        return self._parser is None or self._parser.complete

    @property
    def ready(self) -> bool:
        """`read` would not wait."""
        return bool(self._pieces) or self.complete

    @property
    def has_final_head(self) -> bool:
        return self._parser is not None and self._parser.head is not None

    @property
    def trailers(self) -> Headers:
        """What followed the last chunk of the response."""
        return [] if self._parser is None else self._parser.trailers

    def begin(self, head: bytes, method: str, *, upgradable: bool = False) -> None:
        """Starts an exchange by writing the request head (and body, if at hand). Returns at once."""
        self._parser = ResponseParser(method, upgradable=upgradable)
        self._answered = False
        self._error = None
        self.write(head)

    def write(self, data: bytes) -> None:
        """Queues bytes of the request; ignored once the peer is gone, as `response` or `read` will tell."""
        if self._transport is not None and not self._closed:
            self._transport.write(data)

    @property
    def congested(self) -> bool:
        """`drain` would wait."""
        return self._write_paused and not self._closed

    async def drain(self) -> None:
        """Waits while the peer does not take what was written. Never raises for a lost peer."""
        while self._write_paused and not self._closed:
            writer = self._loop.create_future()
            self._writers.append(writer)
            await writer

    async def response(self) -> ResponseHead:
        """The final head. Raises `UpstreamError`."""
        parser = self._current()
        while parser.head is None:
            self._raise_if_broken()
            await self._wait_for_data()
        return parser.head

    async def continued(self) -> None:
        """Until `100 Continue` or a final head has come, or the exchange has failed. Never raises."""
        parser = self._current()
        while not (parser.continued or parser.head is not None or self._error is not None or self._closed):
            writer = self._loop.create_future()
            self._writers.append(writer)
            await writer

    async def read(self) -> tuple[bytes, bool]:
        """(bytes, whether more may come). Everything that has arrived, at least one byte unless it is the end.

        Raises `UpstreamError` if the body is cut short, after all bytes before that have been delivered.
        """
        parser = self._current()
        while not self._pieces and not parser.complete:
            self._raise_if_broken()
            await self._wait_for_data()
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._resume_reading()
        return data, not parser.complete

    def finish(self) -> bool:
        """Ends the exchange. True: the connection can carry another one. Otherwise it has been closed."""
        parser, self._parser = self._parser, None
        clean = (
            parser is not None
            and parser.complete
            and parser.head is not None
            and parser.head.keep_alive
            and not parser.excess
            and not self._write_paused
            and not self._raw
        )
        if not clean or self._closed:
            self.abort()
            return False
        return True

    def start_raw(self) -> None:
        """After 101: from now on `read` yields what arrives, as it is, until the peer closes."""
        parser = self._current()
        self._raw = True
        if parser.excess:
            self._pieces.append(parser.excess)
            parser.excess = b""
        parser.complete = False

    def stale(self) -> bool:
        """Whether the peer has closed, or spoken out of turn, even if the event loop has not noticed yet."""
        if self._closed:
            return True
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def abort(self, reason: str = "the connection was given up") -> None:
        """Closes at once; waiting calls raise. Idempotent."""
        self._fail(reason)
        self._closed = True
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def abort_for_client(self) -> None:
        """`abort`, when the one for whom the exchange was made has left."""
        self.abort("the client has left")

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._intake = Intake(self._loop, self._transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._buffer[:nbytes])
        parser = self._parser
        if parser is None or self._error is not None:
            self.abort("the upstream spoke out of turn")
            return
        self._answered = True
        if self._raw:
            body = data
        else:
            try:
                body = parser.feed(data)
            except ProtocolError as error:
                self.abort(str(error))
                return
        if body:
            self._pieces.append(body)
        self._unread_bytes += nbytes
        if (self._unread_bytes >= READ_BYTES or parser.excess) and self._intake is not None:
            self._intake.pause()
        self._wake()

    def eof_received(self) -> None:
        if self._parser is not None and self._error is None:
            if self._raw:
                self._parser.complete = True
            else:
                try:
                    self._parser.eof()
                except ProtocolError as error:
                    self._fail(str(error))
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the connection was lost")
        self._closed = True
        self._wake()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake_writers()

    # Inner workings

    def _current(self) -> ResponseParser:
        if self._parser is None:
            raise RuntimeError("no exchange has begun")
        return self._parser

    def _resume_reading(self) -> None:
        self._unread_bytes = 0
        if self._intake is not None and self._intake.paused and not self._closed:
            self._intake.resume()

    def _fail(self, reason: str) -> None:
        if self._error is None and self._parser is not None and not self._parser.complete:
            self._error = UpstreamError(reason, unanswered=not self._answered)

    def _raise_if_broken(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise UpstreamError("the connection was lost", unanswered=not self._answered)

    async def _wait_for_data(self) -> None:
        self._resume_reading()
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if self._writers:
            self._wake_writers()

    def _wake_writers(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)
