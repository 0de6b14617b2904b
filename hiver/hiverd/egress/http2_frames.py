"""The frames of an HTTP/2 connection before anything is made of them: told apart, counted, paid for (RFC 9113 4). Pure.

Here ends what costs a peer little and us much: resets right after requests (CVE-2023-44487), header blocks without end
(CVE-2024-27316), floods of settings, pings, priorities, window updates and empty data (CVE-2019-9511 and following).
Frames go on in small batches, so that many tiny ones do not hold the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

FRAME_BYTES: Final = 16 * 1024
"""The longest frame that is accepted: what every peer may send (RFC 9113 4.2)."""
FRAMES_PER_TURN: Final = 64
"""Taken by the state machine at a time."""
HEADER_BLOCK_BYTES: Final = 128 * 1024
"""The longest compressed header block; beyond it the connection ends."""
RESETS_BURST: Final = 200
RESETS_PER_SECOND: Final = 50.0
"""Streams that the peer opens and breaks off, or has us refuse."""
OVERHEAD_BURST: Final = 2_000
OVERHEAD_PER_SECOND: Final = 200.0
"""Frames that carry neither a request nor data."""
EARNED_BY_DATA: Final = 4
"""Overhead that comes with a frame of data, such as window updates and the pings that measure a path."""
_EARNING_BYTES: Final = 256

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD_BYTES: Final = 9
_DATA, _HEADERS, _RST_STREAM, _GOAWAY, _CONTINUATION = 0, 1, 3, 7, 9
_END_STREAM, _END_HEADERS = 0x1, 0x4


class FloodError(Exception):
    """The peer asks for more work than it pays for. The text is safe to show."""


class GoAway(NamedTuple):
    """The peer takes no new streams; those up to this one go on (RFC 9113 6.8)."""

    last_stream_id: int


class Budget:
    """So many at once, and so many a second in the long run."""

    def __init__(self, burst: float, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = self._left = burst
        self._per_second = per_second
        self._clock = clock
        self._at = clock()

    def take(self) -> bool:
        """False: there is none left."""
        if self._left < 1:
            now = self._clock()
            self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
            self._at = now
            if self._left < 1:
                return False
        self._left -= 1
        return True

    def earn(self, count: float) -> None:
        """Adds to what is left, up to the burst."""
        self._left = min(self._burst, self._left + count)


class FrameReader:
    """Cuts what a peer sends into batches of whole frames."""

    def __init__(self, *, server: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`server`: the connection preface comes first."""
        self._buffer = bytearray()
        self._preface = server
        self._block_bytes = 0
        self._in_block = False
        self.overhead = Budget(OVERHEAD_BURST, OVERHEAD_PER_SECOND, clock)
        self.resets = Budget(RESETS_BURST, RESETS_PER_SECOND, clock)

    @property
    def held_bytes(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes | GoAway]:
        """Batches of at most `FRAMES_PER_TURN` whole frames, and GOAWAY on its own. Exhaust it before the next call.

        Raises `FloodError`: the connection has to end.
        """
        self._buffer += data
        if self._preface:
            if len(self._buffer) < len(PREFACE):
                return
            yield self._cut(len(PREFACE))
            self._preface = False
        end = count = 0
        while (frame_end := self._frame_end(end)) is not None:
            if self._buffer[end + 3] == _GOAWAY and not self._in_block:
                goaway = bytes(self._buffer[end + _HEAD_BYTES : frame_end])
                batch = self._cut(end)
                del self._buffer[: frame_end - end]
                end = count = 0
                if batch:
                    yield batch
                yield GoAway(int.from_bytes(goaway[:4]) & 0x7FFF_FFFF)
                continue
            self._charge(end, frame_end)
            end = frame_end
            count += 1
            if count == FRAMES_PER_TURN:
                yield self._cut(end)
                end = count = 0
        if end:
            yield self._cut(end)

    def _cut(self, end: int) -> bytes:
        data = bytes(self._buffer[:end])
        del self._buffer[:end]
        return data

    def _frame_end(self, start: int) -> int | None:
        """None while the frame is not whole."""
        if len(self._buffer) < start + _HEAD_BYTES:
            return None
        size = int.from_bytes(self._buffer[start : start + 3])
        if size > FRAME_BYTES:
            raise FloodError("a frame is too long")
        end = start + _HEAD_BYTES + size
        return end if end <= len(self._buffer) else None

    def _charge(self, start: int, end: int) -> None:
        kind, flags, size = self._buffer[start + 3], self._buffer[start + 4], end - start - _HEAD_BYTES
        if kind == _RST_STREAM:
            self._pay(self.resets, "too many streams are broken off")
        elif kind == _HEADERS:
            self._block_bytes = size
            self._in_block = not flags & _END_HEADERS
        elif kind == _DATA and (size or flags & _END_STREAM):
            if size >= _EARNING_BYTES:
                self.overhead.earn(EARNED_BY_DATA)
        else:
            self._pay(self.overhead, "too many frames without a request or data")
        if kind == _CONTINUATION:
            self._block_bytes += size
            self._in_block = self._in_block and not flags & _END_HEADERS
        if self._block_bytes > HEADER_BLOCK_BYTES:
            raise FloodError("a header block is too long")

    @staticmethod
    def _pay(budget: Budget, complaint: str) -> None:
        if not budget.take():
            raise FloodError(complaint)
