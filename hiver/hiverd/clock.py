"""Time, injectable, so that tests of lifetimes need no waiting."""

from __future__ import annotations

import functools
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
    seconds, micros = divmod(round(wall_seconds * 1_000_000), 1_000_000)
    return f"{_whole_second(seconds)}.{micros:06d}Z"


@functools.lru_cache(maxsize=8)
def _whole_second(seconds: int) -> str:
    """Thousands of events share one."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
