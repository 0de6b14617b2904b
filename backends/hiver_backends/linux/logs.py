"""conmon's `k8s-file` logs: one record per line, `<time> <stream> <P|F> <bytes>`, bounded by rotation.

`F` ends with a newline that the program wrote, `P` does not. Rotation replaces the file, so a position names the file
by the time of its first record, together with an offset.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, NamedTuple, cast

from hiverd.contracts.isolation import LogChunk, Stream

from .inotify import Inotify

_READ_BYTES: Final = 256 * 1024
_LOOK_AGAIN_SECONDS: Final = 5.0


class Record(NamedTuple):
    """Output of one stream, joined from neighbouring log records."""

    stream: Stream
    data: bytes
    end: int
    """Where the record ends in the log, relative to the parsed text."""


def parse(text: bytes) -> tuple[list[Record], int]:
    """Complete records at the start of `text`, neighbours of one stream joined, and how many bytes they take."""
    groups: list[tuple[Stream, list[bytes], int]] = []
    end = 0
    for line in text.split(b"\n")[:-1]:
        end += len(line) + 1
        parts = line.split(b" ", 3)
        if len(parts) != 4 or parts[1] not in {b"stdout", b"stderr"}:
            continue
        stream = cast("Stream", parts[1].decode())
        data = parts[3] + b"\n" if parts[2].startswith(b"F") else parts[3]
        pieces = groups.pop()[1] if groups and groups[-1][0] == stream else []
        pieces.append(data)
        groups.append((stream, pieces, end))
    return [Record(stream, b"".join(pieces), stop) for stream, pieces, stop in groups], end


class LogReader:
    """Reads one log from a position on, across rotations. Synchronous; never blocks on anything but the disk."""

    def __init__(self, path: Path, position: str | None) -> None:
        self._path = path
        self._file: int | None = None
        self._identity = ""
        self._offset = 0
        self._wanted = position

    @property
    def position(self) -> str:
        """Behind everything read so far."""
        return f"{self._identity}@{self._offset}"

    def read(self) -> list[LogChunk]:
        """What is new; empty when there is nothing new yet."""
        while True:
            if self._file is None and not self._open():
                return []
            records = self._read_file()
            if records:
                return records
            if not self._rotated():
                return []
            self.close()
            self._offset, self._identity = 0, ""

    def seek_to_end(self) -> None:
        """Skips what is there; complete records only, so nothing is cut."""
        while self.read():
            pass

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> bool:
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        if self._wanted is not None:
            identity, _, offset = self._wanted.rpartition("@")
            self._wanted = None
            if identity and identity == self._first_record_time() and offset.isdecimal():
                self._identity, self._offset = identity, int(offset)
        return True

    def _first_record_time(self) -> str:
        assert self._file is not None  # noqa: S101 -- callers have opened it
        return os.pread(self._file, 64, 0).split(b" ", 1)[0].decode("ascii", "replace")

    def _read_file(self) -> list[LogChunk]:
        assert self._file is not None  # noqa: S101 -- callers have opened it
        size = _READ_BYTES
        while text := os.pread(self._file, size, self._offset):
            if not self._identity:
                self._identity = self._first_record_time()
            start = self._offset
            records, length = parse(text)
            self._offset += length
            if records:
                return [
                    LogChunk(found.stream, found.data, f"{self._identity}@{start + found.end}") for found in records
                ]
            if length == 0:
                if len(text) < size:
                    return []
                size *= 2
        return []

    def _rotated(self) -> bool:
        assert self._file is not None  # noqa: S101 -- callers have opened it
        try:
            return os.stat(self._path).st_ino != os.fstat(self._file).st_ino
        except FileNotFoundError:
            return False


def tail_bytes(path: Path, max_bytes: int) -> tuple[bytes, str]:
    """The newest output in a log, and the position behind it. Blocking."""
    reader = LogReader(path, None)
    newest = bytearray()
    try:
        while records := reader.read():
            for record in records:
                newest += record.data
            if len(newest) > 2 * max_bytes:
                del newest[:-max_bytes]
        return bytes(newest[-max_bytes:]) if max_bytes > 0 else b"", reader.position
    finally:
        reader.close()


async def follow(
    path: Path, position: str | None, inotify: Inotify, ended: Callable[[], bool]
) -> AsyncIterator[LogChunk]:
    """Records from `position` on, until `ended()` says so and all has been read.

    A change in the log's folder, such as an exit file's appearing there, makes it look again at once.
    """
    try:
        watch = inotify.watch(path.parent)
    except FileNotFoundError:
        return
    reader = LogReader(path, position)
    try:
        while True:
            watch.changed.clear()
            last_look = ended()
            while chunks := reader.read():
                for chunk in chunks:
                    yield chunk
            if last_look:
                return
            # The time limit is for a monitor that was killed: then nothing changes in the folder.
            await watch.wait(_LOOK_AGAIN_SECONDS)
    finally:
        reader.close()
        watch.close()
