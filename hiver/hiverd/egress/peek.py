"""Looking at the first bytes of an accepted connection without taking them, so that TLS can still start on it."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
from typing import Final

PEEK_BYTES: Final = 32 * 1024


class Peeker:
    """Peeks at one non-blocking socket that has no transport yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.data = b""
        self.blocked = False
        """No more can be seen although there is more: behind an urgent byte (tcp(7)), or beyond `PEEK_BYTES`."""

    async def more(self) -> bool:
        """Waits for more bytes than were seen; False if no more will come. Raises `OSError` for a broken connection."""
        # Without the mark the socket would be readable all the time, for the bytes that were seen already.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(self.data) + 1)
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._sock, _set, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(self._sock)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        try:
            seen = self._sock.recv(PEEK_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        grown = len(seen) > len(self.data)
        self.data = seen
        self.blocked = not grown and self._unread_bytes() > len(seen)
        return grown

    def _unread_bytes(self) -> int:
        """All that has arrived. Urgent bytes are counted where they stay in line, as ours do."""
        answer = fcntl.ioctl(self._sock, termios.FIONREAD, bytes(4))
        return int.from_bytes(answer, sys.byteorder)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
