"""Time, injectable, so that tests of lifetimes need no waiting."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def wall(self) -> float:
        """Seconds since the epoch."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary point; never goes back."""


class SystemClock:
    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


def rfc3339(wall_seconds: float) -> str:
    """A UTC time stamp as events carry it (PROTOCOL 7), with microseconds."""
    return datetime.fromtimestamp(wall_seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
