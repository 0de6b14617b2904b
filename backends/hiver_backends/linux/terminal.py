"""The terminal of a sandbox's entrypoint, held by conmon so that it survives a restart of the server.

Output is read from conmon's log, which every chunk reaches at once: a slow viewer holds up nobody, and scrollback and
live output join without a gap. Input goes through conmon's attach socket, sizes through its control fifo.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from hiverd.contracts.errors import NotFoundError
from hiverd.contracts.isolation import Stream, Terminal

from . import logs, pids
from .children import UNKNOWN_EXIT
from .conmon import Monitor
from .inotify import Inotify

_PACKET_BYTES: Final = 4096
_LOOK_AGAIN_SECONDS: Final = 5.0
_FIFO_SECONDS: Final = 1.0
_HANDED_ON_SECONDS: Final = 0.05
"""conmon passes a size on to itself through a second pipe, of which nobody learns when it was read, and there too would
heed only the first of two."""


class EntryTerminal(Terminal):
    """`sandbox_ended` tells whether the whole sandbox is gone."""

    def __init__(
        self, sandbox_id: str, monitor: Monitor, inotify: Inotify, pool: Executor, sandbox_ended: Callable[[], bool]
    ) -> None:
        self._sandbox_id = sandbox_id
        self._monitor = monitor
        self._inotify = inotify
        self._pool = pool
        self._sandbox_ended = sandbox_ended
        self._position: str | None = None
        self._connection: socket.socket | None = None
        self._write_lock = asyncio.Lock()
        self._size: tuple[int, int] | None = None

    async def scrollback(self, max_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        newest, self._position = await loop.run_in_executor(self._pool, logs.tail_bytes, self._monitor.log, max_bytes)
        return newest

    async def output(self) -> AsyncIterator[bytes]:
        """From where the last `scrollback` ended, or else from now on."""
        if self._position is None:
            await self.scrollback(0)
        async for chunk in logs.follow(self._monitor.log, self._position, self._inotify, self._ended):
            yield chunk.data

    async def write(self, data: bytes) -> None:
        async with self._write_lock:
            for start in range(0, len(data), _PACKET_BYTES):
                await self._send(data[start : start + _PACKET_BYTES])

    async def resize(self, rows: int, cols: int) -> None:
        sizes = [(rows, cols)]
        if self._size == (rows, cols):
            # The kernel signals only a change; the workload is to repaint all the same.
            sizes.insert(0, (rows, cols + 1))
        self._size = (rows, cols)
        with contextlib.suppress(OSError):
            descriptor = os.open(self._monitor.control_fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                for number, size in enumerate(sizes):
                    if number:
                        await asyncio.sleep(_HANDED_ON_SECONDS)
                    os.write(descriptor, b"1 %d %d\n" % size)
                    await _until_read(descriptor)
            finally:
                os.close(descriptor)

    async def wait(self) -> int:
        try:
            watch = self._inotify.watch(self._monitor.exit_dir)
        except FileNotFoundError:
            return UNKNOWN_EXIT
        try:
            while not self._ended():
                await watch.wait(_LOOK_AGAIN_SECONDS)
        finally:
            watch.close()
        code = self._monitor.exit_code(self._sandbox_id)
        return UNKNOWN_EXIT if code is None else code

    def entrypoint_pid(self) -> int | None:
        """Not verified: the caller checks that it is in the sandbox before it signals."""
        try:
            return int(self._monitor.pid_file.read_text())
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Frees the connection; the terminal goes on."""
        if self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection)
            self._connection.close()
            self._connection = None

    def _ended(self) -> bool:
        if self._monitor.exit_code(self._sandbox_id) is not None or self._sandbox_ended():
            return True
        return not self._monitor.is_running(self._sandbox_id) and self._monitor.conmon_pid_file.exists()

    async def _send(self, packet: bytes) -> None:
        connection = self._connect()
        while True:
            try:
                connection.send(packet)
            except BlockingIOError:
                await pids.wait_writable(connection.fileno())
            except OSError as error:
                self.close()
                raise NotFoundError("the entrypoint's terminal is closed") from error
            else:
                return

    def _connect(self) -> socket.socket:
        if self._connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(str(self._monitor.attach_socket))
            except OSError as error:
                connection.close()
                raise NotFoundError("the entrypoint's terminal is closed") from error
            connection.setblocking(False)
            self._connection = connection
            # conmon sends all output here too and would wait for us; we have it from the log.
            asyncio.get_running_loop().add_reader(connection, self._discard)
        return self._connection

    def _discard(self) -> None:
        if self._connection is None:
            return
        try:
            data = self._connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()


async def _until_read(fifo: int) -> None:
    """Until conmon has taken what is in its fifo: of two lines at once it would heed only the first."""
    deadline_monotonic = time.monotonic() + _FIFO_SECONDS
    while time.monotonic() < deadline_monotonic:
        if not struct.unpack("i", fcntl.ioctl(fifo, termios.FIONREAD, b"\0" * 4))[0]:
            return
        await asyncio.sleep(0.001)


def record_failure(monitor: Monitor, sandbox_id: str, code: int, message: str, *, stream: Stream) -> None:
    """Leaves what a session that could not start would have left: its output and its exit code."""
    now = datetime.now(UTC).isoformat()
    text = message.rstrip("\n").replace("\n", " ")
    if stream == "stdout":
        text += "\r"
    with Path(monitor.log).open("a") as log:
        log.write(f"{now} {stream} F {text}\n")
    (monitor.exit_dir / sandbox_id).write_text(str(code))
