"""An archive in the making: groups of members, compressed piece by piece into one file.

Every piece is a frame of its own (RFC 8878) or a gzip member (RFC 1952), and frames one after the other are a valid
stream; so what became outdated while the archive was made can be taken out again without touching the rest.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Literal, NamedTuple

import zstandard

Compression = Literal["zstd", "gzip"]
PIECE_BYTES: Final = 2 << 20
"""Raw bytes of one frame, at most. With these and a few under way memory is bounded."""
_GZIP: Final = 31
_local = threading.local()


class Span(NamedTuple):
    """A part of the spool file."""

    offset: int
    length: int


class Group:
    """Members that share frames. `members`: name -> (start, end) in the raw bytes of the group."""

    __slots__ = ("frames", "generation", "members")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.frames: list[Span] = []
        self.members: dict[bytes, tuple[int, int]] = {}


class SpoolFullError(Exception):
    """The archive has become larger than allowed."""


class Spool:
    """Writes groups in order. Single-threaded use; compression runs in a pool of its own."""

    def __init__(self, descriptor: int, compression: Compression, level: int, threads: int, max_bytes: int) -> None:
        self._descriptor = descriptor
        self._compress: Callable[[bytes], bytes] = _gzip(level) if compression == "gzip" else _zstd(level)
        self._decompress = _ungzip if compression == "gzip" else _unzstd
        self._threads = threads
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="compress")
        self._under_way: deque[tuple[Group, Future[bytes]]] = deque()
        self._end = 0
        self.groups: list[Group] = []
        self.generation = 0
        """Of what is added from now on: see `drop`."""
        self._open = Group(0)
        self._raw = bytearray()
        self._flushed = 0

    def next_generation(self) -> int:
        """What is added from now on is newer than all before."""
        self.end_group()
        self.generation += 1
        self._open = Group(self.generation)
        return self.generation

    def member(self, name: bytes, head: bytes, content: bytes = b"") -> None:
        """Adds a whole member to the open group; `content` with its padding."""
        start = self._flushed + len(self._raw)
        self._raw += head
        self._raw += content
        self._open.members[name] = (start, self._flushed + len(self._raw))
        if len(self._raw) >= PIECE_BYTES:
            self.end_group()

    def large_member(self, name: bytes, head: bytes, write: Callable[[Callable[[bytes], None]], None]) -> None:
        """Adds a member in a group of its own. `write` is called with a function that takes pieces of the content."""
        self.end_group()
        self._raw += head
        write(self._take)
        self._open.members[name] = (0, self._flushed + len(self._raw))
        self.end_group()

    def _take(self, piece: bytes) -> None:
        self._raw += piece
        if len(self._raw) >= PIECE_BYTES:
            self._flush()

    def end_group(self) -> None:
        if not self._open.members and not self._raw:
            return
        self._flush()
        self.groups.append(self._open)
        self._open = Group(self.generation)
        self._flushed = 0

    def _flush(self) -> None:
        if self._raw:
            raw, self._raw = bytes(self._raw), bytearray()
            self._flushed += len(raw)
            self._submit(self._open, raw)

    def _submit(self, group: Group, raw: bytes) -> None:
        self._under_way.append((group, self._pool.submit(self._compress, raw)))
        while len(self._under_way) > self._threads + 1:
            self._write_one()

    def _write_one(self) -> None:
        group, compressed = self._under_way.popleft()
        group.frames.append(self._append(compressed.result()))

    def settle(self) -> None:
        """Everything so far is in the file."""
        self.end_group()
        while self._under_way:
            self._write_one()

    def _append(self, data: bytes) -> Span:
        span = Span(self._end, len(data))
        if span.offset + span.length > self._max_bytes:
            raise SpoolFullError
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, self._end)
            self._end += written
            view = view[written:]
        return span

    def finished(self, head: bytes, tail: bytes) -> list[Span]:
        """The archive as parts of the file, in order: `head`, what has been added and not dropped, `tail`."""
        self.settle()
        spans = [self._append(self._compress(head))] if head else []
        for group in self.groups:
            spans += group.frames
        spans.append(self._append(self._compress(tail)))
        return spans

    def drop(self, stale: set[bytes], generation: int) -> None:
        """Takes members out of generations before that one; later ones may have the same names."""
        self.settle()
        kept: list[Group] = []
        for group in self.groups:
            gone = stale.intersection(group.members)
            if not gone or group.generation >= generation:
                kept.append(group)
            elif len(gone) < len(group.members):
                kept.append(self._rebuilt(group, gone))
        self.groups = kept

    def _rebuilt(self, group: Group, gone: set[bytes]) -> Group:
        raw = b"".join(self._decompress(os.pread(self._descriptor, span.length, span.offset)) for span in group.frames)
        rebuilt = Group(group.generation)
        pieces, position = [], 0
        for name, (start, end) in group.members.items():
            if name not in gone:
                pieces.append(raw[start:end])
                rebuilt.members[name] = (position, position + end - start)
                position += end - start
        rebuilt.frames.append(self._append(self._compress(b"".join(pieces))))
        return rebuilt

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _zstd(level: int) -> Callable[[bytes], bytes]:
    def compress(raw: bytes) -> bytes:
        compressor = getattr(_local, "compressor", None)
        if compressor is None:
            compressor = _local.compressor = zstandard.ZstdCompressor(level=level)
        compressed: bytes = compressor.compress(raw)
        return compressed

    return compress


def _unzstd(frame: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(frame)


def _gzip(level: int) -> Callable[[bytes], bytes]:
    def compress(raw: bytes) -> bytes:
        compressor = zlib.compressobj(level, zlib.DEFLATED, _GZIP)
        return compressor.compress(raw) + compressor.flush()

    return compress


def _ungzip(member: bytes) -> bytes:
    return zlib.decompress(member, _GZIP)
