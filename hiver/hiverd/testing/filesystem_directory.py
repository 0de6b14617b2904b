"""A file-system plug-in whose service is a folder that several processes share: for tests that kill some of them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote

from hiverd.contracts.filesystem import ABSENT, FileSystem, Info, VersionConflictError


class DirectoryFileSystem(FileSystem):
    """Objects are files of a folder, flat, each replaced as a whole: they stay when the process is killed.

    For crash tests: files and directories only, no moves of directories, one writer at a time.
    """

    backend: ClassVar[str] = "directory"

    def __init__(self, folder: Path, latency_seconds: float = 0.0) -> None:
        super().__init__({})
        self.folder = folder
        self.latency_seconds = latency_seconds
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, path: str) -> Path:
        return self.folder / quote(path, safe="", errors="surrogateescape")

    def files(self) -> dict[str, bytes]:
        return {
            unquote(file.name, errors="surrogateescape"): file.read_bytes()
            for file in self.folder.iterdir()
            if not file.name.startswith(".")
        }

    async def stat(self, path: str) -> Info:
        await asyncio.sleep(self.latency_seconds)
        if path == "/":
            return Info(path, 0, datetime.fromtimestamp(0, UTC), True)
        return self._info(path)

    def _info(self, path: str) -> Info:
        file = self._file(path)
        content = file.read_bytes()
        moment = datetime.fromtimestamp(int(file.stat().st_mtime), UTC)
        return Info(path, len(content), moment, False, version=hashlib.sha256(content).hexdigest())

    async def list_directory(self, path: str) -> AsyncIterator[Info]:
        await asyncio.sleep(self.latency_seconds)
        for other in self.files():
            if (other.rpartition("/")[0] or "/") == path:
                yield self._info(other)

    async def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        await asyncio.sleep(self.latency_seconds)
        content = self._file(path).read_bytes()
        yield content[offset:] if size is None else content[offset : offset + size]

    async def write(self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None) -> Info:
        await asyncio.sleep(self.latency_seconds)
        data = b"".join([piece async for piece in content])
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes instead of {size}")
        file = self._file(path)
        if expected_version is not None:
            actual = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ABSENT
            if actual != expected_version:
                raise VersionConflictError(errno.ESTALE, "another version", path)
        scratch = self.folder / f".{os.getpid()}.{time.monotonic_ns()}"
        scratch.write_bytes(data)
        scratch.rename(file)
        await asyncio.sleep(self.latency_seconds)
        return self._info(path)

    async def make_directory(self, path: str) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), path)

    async def symlink(self, path: str, target: str) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), path)

    async def delete(self, path: str) -> None:
        await asyncio.sleep(self.latency_seconds)
        self._file(path).unlink(missing_ok=True)

    async def move(self, source: str, target: str) -> None:
        await asyncio.sleep(self.latency_seconds)
        self._file(source).rename(self._file(target))
