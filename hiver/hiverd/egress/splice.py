"""Bytes that nobody reads, from socket to socket within the kernel (splice(2))."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from typing import Final, NamedTuple

PIPE_BYTES: Final = 1 << 20
_F_SETPIPE_SZ: Final = 1031  # fcntl has the name from Python 3.10 on, where the C library had it at build time
_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_MAX_FREE: Final = 16
_BULK_BYTES: Final = 64 * 1024
"""Of one move: after as much the flow is taken for one of many bytes, which go best in large moves."""
_GATHERED_BYTES: Final = 512 * 1024
_GATHER_SECONDS: Final = 0.002
"""How much later than it could the end of such a flow's burst may arrive."""
_CARRIED_BYTES: Final = 64 * 1024


class _Pipe(NamedTuple):
    reader: int
    writer: int

    @classmethod
    def make(cls) -> _Pipe:
        pipe = cls(*os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        with contextlib.suppress(OSError):  # over the limit of a user's pipes: the usual size does as well
            fcntl.fcntl(pipe.writer, _F_SETPIPE_SZ, PIPE_BYTES)
        return pipe

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Splicer:
    """Joins pairs of sockets. Pipes are shared: one is taken only while it holds bytes. One event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._free: list[_Pipe] = []

    async def join(self, one: socket.socket, other: socket.socket) -> None:
        """Both ways, until both directions have ended or one side breaks off. The sockets are non-blocking and stay the
        caller's; `socket.shutdown` on one of them ends this."""
        tasks = [
            asyncio.create_task(self._pump(one, other), name="egress-splice-up"),
            asyncio.create_task(self._pump(other, one), name="egress-splice-down"),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Frees the pipes that are not in use."""
        while self._free:
            self._free.pop().close()

    async def _pump(self, source: socket.socket, target: socket.socket) -> None:
        bulk = False
        while True:
            if not await self._readable(source, seconds=_GATHER_SECONDS if bulk else None):
                _wait_for(source, 1)
                bulk = False
                continue
            moved = await self._move(source, target)
            if not moved:
                break
            if (moved >= _BULK_BYTES) != bulk:
                bulk = not bulk
                _wait_for(source, _GATHERED_BYTES if bulk else 1)
        target.shutdown(socket.SHUT_WR)

    async def _move(self, source: socket.socket, target: socket.socket) -> int:
        """Moves what has come; how much that was, 0 at the end."""
        pipe = self._free.pop() if self._free else _Pipe.make()
        held = moved = 0
        try:
            try:
                held = moved = os.splice(source.fileno(), pipe.writer, PIPE_BYTES, flags=_FLAGS)
            except BlockingIOError:
                return await self._carry(source, target)
            while held:
                try:
                    held -= os.splice(pipe.reader, target.fileno(), held, flags=_FLAGS)
                except BlockingIOError:
                    await self._ready(self._loop.add_writer, self._loop.remove_writer, target)
        finally:
            if held or len(self._free) >= _MAX_FREE:
                pipe.close()
            else:
                self._free.append(pipe)
        return moved

    async def _carry(self, source: socket.socket, target: socket.socket) -> int:
        """The same for what makes a socket readable and is not spliced: urgent bytes (tcp(7)). Without this, one of
        them would keep the loop turning."""
        try:
            data = source.recv(_CARRIED_BYTES)
        except BlockingIOError:
            return 1  # nothing, and not the end
        if data:
            await self._loop.sock_sendall(target, data)
        return len(data)

    async def _readable(self, source: socket.socket, *, seconds: float | None) -> bool:
        """False if nothing has come in time."""
        if seconds is None:
            await self._ready(self._loop.add_reader, self._loop.remove_reader, source)
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._ready(self._loop.add_reader, self._loop.remove_reader, source)
        except TimeoutError:
            return False
        return True

    async def _ready(
        self, add: Callable[..., object], remove: Callable[[socket.socket], object], sock: socket.socket
    ) -> None:
        ready = self._loop.create_future()
        add(sock, _set, ready)
        try:
            await ready
        finally:
            if sock.fileno() >= 0:
                remove(sock)


def _wait_for(sock: socket.socket, count: int) -> None:
    """Lets the socket be readable only with so many bytes (socket(7), SO_RCVLOWAT), or at its end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
