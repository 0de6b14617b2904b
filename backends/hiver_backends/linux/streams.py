"""Reading and writing pipes and terminals without reading ahead."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections.abc import AsyncIterator
from typing import Final

from hiverd.contracts.errors import NotFoundError
from hiverd.contracts.isolation import Stream

READ_BYTES: Final = 256 * 1024
_PIPE_BYTES: Final = 1024 * 1024


def output_pipe(owner: tuple[int, int]) -> tuple[int, int]:
    """A pipe (reader, writer) for a command's output.

    It is large, so that a command rarely waits for us, and it belongs to the sandbox's root, so that opening
    /dev/stdout inside works.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EBUSY}:  # beyond the host's pipe-max-size: the default does
            raise
    os.fchown(writer, *owner)
    return reader, writer


def input_pipe(owner: tuple[int, int]) -> tuple[int, int]:
    """A pipe (reader, writer) for a command's standard input."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    os.fchown(reader, *owner)
    return reader, writer


class Readers:
    """Descriptors of one command's output. Reads only what a consumer asks for."""

    def __init__(self, streams: dict[int, Stream]) -> None:
        self._open = streams
        self._waiter: asyncio.Future[None] | None = None

    async def pieces(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """Until every writer has closed its end, or `close` is called."""
        while self._open:
            idle = True
            for descriptor, stream in list(self._open.items()):
                data = self._read(descriptor)
                if data is None:
                    continue
                idle = False
                if data:
                    yield stream, data
            if idle and self._open:
                await self._wait()

    @property
    def ended(self) -> bool:
        """Whether all has been read to its end, or closed."""
        return not self._open

    def descriptors(self) -> list[int]:
        """Those still open."""
        return list(self._open)

    def close(self) -> None:
        """Idempotent; ends `pieces`."""
        for descriptor in list(self._open):
            self._drop(descriptor)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _read(self, descriptor: int) -> bytes | None:
        """None when there is nothing now; empty at the end."""
        if descriptor not in self._open:
            return None
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal whose last user has left
                raise
            data = b""
        if not data:
            self._drop(descriptor)
        return data

    def _drop(self, descriptor: int) -> None:
        del self._open[descriptor]
        if self._waiter is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        for descriptor in self._open:
            loop.add_reader(descriptor, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            for descriptor in self._open:
                loop.remove_reader(descriptor)


class Writer:
    """The writing end of a command's input."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._lock = asyncio.Lock()
        self._waiter: asyncio.Future[None] | None = None

    async def write(self, data: bytes) -> None:
        """Waits while the reader does not read. Raises `NotFoundError` once either end is closed."""
        async with self._lock:
            rest = memoryview(data)
            while rest:
                try:
                    rest = rest[os.write(self._checked(), rest) :]
                except BlockingIOError:
                    await self._wait()
                except OSError as error:
                    if error.errno not in {errno.EPIPE, errno.EIO, errno.EBADF}:
                        raise
                    self.close()
            self._checked()

    def close(self) -> None:
        """Idempotent; ends a waiting `write`."""
        if self._descriptor is None:
            return
        if self._waiter is not None:
            asyncio.get_running_loop().remove_writer(self._descriptor)
            _wake(self._waiter)
        os.close(self._descriptor)
        self._descriptor = None

    def _checked(self) -> int:
        if self._descriptor is None:
            raise NotFoundError("the command's standard input is closed")
        return self._descriptor

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        descriptor = self._checked()
        waiter = self._waiter = loop.create_future()
        loop.add_writer(descriptor, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if self._descriptor is not None:
                loop.remove_writer(descriptor)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
