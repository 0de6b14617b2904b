"""A connection from a sandbox once it has been accepted or its TLS handshake is done."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

READ_BYTES: Final = 64 * 1024
HANDSHAKE_SECONDS: Final = 30.0


class Stream:
    """Bytes both ways, with pressure: `write` waits while the other side does not read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.unread = b""
        """Read already, and given back."""

    @classmethod
    async def over(cls, sock: socket.socket, context: ssl.SSLContext | None = None) -> Stream:
        """Takes the socket over; with a context as the server of a TLS handshake. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=READ_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_SECONDS if context is not None else None,
        )
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    @classmethod
    async def to(cls, sock: socket.socket, context: ssl.SSLContext | None = None, host: str | None = None) -> Stream:
        """The same for a socket that we connected; with a context as the client of a TLS handshake with `host`."""
        reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname=host, limit=READ_BYTES)
        return cls(reader, writer)

    async def read(self) -> bytes:
        """What has come, at least a byte; empty at the end. Raises `OSError`."""
        if self.unread:
            data, self.unread = self.unread, b""
            return data
        return await self.reader.read(READ_BYTES)

    async def write(self, data: bytes) -> None:
        """Raises `OSError`."""
        self.writer.write(data)
        await self.writer.drain()

    def end(self) -> None:
        """No more will be written; the other direction goes on where that is possible."""
        if self.writer.can_write_eof():
            self.writer.write_eof()

    def abort(self) -> None:
        """Closes at once."""
        self.writer.transport.abort()

    async def close(self, seconds: float = 5.0) -> None:
        """Closes when what was written is sent, or the time has passed."""
        try:
            async with asyncio.timeout(seconds):
                self.writer.close()
                await self.writer.wait_closed()
        except (OSError, TimeoutError):
            self.abort()


async def relay(one: Stream, other: Stream) -> None:
    """Bytes as they are, both ways, until both directions have ended or one side breaks off."""
    tasks = [asyncio.ensure_future(_pump(one, other)), asyncio.ensure_future(_pump(other, one))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: Stream, target: Stream) -> None:
    while data := await source.read():
        await target.write(data)
    target.end()
    if not target.writer.can_write_eof():  # TLS has no half-closed state in asyncio
        raise ConnectionAbortedError
