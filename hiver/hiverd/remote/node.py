"""One file in use: open, pending or on its way."""

from __future__ import annotations

import asyncio
from typing import Final

from hiverd.remote.calls import Remote
from hiverd.remote.ranges import Ranges
from hiverd.remote.state import Row

NEVER: Final = float("-inf")


class Fetch:
    """A request for a range, under way."""

    __slots__ = ("end", "error", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.error: Exception | None = None


class Node:
    """One file. Attributes change under the table's lock."""

    __slots__ = (
        "accounted",
        "ahead",
        "asked",
        "attempts",
        "behind",
        "error",
        "fetches",
        "first_change",
        "generation",
        "gone",
        "last_change",
        "lock",
        "mtime_ns",
        "next_offset",
        "opens",
        "path",
        "pending",
        "pins",
        "present",
        "progress",
        "room",
        "since",
        "size",
        "unsettled",
        "used",
        "vanished",
        "version",
        "window",
    )

    def __init__(self, path: str, version: str | None, size: int, mtime_ns: int, present: Ranges) -> None:
        self.path = path
        self.version = version
        self.size = size
        """Of the backend's object; while pending, of the file at its last close."""
        self.mtime_ns = mtime_ns
        self.present = present
        self.pending = False
        self.since = 0.0
        self.attempts = 0
        self.error: str | None = None
        self.used = 0.0

        self.opens = 0
        self.pins = 0
        """Uses besides handles: it stays in memory, and its content on the disk."""
        self.generation = 0
        """Counts changes of the content."""
        self.first_change = NEVER
        """Since the last upload began; monotonic, as the two that follow."""
        self.last_change = NEVER
        self.asked = NEVER
        """When the backend last said what it is."""
        self.unsettled = False
        """It was uploaded while it was open: what a handle that wrote was about to write may be missing."""
        self.behind: Remote | None = None
        """What the backend has by now, while those who have the file open keep what they had."""
        self.vanished = False
        """The backend has it no more; it goes when nobody has it open any more."""
        self.gone = False
        """The name is another file's, or nobody's."""
        self.fetches: list[Fetch] = []
        self.progress = asyncio.Event()
        """Set and replaced whenever content arrives or a fetch ends; on the loop only."""
        self.lock = asyncio.Lock()
        """Held by who calls the backend about the object as a whole: upload, delete, move."""
        self.next_offset = 0
        self.window = 0
        self.ahead = 0
        self.accounted = (0, 0)

    def complete(self) -> bool:
        return self.pending or self.version is None or self.present.covers(0, self.size)

    def has(self, start: int, end: int) -> bool:
        return self.pending or self.version is None or self.present.covers(start, min(end, self.size))

    def row(self) -> Row:
        clean = not self.pending and self.version is not None
        return Row(
            self.path,
            "file",
            self.version,
            self.size,
            self.mtime_ns,
            present=self.present.encode() if clean else None,
            cached=self.present.total if clean else 0,
            used=self.used,
            pending=int(self.pending),
            since=self.since,
            attempts=self.attempts,
            error=self.error,
        )
