"""The backend as the folder calls it: each call is on record, and its errors are those that a workload gets."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final, Literal

from msgspec import Struct

from hiverd.contracts.filesystem import FileSystem, Info, VersionConflictError

Operation = Literal["list", "list-dir", "stat", "get", "put", "delete", "move"]
Kind = Literal["file", "directory", "link"]

_TELLING: Final = frozenset(
    {
        errno.ENOTEMPTY,
        errno.ENAMETOOLONG,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EINVAL,
        errno.EILSEQ,
        errno.EFBIG,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ESTALE,
    }
)
"""What a workload can do something about; everything else is EIO (PROTOCOL 6.4)."""


class SyncCall(Struct, frozen=True):
    """One call of the backend (PROTOCOL 7, `system.fs-sync-request` and `-response`): told before, and after."""

    number: int
    """The same before and after; from 1 on, per folder object."""
    operation: Operation
    path: str
    duration_seconds: float | None = None
    """None: this is the request."""
    error: str | None = None
    """Of the response. That something does not exist is none."""


class Remote(Struct, frozen=True):
    """What the backend says of one object, in the folder's own terms."""

    path: str
    kind: Kind
    size: int
    mtime_ns: int
    version: str
    """The backend's; where it has none, `~size.mtime`, which is weaker and cannot be a condition of a write."""
    target: str = ""

    @classmethod
    def of(cls, info: Info) -> Remote:
        mtime_ns = nanoseconds(info.mtime)
        if info.link_target is not None:
            return cls(info.path, "link", 0, mtime_ns, "", info.link_target)
        if info.is_dir:
            return cls(info.path, "directory", 0, mtime_ns, "")
        return cls(info.path, "file", info.size, mtime_ns, info.version or f"~{info.size}.{mtime_ns}")


def nanoseconds(moment: datetime) -> int:
    seconds = moment.replace(microsecond=0).timestamp()
    return (int(seconds) * 1_000_000 + moment.microsecond) * 1000


def is_condition(version: str) -> bool:
    """Whether the backend can compare it."""
    return not version.startswith("~")


def for_workload(error: Exception) -> OSError:
    """PROTOCOL 6.4: not found is ENOENT, forbidden EACCES, else EIO."""
    if isinstance(error, FileNotFoundError):
        number = errno.ENOENT
    elif isinstance(error, PermissionError):
        number = errno.EACCES
    elif isinstance(error, VersionConflictError):
        number = errno.ESTALE
    elif isinstance(error, OSError) and error.errno in _TELLING:
        number = error.errno
    else:
        number = errno.EIO
    return OSError(number, os.strerror(number))


def safe_text(error: BaseException) -> str:
    """For events and logs. An `OSError` of a plug-in names no credential by contract; a library's own error may."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, OSError):
        return (str(error) or type(error).__name__)[:300]
    return type(error).__name__


class RecordedBackend:
    """All calls are made on the event loop. Errors are the plug-in's own."""

    def __init__(self, plugin: FileSystem, record: Callable[[SyncCall], None]) -> None:
        self.plugin = plugin
        self._record = record
        self._number = 0

    @contextmanager
    def _recorded(self, operation: Operation, path: str) -> Iterator[None]:
        self._number += 1
        number = self._number
        started = time.monotonic()
        self._record(SyncCall(number, operation, path))
        error: str | None = None
        try:
            yield
        except FileNotFoundError:
            raise
        except GeneratorExit:  # the reader has enough
            raise
        except BaseException as failure:
            error = safe_text(failure)
            raise
        finally:
            self._record(SyncCall(number, operation, path, time.monotonic() - started, error))

    async def stat(self, path: str) -> Remote:
        with self._recorded("stat", path):
            return Remote.of(await self.plugin.stat(path))

    async def list_directory(self, path: str) -> AsyncIterator[Remote]:
        with self._recorded("list-dir", path):
            async for info in self.plugin.list_directory(path):
                yield Remote.of(info)

    async def read(self, path: str, offset: int, size: int | None) -> AsyncGenerator[bytes, None]:
        """To be closed by a reader that may stop early."""
        with self._recorded("get", path):
            pieces = self.plugin.read(path, offset, size)
            try:
                async for piece in pieces:
                    yield piece
            finally:
                if isinstance(pieces, AsyncGenerator):
                    await pieces.aclose()

    async def write(
        self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None
    ) -> Remote:
        with self._recorded("put", path):
            return Remote.of(await self.plugin.write(path, content, size=size, expected_version=expected_version))

    async def make_directory(self, path: str) -> None:
        with self._recorded("put", path):
            await self.plugin.make_directory(path)

    async def symlink(self, path: str, target: str) -> None:
        with self._recorded("put", path):
            await self.plugin.symlink(path, target)

    async def delete(self, path: str) -> None:
        with self._recorded("delete", path):
            await self.plugin.delete(path)

    async def move(self, source: str, target: str) -> None:
        with self._recorded("move", source):
            await self.plugin.move(source, target)
