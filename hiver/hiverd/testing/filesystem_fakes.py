"""Test doubles of a file-system plug-in, named after how they behave. For tests of the core alone.

All hold their objects in memory.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from hiverd.contracts.filesystem import ABSENT, FileSystem, Info, VersionConflictError

PIECE_BYTES = 256 << 10


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


class FakeFileSystem(FileSystem):
    """Quick and correct. `objects` maps paths to bytes, to None (a directory) or to a str (where a link leads).

    `calls` counts the operations, `log` has them in order; `bytes_read` says how much was downloaded.
    """

    backend: ClassVar[str] = "fake"
    versioned: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config or {})
        self.objects: dict[str, bytes | str | None] = {}
        self.versions: dict[str, int] = {}
        self.times: dict[str, datetime] = {}
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[str, str]] = []
        self.bytes_read = 0
        self._count = 0

    # -- what tests do behind the core's back

    def put(self, path: str, content: bytes | str | None) -> None:
        """Makes or changes an object, as another user of the service."""
        self._make_parents(path)
        self._count += 1
        self.objects[path] = content
        self.versions[path] = self._count
        self.times[path] = datetime.fromtimestamp(1_700_000_000 + self._count, UTC)

    def drop(self, path: str) -> None:
        for other in [other for other in self.objects if other == path or other.startswith(path + "/")]:
            del self.objects[other]

    def files(self) -> dict[str, bytes]:
        return {path: content for path, content in self.objects.items() if isinstance(content, bytes)}

    # -- where others misbehave

    async def before(self, operation: str, path: str) -> None:
        """Awaited at the begin of each call: raise or wait here."""

    async def between(self, path: str, offset: int) -> None:
        """Awaited before each piece that is read."""

    async def after(self, operation: str, path: str) -> None:
        """Awaited when a call has had its effect, before it is answered."""

    # -- the contract

    async def _begin(self, operation: str, path: str) -> None:
        self.calls[operation] += 1
        self.log.append((operation, path))
        await self.before(operation, path)

    def _make_parents(self, path: str) -> None:
        parent = _parent(path)
        while parent != "/" and parent not in self.objects:
            self.objects[parent] = None
            self.times[parent] = datetime.fromtimestamp(1_700_000_000, UTC)
            parent = _parent(parent)

    def _info(self, path: str) -> Info:
        if path == "/":
            return Info(path, 0, datetime.fromtimestamp(1_700_000_000, UTC), True)
        if path not in self.objects:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        content = self.objects[path]
        if content is None:
            return Info(path, 0, self.times[path], True)
        if isinstance(content, str):
            return Info(path, 0, self.times[path], False, link_target=content)
        version = f"v{self.versions[path]}" if self.versioned else None
        return Info(path, len(content), self.times[path], False, version=version)

    async def stat(self, path: str) -> Info:
        await self._begin("stat", path)
        return self._info(path)

    async def list_directory(self, path: str) -> AsyncIterator[Info]:
        await self._begin("list", path)
        if not self._info(path).is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        found = [self._info(other) for other in self.objects if _parent(other) == path]
        await self.after("list", path)
        for info in found:
            yield info

    async def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        await self._begin("read", path)
        self._info(path)
        content = self.objects[path]
        if not isinstance(content, bytes):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        end = len(content) if size is None else min(len(content), offset + size)
        while offset < end:
            await self.between(path, offset)
            piece = content[offset : min(end, offset + PIECE_BYTES)]
            self.bytes_read += len(piece)
            offset += len(piece)
            yield piece

    async def write(self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None) -> Info:
        await self._begin("write", path)
        data = b"".join([piece async for piece in content])
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes instead of {size}")
        self._expect(path, expected_version)
        self.put(path, data)
        info = self._info(path)
        await self.after("write", path)
        return info

    def _expect(self, path: str, expected_version: str | None) -> None:
        if expected_version is None:
            return
        actual = (self._info(path).version or "directory") if path in self.objects else ABSENT
        if actual != expected_version:
            raise VersionConflictError(errno.ESTALE, f"is {actual}, not {expected_version}", path)

    async def make_directory(self, path: str) -> None:
        await self._begin("make_directory", path)
        self._make_parents(path + "/x")

    async def symlink(self, path: str, target: str) -> None:
        await self._begin("symlink", path)
        self.put(path, target)

    async def delete(self, path: str) -> None:
        await self._begin("delete", path)
        if any(other.startswith(path + "/") for other in self.objects):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self.objects.pop(path, None)
        await self.after("delete", path)

    async def move(self, source: str, target: str) -> None:
        await self._begin("move", source)
        self._info(source)
        self._make_parents(target)
        for path in [path for path in self.objects if path == source or path.startswith(source + "/")]:
            moved = target + path[len(source) :]
            self.objects[moved] = self.objects.pop(path)
            self.times[moved] = self.times.pop(path)
            if path in self.versions:
                self._count += 1
                del self.versions[path]
                self.versions[moved] = self._count
        await self.after("move", source)


class UnversionedFileSystem(FakeFileSystem):
    """Has sizes and times, but no versions, as the backend `external`."""

    versioned: ClassVar[bool] = False

    def _expect(self, path: str, expected_version: str | None) -> None:
        if expected_version not in {None, ABSENT}:
            raise ValueError("a condition that was never given out")
        super()._expect(path, expected_version)


class SlowFileSystem(FakeFileSystem):
    """Each call takes `latency_seconds`; listings come in pages, each of which takes as long."""

    def __init__(self, latency_seconds: float = 0.05, page: int = 1000) -> None:
        super().__init__()
        self.latency_seconds = latency_seconds
        self.page = page
        self.under_way = 0
        self.most_under_way = 0

    async def before(self, operation: str, path: str) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.latency_seconds)
        finally:
            self.under_way -= 1

    async def list_directory(self, path: str) -> AsyncIterator[Info]:
        count = 0
        async for info in super().list_directory(path):
            if count and count % self.page == 0:
                await asyncio.sleep(self.latency_seconds)
            count += 1
            yield info


class FailingFileSystem(FakeFileSystem):
    """Fails with `failures[operation]`, as often as that says; -1 is for ever."""

    def __init__(self, **failures: int) -> None:
        super().__init__()
        self.failures = failures
        self.error: Exception = OSError(errno.ECONNRESET, "the connection was cut")

    async def before(self, operation: str, path: str) -> None:
        left = self.failures.get(operation, 0)
        if left:
            self.failures[operation] = left - 1 if left > 0 else left
            raise self.error


class ForbiddenFileSystem(FailingFileSystem):
    """Refuses what it fails: the credentials have expired, say."""

    def __init__(self, **failures: int) -> None:
        super().__init__(**failures)
        self.error = PermissionError(errno.EACCES, "the token has expired")


class ForgetfulFileSystem(FakeFileSystem):
    """Writes, and then cuts the connection instead of answering, `count` times."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.count = count

    async def after(self, operation: str, path: str) -> None:
        if operation == "write" and self.count:
            self.count -= 1
            raise OSError(errno.ECONNRESET, "the connection was cut")


class TornFileSystem(FakeFileSystem):
    """Cuts the connection in mid-read, `count` times, behind `whole_bytes`."""

    def __init__(self, count: int = 1, whole_bytes: int = PIECE_BYTES) -> None:
        super().__init__()
        self.count = count
        self.whole_bytes = whole_bytes

    async def between(self, path: str, offset: int) -> None:
        if self.count and offset >= self.whole_bytes:
            self.count -= 1
            raise OSError(errno.ECONNRESET, "the connection was cut")


class StoppedFileSystem(FakeFileSystem):
    """Waits before the operations that `stopped` names, or behind those named `after-...`, until `go` is called."""

    def __init__(self, *stopped: str) -> None:
        super().__init__()
        self.stopped = set(stopped)
        self.waiting = 0
        self._changed = asyncio.Event()

    async def before(self, operation: str, path: str) -> None:
        while operation in self.stopped:
            self.waiting += 1
            try:
                await self._changed.wait()
            finally:
                self.waiting -= 1

    async def after(self, operation: str, path: str) -> None:
        await self.before(f"after-{operation}", path)

    def go(self, *operations: str) -> None:
        """On the loop's thread."""
        self.stopped -= set(operations or tuple(self.stopped))
        self._changed.set()
        self._changed = asyncio.Event()
