"""Which bytes of a file are here: disjoint, sorted, half-open ranges. Pure."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from typing import Self


class Ranges:
    """Mutable. Touching ranges melt into one, so a file that is complete is one range."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0
        """Bytes in all ranges."""

    @classmethod
    def whole(cls, size: int) -> Self:
        ranges = cls()
        ranges.add(0, size)
        return ranges

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    def add(self, start: int, end: int) -> int:
        """How many bytes are new."""
        if end <= start:
            return 0
        low = bisect_left(self._ends, start)
        high = low
        merged_start, merged_end, had = start, end, 0
        while high < len(self._starts) and self._starts[high] <= end:
            merged_start = min(merged_start, self._starts[high])
            merged_end = max(merged_end, self._ends[high])
            had += self._ends[high] - self._starts[high]
            high += 1
        self._starts[low:high] = [merged_start]
        self._ends[low:high] = [merged_end]
        new = merged_end - merged_start - had
        self.total += new
        return new

    def covers(self, start: int, end: int) -> bool:
        if end <= start:
            return True
        index = bisect_left(self._ends, end)
        return index < len(self._starts) and self._starts[index] <= start

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of `start` to `end` is not in here."""
        gaps = []
        for index in range(bisect_left(self._ends, start), len(self._starts)):
            if self._starts[index] >= end:
                break
            if self._starts[index] > start:
                gaps.append((start, self._starts[index]))
            start = max(start, self._ends[index])
        if start < end:
            gaps.append((start, end))
        return gaps

    def encode(self) -> bytes | None:
        """For the database; None if empty."""
        if not self._starts:
            return None
        return b"".join(struct.pack("<QQ", *pair) for pair in self)

    @classmethod
    def decode(cls, data: bytes | None) -> Self:
        ranges = cls()
        for start, end in struct.iter_unpack("<QQ", data or b""):
            ranges.add(start, end)
        return ranges


def aligned(start: int, end: int, block: int, size: int) -> tuple[int, int]:
    """The range in whole blocks, within a file of `size` bytes."""
    return start - start % block, min(size, -(-end // block) * block)


def parts(gaps: list[tuple[int, int]], part_bytes: int) -> list[tuple[int, int]]:
    """The same bytes in pieces of at most `part_bytes`."""
    return [(at, min(end, at + part_bytes)) for start, end in gaps for at in range(start, end, part_bytes)]
