"""From a compressed file to the bytes of an archive, a step ahead of whoever reads them. Memory is bounded."""

from __future__ import annotations

import contextlib
import gzip
import io
import queue
import threading
import zlib
from typing import IO, BinaryIO, Final, cast

import zstandard

from hiverd.snapshots.reading import DamagedArchiveError

_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE: Final = b"\x2a\x4d\x18"
_GZIP: Final = b"\x1f\x8b"
_PIECE_BYTES: Final = 1 << 20
_WAIT_SECONDS: Final = 0.01
_AHEAD: Final = 4
"""Pieces."""
_MAX_WINDOW_BYTES: Final = 128 << 20
"""What `zstd --long` needs; more is refused."""


class Inflater:
    """`reading.Source`. Decompresses in a thread of its own, until `close`."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is read from its position on; the caller closes it. Raises `DamagedArchiveError` for what is
        neither zstd nor gzip nor a plain tar."""
        self._queue: queue.Queue[bytes | Exception] = queue.Queue(_AHEAD)
        self._ended = False
        self._closed = False
        self._file = open(descriptor, "rb", buffering=_PIECE_BYTES, closefd=False)  # noqa: SIM115 -- see close
        try:
            self._stream = _opened(self._file)
        except BaseException:
            self._file.close()
            raise
        self._thread = threading.Thread(target=self._work, name="inflate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, whether all has been read or not."""
        self._closed = True
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=_WAIT_SECONDS)
        self._file.close()

    def read(self, size: int, /) -> bytes:
        """A piece of whatever size is there."""
        if self._ended:
            return b""
        piece = self._queue.get()
        if isinstance(piece, Exception):
            raise DamagedArchiveError(f"it cannot be decompressed: {piece}") from piece
        self._ended = not piece
        return piece

    def _work(self) -> None:
        try:
            while not self._closed and (piece := self._stream.read(_PIECE_BYTES)):
                self._queue.put(piece)
            self._queue.put(b"")
        except (OSError, EOFError, zlib.error, zstandard.ZstdError, MemoryError) as error:
            self._queue.put(error)


def _opened(buffered: BinaryIO) -> IO[bytes]:
    start = cast("io.BufferedReader", buffered).peek(512)
    if start.startswith(_ZSTD) or (start[1:4] == _ZSTD_SKIPPABLE and start[0] & 0xF0 == 0x50):
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        return decompressor.stream_reader(buffered, read_size=_PIECE_BYTES, read_across_frames=True)
    if start.startswith(_GZIP):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=buffered, mode="rb"))
    if start[257:262] == b"ustar":
        return buffered
    raise DamagedArchiveError("it is no archive")
