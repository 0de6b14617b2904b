"""File contents between a file and a socket, moved by the kernel: `splice(2)` in, `sendfile(2)` out.

The socket is non-blocking, and waiting for it is the event loop's business: a slow peer holds no thread. A thread is
visited for as long as there is something to move, at most `VISIT_BYTES`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Literal, TypeVar

from hiverd.contracts.errors import InvalidError, UnavailableError
from hiverd.files.threads import Guarded

T = TypeVar("T")

VISIT_BYTES: Final = 16 << 20
_PIPE_BYTES: Final = 1 << 20
_F_SETPIPE_SZ: Final = 1031
_FLAGS: Final = 1 | 2  # SPLICE_F_MOVE, SPLICE_F_NONBLOCK

Progress = Literal["more", "blocked", "ended"]
Run = Callable[[Callable[[], Progress]], Awaitable[Progress]]


class Pipe:
    """Where spliced pages stay between socket and file."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        with suppress(OSError):  # above what an ordinary user may have
            fcntl.fcntl(self.write_fd, _F_SETPIPE_SZ, _PIPE_BYTES)

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


class Channel:
    """A second descriptor of a connection's socket, for as long as its bytes are ours to move."""

    def __init__(self, socket_fd: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = Guarded(socket.socket(fileno=os.dup(socket_fd)))
        self._number = self._socket.use(lambda sock: sock.fileno())
        self.interrupted = False
        """A thread may still be moving bytes: nobody can say what of the stream is left."""

    async def visit(self, run: Run, function: Callable[[int], Progress]) -> Progress:
        """Calls `function` with the socket, by `run`, which takes it to a thread."""
        self.interrupted = True
        try:
            progress = await run(lambda: self._socket.use(lambda sock: function(sock.fileno())))
        except asyncio.CancelledError:
            raise
        except BaseException:
            self.interrupted = False
            raise
        self.interrupted = False
        return progress

    async def readable(self) -> None:
        await self._ready(self._loop.add_reader, self._loop.remove_reader)

    async def writable(self) -> None:
        await self._ready(self._loop.add_writer, self._loop.remove_writer)

    async def _ready(self, add: Callable[..., object], remove: Callable[[int], object]) -> None:
        ready = self._loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        add(self._number, wake)
        try:
            await ready
        finally:
            remove(self._number)

    def cut(self) -> None:
        """Ends the connection for both descriptors: whoever waits for it sees its end."""
        with suppress(OSError):
            self._socket.use(lambda sock: sock.shutdown(socket.SHUT_RDWR))

    def close(self) -> None:
        """Closes the second descriptor, once no thread uses it. Idempotent."""
        self._socket.close()


class Incoming(Channel):
    """A request body of known length that is still in its socket, but for its beginning."""

    def __init__(self, socket_fd: int, early: bytes, remaining: int) -> None:
        super().__init__(socket_fd)
        self.early = early
        self.remaining = remaining
        """Bytes of the body that are still to be read from the socket."""

    def take(self, socket_fd: int, pipe: Pipe, file_fd: int) -> Progress:
        """Moves what is there into the file. Raises `InvalidError` when the peer has closed. Blocks for the file."""
        stop = max(0, self.remaining - VISIT_BYTES)
        while self.remaining > stop:
            try:
                count = os.splice(socket_fd, pipe.write_fd, min(self.remaining, _PIPE_BYTES), flags=_FLAGS)
            except BlockingIOError:
                return "blocked"
            except ConnectionError:
                count = 0
            if not count:
                raise InvalidError("the upload was cut short")
            self.remaining -= count
            _drain(pipe, file_fd, count)
        return "more" if self.remaining else "ended"


class Outgoing(Channel):
    """The socket of a response whose head is on its way and whose body is a part of a file."""

    def __init__(self, socket_fd: int) -> None:
        super().__init__(socket_fd)
        self.sent = 0
        """Bytes of the body that were sent."""

    def give(self, socket_fd: int, file_fd: int, position: int, count: int) -> Progress:
        """Sends what fits; "ended" if the file has less. Raises `UnavailableError` when the peer has left."""
        end = position + min(count, VISIT_BYTES)
        while position < end:
            try:
                moved = os.sendfile(socket_fd, file_fd, position, end - position)
            except BlockingIOError:
                return "blocked"
            except ConnectionError as error:
                raise UnavailableError("the client left") from error
            if not moved:
                return "ended"
            self.sent += moved
            position += moved
        return "more"


def _drain(pipe: Pipe, file_fd: int, count: int) -> None:
    """Writes what is in the pipe; by copying where the file system cannot splice."""
    while count:
        try:
            count -= os.splice(pipe.read_fd, file_fd, count)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            data = memoryview(os.read(pipe.read_fd, count))
            count -= len(data)
            while data:
                data = data[os.write(file_fd, data) :]
