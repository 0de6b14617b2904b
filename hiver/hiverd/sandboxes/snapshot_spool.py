"""An archive on this host's disk while it is not known to be whole. The file has no name: it goes with the process."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Final

from hiverd.contracts.errors import HiverError, UnavailableError
from hiverd.contracts.snapshot import closing

_HEAD_BYTES: Final = 8


class Spool:
    """Made by `spooled`. Its calls block and may come from any thread: one waits for the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._closed = False
        self.head = b""
        self.size = 0
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()

    def open(self) -> None:
        """Does nothing once closed: whoever is cancelled leaves a thread behind that only now gets here."""
        with self._lock:
            if not self._closed:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 -- closed by `close`

    @property
    def file(self) -> BinaryIO:
        if self._file is None:
            raise UnavailableError("the archive is not here any more")
        return self._file

    @property
    def sha256(self) -> str:
        """Of what was appended."""
        return self._digest.hexdigest()

    def append(self, piece: bytes) -> None:
        with self._lock:
            self.head += piece[: _HEAD_BYTES - len(self.head)]
            self.size += len(piece)
            self._digest.update(piece)
            self._write(piece)

    def finish(self, end: bytes = b"") -> None:
        """Writes what is no part of the content, and goes to the beginning."""
        with self._lock:
            self._write(end)
            self.file.seek(0)

    def read(self, size: int) -> bytes:
        """What comes next; nothing at the end."""
        with self._lock:
            return self.file.read(size)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()

    def _write(self, piece: bytes) -> None:
        left = memoryview(piece)
        while left:
            left = left[self.file.write(left) :]


@asynccontextmanager
async def spooled(folder: Path, content: AsyncIterator[bytes], max_bytes: int | None = None) -> AsyncIterator[Spool]:
    """All of `content`, which may raise. Raises `UnavailableError` where this host has no space for it, and
    `HiverError` if it is more than `max_bytes`."""
    spool = Spool(folder)
    try:
        try:
            await asyncio.to_thread(spool.open)
        except OSError as error:
            raise _no_room(error) from error
        await _fill(spool, content, max_bytes)
        yield spool
    finally:
        with suppress(OSError):
            await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(spool.close)))


async def _fill(spool: Spool, content: AsyncIterator[bytes], max_bytes: int | None) -> None:
    async with closing(content):
        async for piece in content:
            if max_bytes is not None and spool.size + len(piece) > max_bytes:
                raise HiverError(f"the archive has more than {max_bytes >> 20} MiB (snapshots.max_mib)")
            try:
                await asyncio.to_thread(spool.append, piece)
            except OSError as error:
                raise _no_room(error) from error


def _no_room(error: OSError) -> UnavailableError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return UnavailableError("this server's disk is full; the snapshots are as they were")
    return UnavailableError(f"this server's disk failed: {error.strerror or type(error).__name__}")
