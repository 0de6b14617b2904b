"""What a mount server has to tell, between the threads that serve the kernel and the server that reads."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Final

from hiverd.fuse.frames import Access, Accessed, Lost, Told, frame

MAX_BATCH: Final = 1024
"""Accesses in one frame."""
MAX_WAITING: Final = 20_000
"""While a server is there: more, and the agent waits."""
MAX_KEPT: Final = 200_000
"""While none is there: more are counted."""
MAX_OTHERS: Final = 10_000
"""Calls of the service and lines for the log that wait; the oldest go first, and are counted."""
GATHER_SECONDS: Final = 0.003
_WAIT_SECONDS: Final = 10.0
"""After which an access goes on all the same: a server that hangs must not take the mount with it."""


class Outbox:
    """One per mount server. `record` and `tell` may be called by any thread; the rest belongs to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._accesses: deque[Access] = deque()
        self._told: deque[Access] = deque()
        """Sent, and not on record yet as far as we know: told again if the server dies."""
        self._confirmed = 0
        self._others: deque[Told] = deque()
        self._lost = 0
        self._dropped = 0
        self._writer: asyncio.StreamWriter | None = None
        self._scheduled = False
        self._sending: asyncio.Task[None] | None = None
        self._room = threading.Event()
        self._room.set()

    def record(self, access: Access) -> None:
        """Waits while a server that is there reads more slowly than the agent works."""
        if len(self._accesses) >= MAX_WAITING and not self._may_grow():
            return
        self._accesses.append(access)
        self._wake()

    def tell(self, message: Told) -> None:
        """Never waits."""
        if len(self._others) >= MAX_OTHERS:
            self._others.popleft()
            self._dropped += 1
        self._others.append(message)
        self._wake()

    def _may_grow(self) -> bool:
        if self._writer is not None:
            self._room.clear()
            if len(self._accesses) >= MAX_WAITING:
                self._room.wait(_WAIT_SECONDS)
        if len(self._accesses) < MAX_KEPT:
            return True
        self._lost += 1
        return False

    def _wake(self) -> None:
        if not self._scheduled and self._writer is not None:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._loop.call_later, GATHER_SECONDS, self._send_soon)

    # -- in the event loop ------------------------------------------------------------------------------------------

    def attach(self, writer: asyncio.StreamWriter) -> None:
        """A server is there, and gets what was kept."""
        if self._writer is not None:
            self.detach(self._writer)
        self._writer = writer
        self._confirmed = 0
        if self._lost or self._dropped:
            self._others.appendleft(Lost(self._lost, self._dropped))
            self._lost = self._dropped = 0
        self._send_soon()

    def detach(self, writer: asyncio.StreamWriter) -> None:
        """It is not there any more."""
        if self._writer is writer:
            self._writer = None
            self._accesses.extendleft(reversed(self._told))
            self._told.clear()
            self._room.set()

    def confirmed(self, writer: asyncio.StreamWriter, accesses: int) -> None:
        """So many of those sent on this connection are on record."""
        if self._writer is writer:
            for _ in range(min(accesses - self._confirmed, len(self._told))):
                self._told.popleft()
            self._confirmed = accesses

    @property
    def attached(self) -> bool:
        return self._writer is not None

    def _send_soon(self) -> None:
        if self._sending is None or self._sending.done():
            self._sending = self._loop.create_task(self._send(), name="outbox")

    async def _send(self) -> None:
        """Until nothing is left, or nobody there."""
        self._scheduled = False
        while self._writer is not None and (self._others or self._accesses):
            writer = self._writer
            try:
                self._write_some(writer)
                await writer.drain()
            except OSError:
                self.detach(writer)
            if len(self._accesses) < MAX_WAITING // 2:
                self._room.set()
            self._scheduled = False

    def _write_some(self, writer: asyncio.StreamWriter) -> None:
        while self._others:
            writer.write(frame(self._others.popleft()))
        count = min(len(self._accesses), MAX_BATCH)
        if count:
            batch = [self._accesses.popleft() for _ in range(count)]
            self._told.extend(batch)
            writer.write(frame(Accessed(batch)))

    async def flush(self) -> None:
        """Waits until what was recorded before this call is on its way, or nobody is there."""
        while self._writer is not None and (self._others or self._accesses):
            self._send_soon()
            assert self._sending is not None  # noqa: S101 -- just made
            await asyncio.wait({self._sending})
