"""The lifecycle stream across all sandboxes (PROTOCOL 3.3)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final

from hiverd.wire.answers import LifecycleEvent

BACKLOG: Final = 10_000


class LifecycleStream:
    """Fan-out without history: a subscriber first gets a `start` for each sandbox that runs, then what happens."""

    def __init__(self) -> None:
        self._subscribers: set[asyncio.Queue[LifecycleEvent | None]] = set()

    def publish(self, event: LifecycleEvent) -> None:
        for queue in list(self._subscribers):
            if queue.qsize() >= BACKLOG:
                # A reader that fell this far behind is cut off rather than shown a stream with a hole in it.
                self._subscribers.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    async def subscribe(
        self, now: Iterable[LifecycleEvent], heartbeat_seconds: float
    ) -> AsyncIterator[LifecycleEvent | None]:
        """Yields events, and None whenever nothing has happened for `heartbeat_seconds`."""
        queue: asyncio.Queue[LifecycleEvent | None] = asyncio.Queue()
        self._subscribers.add(queue)
        try:
            for event in now:
                yield event
            while queue in self._subscribers or not queue.empty():
                try:
                    event_or_end = await asyncio.wait_for(queue.get(), heartbeat_seconds)
                except TimeoutError:
                    yield None
                    continue
                if event_or_end is None:
                    return
                yield event_or_end
        finally:
            self._subscribers.discard(queue)

    def close(self) -> None:
        """Ends every subscription: the server stops."""
        for queue in self._subscribers:
            queue.put_nowait(None)
        self._subscribers.clear()
