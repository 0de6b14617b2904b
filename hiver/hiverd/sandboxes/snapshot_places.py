"""Where a snapshot in a mount lies: a folder of this host that hostile code may write to, or a backend's service.

Both have the few operations that a store needs. All raise `OSError` with a number.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeVar

from hiverd.contracts.filesystem import FileSystem
from hiverd.files import linux

T = TypeVar("T")

BLOCK_BYTES: Final = 1 << 20
_DRAFT: Final = ".hiver-snapshot-"
_ENTRIES_MAX: Final = 10_000
"""A folder that hostile code fills is not looked through to its end."""
_RESOLVE: Final = (
    linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV
)


class Content(Protocol):
    """What is to be written, from its beginning on; thread-safe."""

    def read(self, size: int, /) -> bytes: ...


class Place(Protocol):
    """Files right below the root of a mount."""

    async def names(self) -> list[str]: ...

    async def look(self, name: str) -> tuple[int, datetime]:
        """(bytes, time of change) of a regular file. `FileNotFoundError` for everything else."""
        ...

    def read(self, name: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        """`size` None: to the end. All of it is of one and the same file, or it is an error."""
        ...

    async def write(self, name: str, content: Content, size: int) -> None:
        """Replaces the file as a whole; durable when it returns."""
        ...

    async def remove(self, name: str) -> None:
        """A missing one is a success."""
        ...


async def acquired(opening: Coroutine[Any, Any, BinaryIO]) -> BinaryIO:
    """A file that a thread opens. It is closed if the caller was cancelled before it came."""
    task = asyncio.ensure_future(opening)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda done: done.cancelled() or done.exception() or done.result().close())
        raise


class RemotePlace:
    """A backend's plug-in, opened. Its `write` is whole or nothing, and the service has it when it returns."""

    def __init__(self, files: FileSystem) -> None:
        self._files = files

    async def names(self) -> list[str]:
        entries = self._files.list_directory("/")
        return [info.path.lstrip("/") async for info in entries if not info.is_dir and info.link_target is None]

    async def look(self, name: str) -> tuple[int, datetime]:
        info = await self._files.stat(f"/{name}")
        if info.is_dir or info.link_target is not None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return info.size, info.mtime

    def read(self, name: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        return self._files.read(f"/{name}", offset, size)

    async def write(self, name: str, content: Content, size: int) -> None:
        await self._files.write(f"/{name}", _pieces_of(content), size=size, expected_version=None)

    async def remove(self, name: str) -> None:
        await self._files.delete(f"/{name}")


async def _pieces_of(content: Content) -> AsyncIterator[bytes]:
    while block := await asyncio.to_thread(content.read, BLOCK_BYTES):
        yield block


class FolderPlace:
    """A folder of this host. The folder itself cannot be swapped, what is in it can, at any moment: so every name is
    resolved by the kernel, below the folder, without links, and only regular files are touched."""

    def __init__(self, folder: Path, threads: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._threads = threads

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def names(self) -> list[str]:
        return await self._run(self._names)

    async def look(self, name: str) -> tuple[int, datetime]:
        def blocking() -> tuple[int, datetime]:
            with self._root() as root, _regular(root, name) as fd:
                found = os.fstat(fd)
            return found.st_size, datetime.fromtimestamp(found.st_mtime, UTC)

        return await self._run(blocking)

    async def read(self, name: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        def opened() -> BinaryIO:
            with self._root() as root, _regular(root, name) as fd:
                file = open(os.dup(fd), "rb", buffering=0)  # noqa: SIM115 -- closed by the reader
            file.seek(offset)
            return file

        file, lock = await acquired(self._run(opened)), threading.Lock()

        def block_of() -> bytes:
            with lock:
                return file.read(BLOCK_BYTES)

        def close() -> None:
            with lock:  # whoever is cancelled leaves a thread behind that still reads
                file.close()

        try:
            left = sys.maxsize if size is None else size
            while left > 0 and (block := await self._run(block_of)):
                yield block[:left]
                left -= len(block)
        finally:
            await asyncio.shield(asyncio.ensure_future(self._run(close)))

    async def write(self, name: str, content: Content, size: int) -> None:
        await self._run(lambda: self._write(name, content))

    async def remove(self, name: str) -> None:
        def blocking() -> None:
            with self._root() as root:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=root)
                os.fsync(root)

        await self._run(blocking)

    # -- what blocks --------------------------------------------------------------------------------------------------

    @contextmanager
    def _root(self) -> Iterator[int]:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def _names(self) -> list[str]:
        with self._root() as root:
            return _entries(root)

    def _write(self, name: str, content: Content) -> None:
        with self._root() as root:
            for entry in _entries(root):
                if entry.startswith(_DRAFT):
                    _remove_if_dead(root, entry)
            draft = f"{_DRAFT}{secrets.token_hex(8)}"
            fd = linux.openat2(root, draft.encode(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, _RESOLVE, 0o600)
            try:
                with suppress(OSError):  # who is quicker to lock it keeps it from being swept, and no more
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                while block := content.read(BLOCK_BYTES):
                    left = memoryview(block)
                    while left:
                        left = left[os.write(fd, left) :]
                os.fsync(fd)
                os.rename(draft, name, src_dir_fd=root, dst_dir_fd=root)
                os.fsync(root)
            except BaseException:
                with suppress(OSError):
                    os.unlink(draft, dir_fd=root)
                raise
            finally:
                os.close(fd)


def _entries(root: int) -> list[str]:
    names = []
    with os.scandir(root) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) >= _ENTRIES_MAX:
                break
    return names


@contextmanager
def _regular(root: int, name: str) -> Iterator[int]:
    """O_NONBLOCK: a FIFO or a lease must not hold us."""
    try:
        fd = linux.openat2(root, os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, _RESOLVE)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EXDEV, errno.ENXIO}:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        yield fd
    finally:
        os.close(fd)


def _remove_if_dead(root: int, name: str) -> None:
    """A draft that nobody holds locked is a dead writer's. So is whatever else bears such a name."""
    with suppress(OSError), _regular(root, name) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=root)
