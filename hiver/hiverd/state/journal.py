"""The event journal: every event of every sandbox, durable before anybody sees it.

`emit` assigns the id and queues; one writer task commits what is queued in a single transaction and only then wakes
the readers. So an id that a client has seen is never given out again, not even after `kill -9`, and a reader of any
speed misses nothing that is still kept: readers hold a position, not a buffer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import msgspec

from hiverd.clock import Clock, rfc3339
from hiverd.state.accesses import AccessEncoder
from hiverd.state.database import Database
from hiverd.wire.events import (
    SILENT_TYPES,
    Event,
    EventSink,
    FileOperation,
    FsRequestEvent,
    FsResponseEvent,
    type_of,
)
from hiverd.wire.sse import to_ascii

log = logging.getLogger(__name__)

PENDING_HIGH_BYTES: Final = 8 << 20
PAGE_ROWS: Final = 64
MIN_TRIM_SLACK: Final = 256
TRIM_SHARE: Final = 8
"""The oldest are deleted when there is an eighth more than is to be kept: finding them means a walk over all."""
GATHER_SECONDS: Final = 0.02
"""How much later an event may be seen for the sake of those that follow it; the first after a pause is not delayed."""
_encode = msgspec.json.Encoder().encode


class Journal:
    """Owns the writer task. One per server."""

    def __init__(self, database: Database, clock: Clock, *, max_count: int, max_bytes: int) -> None:
        self._database = database
        self._clock = clock
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.trim_above = max_count + max(MIN_TRIM_SLACK, max_count // TRIM_SHARE)
        self._pending: list[tuple[SandboxEvents, int, bytes]] = []
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._positions: dict[str, str] = {}
        self._appended = 0
        self._stored = 0
        self._progress = asyncio.Event()
        self._urgent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self) -> None:
        self._task = asyncio.create_task(self._write_loop(), name="journal-writer")

    async def close(self) -> None:
        """Writes what is queued, then stops."""
        self._closing = True
        self._wake.set()
        self._urgent.set()
        if self._task is not None:
            await self._task

    def open(self, sandbox_id: str, *, last_id: int, types: frozenset[str] | None) -> SandboxEvents:
        """The stream of one sandbox. `types` None: every type is observed."""
        return SandboxEvents(self, self._database, sandbox_id, last_id, types)

    async def flushed(self, *, urgent: bool = True) -> None:
        """Waits until everything emitted before this call is stored; `urgent` makes that sooner."""
        ticket = self._appended
        if urgent:
            self._urgent.set()
        while self._stored < ticket and not self._closing:
            self._progress.clear()
            await self._progress.wait()

    async def room(self) -> None:
        """Waits while too much is queued: for producers that a workload can drive."""
        while not self._room.is_set():  # again, as another one may have filled it since the wait ended
            await self._room.wait()

    def append(self, events: SandboxEvents, event_id: int, event: Event) -> None:
        self.append_encoded(events, [(event_id, encode_event(event, event_id, self._clock.wall()))])

    def append_encoded(self, events: SandboxEvents, rows: Sequence[tuple[int, bytes]]) -> None:
        """Rows as `encode_event` makes them, with their ids."""
        self._pending.extend([(events, event_id, body) for event_id, body in rows])
        self._appended += len(rows)
        self._pending_bytes += sum([len(body) for _, body in rows])
        if self._pending_bytes > PENDING_HIGH_BYTES:
            self._room.clear()
            self._urgent.set()
        self._wake.set()

    def encoder(self, backend: str) -> AccessEncoder:
        """For accesses that are recorded now."""
        return AccessEncoder(self._clock.wall(), backend)

    def set_log_position(self, sandbox_id: str, position: str) -> None:
        """Stores how far the entrypoint's output is recorded, in the same transaction as those events."""
        self._positions[sandbox_id] = position
        self._wake.set()

    async def _write_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._pending or self._positions:
                await self._write_batch()
                await self._gather()
            elif self._closing:
                return
            if self._closing:
                self._wake.set()

    async def _gather(self) -> None:
        """Lets more events come together before the next transaction, unless somebody waits for one: a transaction
        costs as much as some fifty events, and the threads' fight for the GIL comes on top.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_SECONDS):
                await self._urgent.wait()
        self._urgent.clear()

    async def _write_batch(self) -> None:
        batch, self._pending = self._pending, []
        positions, self._positions = self._positions, {}
        self._pending_bytes = 0
        self._room.set()
        live = [(events, event_id, body) for events, event_id, body in batch if not events.closed]
        last_ids = {events: event_id for events, event_id, _ in live}
        try:
            async with self._database.transaction() as connection:
                for statement, parameters in _inserts(live):
                    await connection.execute(statement, parameters)
                await connection.executemany(
                    "UPDATE sandboxes SET last_event_id = ? WHERE id = ?",
                    [(event_id, events.sandbox_id) for events, event_id in last_ids.items()],
                )
                if positions:
                    await connection.executemany(
                        "UPDATE sandboxes SET log_position = ? WHERE id = ?",
                        [(position, sandbox_id) for sandbox_id, position in positions.items()],
                    )
        except Exception:
            # The batch is kept and tried again: a full disk must not lose the record of what happened.
            log.exception("journal: could not write %d events, trying again", len(batch))
            self._pending[:0] = batch
            self._pending_bytes += sum(len(body) for _, _, body in batch)
            if self._pending_bytes > PENDING_HIGH_BYTES:
                self._room.clear()
            self._positions = positions | self._positions
            await asyncio.sleep(1.0)
            self._wake.set()
            return
        self._stored += len(batch)
        self._progress.set()
        for events, _, body in live:
            events.count_stored(len(body))
        for events, event_id in last_ids.items():
            events.committed(event_id)
            await self._trim(events)

    async def _trim(self, events: SandboxEvents) -> None:
        if events.stored_count <= self.trim_above and events.stored_bytes <= self.max_bytes:
            return
        too_large = events.stored_bytes > self.max_bytes
        async with self._database.transaction() as connection:
            if too_large:
                bounds = (events.sandbox_id, self.max_count, self.max_bytes // 2)
                await connection.execute(_DELETE_BY_BYTES, bounds)
            else:
                await connection.execute(_DELETE_BY_COUNT, (events.sandbox_id, self.max_count))
            cursor = await connection.execute(
                "SELECT count(*), coalesce(sum(length(body)), 0) FROM events WHERE sandbox_id = ?", (events.sandbox_id,)
            )
            row = await cursor.fetchone()
        if row is not None:
            events.stored_count, events.stored_bytes = int(row[0]), int(row[1])


def _insert_of(count: int) -> str:
    rows = ",".join(["(?,?,?)"] * count)
    return (
        f"INSERT INTO events (sandbox_id, id, body) SELECT column1, column2, column3 FROM (VALUES {rows})"  # noqa: S608
        " WHERE EXISTS (SELECT 1 FROM sandboxes WHERE id = column1)"
    )


_INSERTS: Final = {count: _insert_of(count) for count in (256, 64, 16, 4, 1)}
"""Rows that go together cost one wait for the interpreter's lock; few sizes, so that SQLite compiles each once."""


def _inserts(rows: Sequence[tuple[SandboxEvents, int, bytes]]) -> Iterator[tuple[str, list[object]]]:
    start = 0
    for count, statement in _INSERTS.items():
        while len(rows) - start >= count:
            part = rows[start : start + count]
            yield statement, [value for events, number, body in part for value in (events.sandbox_id, number, body)]
            start += count


_DELETE_BY_COUNT: Final = (
    "DELETE FROM events WHERE sandbox_id = ?1 AND id <= coalesce("
    "(SELECT id FROM events WHERE sandbox_id = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2), 0)"
)
_DELETE_BY_BYTES: Final = (
    "DELETE FROM events WHERE sandbox_id = ?1 AND id <= coalesce((SELECT max(id) FROM ("
    " SELECT id, row_number() OVER newest AS n, sum(length(body)) OVER newest AS total"
    " FROM events WHERE sandbox_id = ?1 WINDOW newest AS (ORDER BY id DESC))"
    " WHERE n > ?2 OR total > ?3), 0)"
)


class SandboxEvents(EventSink):
    """One sandbox's event stream: the sink that the server writes to and the positions that clients read from."""

    def __init__(
        self, journal: Journal, database: Database, sandbox_id: str, last_id: int, types: frozenset[str] | None
    ) -> None:
        self._journal = journal
        self._database = database
        self.sandbox_id = sandbox_id
        self._last_id = last_id
        self._committed_id = last_id
        self._types = types
        self._waiters: set[asyncio.Future[None]] = set()
        self._readers = 0
        self.closed = False
        # What an earlier server left is counted when the first event comes.
        self.stored_count = journal.trim_above if last_id else 0
        self.stored_bytes = 0
        self.on_activity: Callable[[], None] | None = None
        """Called for each event that is a sign of life (PROTOCOL 8)."""
        self.before_flush: dict[str, Callable[[], Awaitable[None]]] = {}
        """Makes sure that what has happened has been emitted, where that comes later."""

    @property
    def last_id(self) -> int:
        return self._last_id

    def set_filter(self, types: Iterable[str] | None) -> None:
        """Installs the configuration's `events` filter; None observes everything."""
        self._types = None if types is None else frozenset(types)

    def wants(self, event_type: type[Event]) -> bool:
        return not self.closed and (self._types is None or type_of(event_type) in self._types)

    def emit(self, event: Event) -> int:
        self._last_id += 1
        kind = type_of(event)
        if self.on_activity is not None and kind not in SILENT_TYPES:
            self.on_activity()
        if not self.closed and (self._types is None or kind in self._types):
            self._journal.append(self, self._last_id, event)
        return self._last_id

    def emit_accesses(self, backend: str, accesses: Sequence[tuple[FileOperation, str, str]]) -> None:
        """As many pairs of `fs.request`, allowed, and `fs.response`; an access is (operation, mount, path)."""
        if self.on_activity is not None:
            self.on_activity()
        encoder = self._journal.encoder(backend)
        requests, responses = self.wants(FsRequestEvent), self.wants(FsResponseEvent)
        rows: list[tuple[int, bytes]] = []
        last_id = self._last_id
        for operation, mount, path in accesses:
            if requests:
                rows.append((last_id + 1, encoder.request(last_id + 1, operation, mount, path)))
            if responses:
                rows.append((last_id + 2, encoder.response(last_id + 2, last_id + 1)))
            last_id += 2
        self._last_id = last_id
        if rows:
            self._journal.append_encoded(self, rows)

    async def room(self) -> None:
        await self._journal.room()

    async def stored(self) -> None:
        """Waits until everything emitted before this call is stored, without making that sooner."""
        await self._journal.flushed(urgent=False)

    def set_log_position(self, position: str) -> None:
        if not self.closed:
            self._journal.set_log_position(self.sandbox_id, position)

    def count_stored(self, size: int) -> None:
        self.stored_count += 1
        self.stored_bytes += size

    def committed(self, event_id: int) -> None:
        """Called by the writer: everything up to this id can be read."""
        self._committed_id = max(self._committed_id, event_id)
        self._release()

    @contextmanager
    def reader(self) -> Iterator[None]:
        """Marks a reader, for whom the end of the stream waits a moment."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            self._release()

    async def drained(self, timeout_seconds: float) -> None:
        """After `close`: waits until all readers have seen the end, or the time has passed."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while self._readers and (left := deadline - asyncio.get_running_loop().time()) > 0:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            await asyncio.wait({waiter}, timeout=left)
            self._waiters.discard(waiter)

    async def read_after(self, position: int) -> list[tuple[int, bytes]]:
        """The next stored events behind a position, oldest first, at most a page; empty if there are none."""
        rows = await self._database.fetch(
            "SELECT id, body FROM events WHERE sandbox_id = ? AND id > ? ORDER BY id LIMIT ?",
            (self.sandbox_id, position, PAGE_ROWS),
        )
        return [(row[0], row[1]) for row in rows]

    async def wait_beyond(self, position: int, timeout_seconds: float) -> bool:
        """Waits until something newer than `position` can be read. False on time-out or when the stream has closed."""
        if self._committed_id > position:
            return True
        if self.closed:
            return False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait({waiter}, timeout=timeout_seconds)
        finally:
            self._waiters.discard(waiter)
        return self._committed_id > position

    async def flushed(self) -> None:
        """Waits until everything that happened before this call can be read."""
        await asyncio.gather(*(hand_over() for hand_over in self.before_flush.values()))
        await self._journal.flushed()

    def close(self) -> None:
        """Ends the stream for all readers: the sandbox is gone."""
        self.closed = True
        self._release()

    def _release(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


def encode_event(event: Event, event_id: int, wall_seconds: float) -> bytes:
    """One line of ASCII JSON (PROTOCOL 2: the published client decodes each network chunk on its own)."""
    body = _encode(event)
    head = b'{"id":%d,"timestamp":"%s",' % (event_id, rfc3339(wall_seconds).encode())
    return to_ascii(head + body[1:])
