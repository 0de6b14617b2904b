"""A connection of a sandbox once its TLS handshake, if any, is done; or one that we made for it, to pass bytes on."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final, cast

from hiverd.http.connection import READ_BYTES, read_buffer
from hiverd.http.intake import Intake

HANDSHAKE_SECONDS: Final = 30.0
LINGER_SECONDS: Final = 10.0
"""How long what the other side still sends is taken and dropped, so that it gets to read the last answer."""
_QUIET_SECONDS: Final = 2.0
_FLUSH_SECONDS: Final = 300.0
"""How long a side may take nothing of what is left for it. Long, as the kernel's own buffers hide that it does."""
_SHUTDOWN_SECONDS: Final = 5.0
"""For the end of TLS."""


class Stream(asyncio.BufferedProtocol):
    """Bytes both ways, with pressure: `write` waits while the other side does not read. Use `over` or `to`."""

    def __init__(self, *, secure: bool) -> None:
        self.unread = b""
        """Read already, and given back."""
        self.on_gone: Callable[[], None] | None = None
        """Called once when the other side has closed or broken off, as soon as that is known."""
        self._secure = secure
        self._loop = asyncio.get_running_loop()
        self._buffer = read_buffer()
        self._transport: asyncio.Transport | None = None
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._intake: Intake | None = None
        self._eof = False
        self._lost = False
        self._reader: asyncio.Future[None] | None = None
        self._write_paused = False
        self._writers: list[asyncio.Future[None]] = []
        self._closed = self._loop.create_future()
        self._deadline: float | None = None
        self._watchdog: asyncio.TimerHandle | None = None

    @classmethod
    async def over(cls, sock: socket.socket, context: ssl.SSLContext | None = None) -> Stream:
        """Takes an accepted socket over; with a context as the server of a TLS handshake. Raises `OSError`."""
        stream = cls(secure=context is not None)
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: stream,
            sock,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_SECONDS if context is not None else None,
        )
        return stream

    @classmethod
    async def to(cls, sock: socket.socket, context: ssl.SSLContext | None = None, host: str | None = None) -> Stream:
        """The same for a socket that we connected; with a context as the client of a TLS handshake with `host`."""
        stream = cls(secure=context is not None)
        await asyncio.get_running_loop().create_connection(
            lambda: stream,
            sock=sock,
            ssl=context,
            server_hostname=host if context is not None else None,
            ssl_handshake_timeout=HANDSHAKE_SECONDS if context is not None else None,
        )
        return stream

    @property
    def gone(self) -> bool:
        """The other side sends no more: it has closed or broken off."""
        return self._eof or self._lost

    @property
    def half_closes(self) -> bool:
        """One direction can end before the other. TLS cannot, in asyncio."""
        return not self._secure

    @property
    def protocol(self) -> str | None:
        """What ALPN settled on (RFC 7301); None without."""
        tls = self._transport.get_extra_info("ssl_object") if self._transport is not None else None
        return cast("str | None", tls.selected_alpn_protocol()) if tls is not None else None

    async def read(self, seconds: float | None = None) -> bytes:
        """What has come, at least a byte; empty at the end. Raises `OSError`, and `TimeoutError` if nothing comes."""
        if self.unread:
            data, self.unread = self.unread, b""
            return data
        while not self._pieces:
            if self._eof:
                return b""
            if self._lost:
                raise ConnectionResetError("the connection was lost")
            await self._more(seconds)
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._resume()
        return data

    async def write(self, data: bytes) -> None:
        """Raises `OSError`."""
        if self._lost or self._transport is None:
            raise ConnectionResetError("the connection was lost")
        self._transport.write(data)
        if self._write_paused:
            await self._drain()

    def send(self, data: bytes) -> None:
        """As `write`, without waiting and without telling that the connection is lost; `drain` does both."""
        if self._transport is not None and not self._lost and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def full(self) -> bool:
        """The other side does not take what was written."""
        return self._write_paused

    async def drain(self) -> None:
        """Waits while it is full. Raises `OSError`."""
        await self._drain()

    def end(self) -> None:
        """No more will be written; the other direction goes on where that is possible."""
        if self._transport is not None and self.half_closes and not self._lost:
            self._transport.write_eof()

    def abort(self) -> None:
        """Closes at once. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """`abort`, so that the other side cannot take it for a usual end."""
        if self._transport is not None and not self._lost:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    async def linger(self) -> None:
        """Before `close`, where the other side may still be sending: closing on unread bytes would reset the
        connection, and the last answer with it (RFC 9112 9.6)."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                self.end()
                while await self.read(_QUIET_SECONDS):
                    pass
        except (OSError, TimeoutError):
            pass

    async def close(self, seconds: float | None = None) -> None:
        """Closes when what was written is sent, or is not taken any more; `seconds` is the longest that may take."""
        transport = self._transport
        if transport is None:
            return
        transport.close()
        if seconds is not None:
            if not await self._is_closed(seconds):
                self.abort()
            return
        left = transport.get_write_buffer_size()
        while not await self._is_closed(_FLUSH_SECONDS if left else _SHUTDOWN_SECONDS):
            before, left = left, transport.get_write_buffer_size()
            if left >= before:
                self.abort()

    async def _is_closed(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(self._closed)
        except TimeoutError:
            return False
        return True

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._intake = Intake(self._loop, self._transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._pieces.append(bytes(self._buffer[:nbytes]))
        self._held_bytes += nbytes
        if self._held_bytes >= READ_BYTES and self._intake is not None:
            self._intake.pause()
        self._wake()

    def eof_received(self) -> bool:
        self._eof = True
        self._wake()
        self._tell_gone()
        return self.half_closes

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._write_paused = False
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not self._closed.done():
            self._closed.set_result(None)
        self._wake()
        self._wake_writers()
        self._tell_gone()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake_writers()

    # Inner workings

    async def _more(self, seconds: float | None) -> None:
        self._reader = self._loop.create_future()
        if seconds is not None:
            self._deadline = self._loop.time() + seconds
            if self._watchdog is None or self._watchdog.when() > self._deadline:
                self._set_watchdog(self._deadline)
        try:
            await self._reader
        finally:
            self._reader = None
            self._deadline = None

    def _set_watchdog(self, when: float) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = self._loop.call_at(when, self._look_at_deadline)

    def _look_at_deadline(self) -> None:
        """One timer serves many waits: it is not moved for each, but looks again when it comes too early."""
        self._watchdog = None
        if self._deadline is None or self._reader is None or self._reader.done():
            return
        if self._deadline > self._loop.time():
            self._set_watchdog(self._deadline)
        else:
            self._reader.set_exception(TimeoutError())

    def _resume(self) -> None:
        self._held_bytes = 0
        if self._intake is not None and self._intake.paused and not self._lost:
            self._intake.resume()

    async def _drain(self) -> None:
        while self._write_paused:
            writer = self._loop.create_future()
            self._writers.append(writer)
            await writer
        if self._lost:
            raise ConnectionResetError("the connection was lost")

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_writers(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)

    def _tell_gone(self) -> None:
        tell, self.on_gone = self.on_gone, None
        if tell is not None:
            tell()
