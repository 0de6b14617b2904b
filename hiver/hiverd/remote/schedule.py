"""When what is uploaded. Pure: times come in as arguments, in seconds of a monotonic clock."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")


def due_after_close(*, now: float, first_change: float, quiet_seconds: float, longest_seconds: float) -> float:
    """Debounce per path (PROTOCOL 6.4): quiet for a while, but not later than so long after the first change."""
    return max(now, min(now + quiet_seconds, first_change + longest_seconds))


def retry_pause(attempts: int, *, first: float, longest: float, dice: Callable[[], float] = random.random) -> float:
    """Doubles with each attempt (from 1 on); by chance up to a half shorter, so that mounts do not knock together."""
    pause = min(longest, first * 2.0 ** min(attempts - 1, 30))
    return pause * (1 - dice() / 2)


class Schedule(Generic[K]):
    """Due times of keys, each at most once. Not thread-safe."""

    def __init__(self) -> None:
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: K) -> bool:
        return key in self._due

    def put(self, key: K, due: float) -> None:
        """The newest time counts, earlier or later."""
        if self._due.get(key) == due:
            return
        self._due[key] = due
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, key))

    def drop(self, key: K) -> None:
        self._due.pop(key, None)

    def next_due(self) -> float | None:
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> K | None:
        """The key that is due longest, once."""
        due = self.next_due()
        if due is None or due > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._due[key]
        return key
