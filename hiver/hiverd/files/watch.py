"""Events of native mounts, from the kernel: one fanotify group for all sandboxes, read by one thread (DESIGN 3).

A file system mark on a sandbox's volume sees what happens on all of it, by whatever road: through the mounts, through
descriptors that were opened before, from other namespaces. What does not belong to a mount that is told about (the
sandbox's root, governed mounts) and what this process does itself is left out here.

What bounds a flood: the kernel merges what is alike and unread; a round of reading looks at so many events closely and
only counts the rest, which is faster than any sandbox can make them, so that the kernel's queue stays short; what is
to be told is bounded in bytes, and becomes coarser above (`watch_pairs`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeVar

from hiverd.contracts.errors import UnavailableError
from hiverd.files import fanotify
from hiverd.files.fanotify import FileEvent
from hiverd.files.watch_pairs import Budget, Pending
from hiverd.files.watch_places import Folders, Gone, Places
from hiverd.wire.events import FileOperation

log = logging.getLogger(__name__)

T = TypeVar("T")

GATHER_SECONDS: Final = 0.025
"""How long events wait in the kernel, where those that are alike are merged."""
BURST_BYTES: Final = 32 << 10
"""So much at once, some hundreds of events, is a burst: it is only read and kept until it is over, since looking at it
meanwhile would slow down the workload that makes it ..."""
BURST_SECONDS: Final = 0.25
"""... or has lasted for so long."""
ROUND_EVENTS: Final = 100_000
"""How many events a round looks at closely ..."""
ROUND_EVENTS_EACH: Final = 5_000
"""... but so many of each sandbox in any case."""
_BATCH_BYTES: Final = 4 << 20
"""How much is read before it is handled: the removal of a directory explains what came before it."""

_WRITES: Final = fanotify.MODIFY | fanotify.MOVED_TO
_DELETES: Final = fanotify.DELETE | fanotify.MOVED_FROM
_MAYBE_EMPTY: Final = fanotify.CREATE | fanotify.ON_DIRECTORY | _WRITES
_MOVES: Final = fanotify.MOVED_FROM | fanotify.MOVED_TO


@lru_cache
def operations(mask: int) -> tuple[FileOperation, ...]:
    """In the order in which a file can meet them, since a merged event does not tell."""
    made_directory = mask & fanotify.CREATE and mask & fanotify.ON_DIRECTORY
    found: list[FileOperation] = []
    if mask & _WRITES or made_directory:
        found.append("write")
    if mask & fanotify.ACCESS:
        found.append("read")
    if mask & _DELETES:
        found.append("delete")
    return tuple(found)


class Watch:
    """One volume that is watched."""

    def __init__(self, volume: Path, folders: Folders, budget: Budget) -> None:
        """Opens the volume, which keeps it from being unmounted until `close`."""
        self.volume = volume
        self.folders = folders
        self.pending = Pending(budget)
        self.unplaced = 0
        """Accesses whose directory was gone, and unknown; told with their mount's path."""
        self.handled = 0
        self.skimmed = 0
        self._fd = os.open(volume, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME | os.O_CLOEXEC)
        self.fsid = fanotify.fsid_of(self._fd)
        self.places = Places(os.fsencode(volume.resolve() / "mounts"), self._fd, folders)

    def change(self, folders: Folders) -> None:
        self.folders = folders
        self.places.change(folders)

    def close(self) -> None:
        os.close(self._fd)

    def see(self, event: FileEvent, gone: Callable[[], Gone]) -> None:
        """Puts what an event means among the pending accesses."""
        on_directory = event.mask & fanotify.ON_DIRECTORY
        place = self.places.of(event.directory, gone)
        if on_directory and event.itself and event.mask & fanotify.CREATE:
            self.places.learn(event.itself, event.directory, event.name)
        if place is not None:
            if not place.known:
                self.unplaced += 1
            for operation in self._operations(event):
                self.pending.add(operation, place, event.name)
        if on_directory and event.mask & _MOVES:
            self.places.forget()

    def _operations(self, event: FileEvent) -> tuple[FileOperation, ...]:
        """An empty regular file is not worth an event (PROTOCOL 6.3)."""
        if event.mask & _MAYBE_EMPTY == fanotify.CREATE and self.places.is_link(event.itself):
            return operations(event.mask | fanotify.MODIFY)
        return operations(event.mask)


class Watcher:
    """The group and its thread. All methods are for the event loop's thread."""

    def __init__(self, notify: Callable[[], object]) -> None:
        """`notify` is called in the thread, when something is pending. Raises `OSError` where the kernel refuses."""
        self._notify = notify
        self._budget = Budget()
        self._group = fanotify.Group()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ordered = select.poll()
        self._ordered.register(self._wake, select.POLLIN)
        self._orders: deque[Callable[[], None]] = deque()
        self._watches: dict[bytes, Watch] = {}
        self._own_pid = os.getpid()
        self._closing = False
        self.overflows = 0
        self._thread = threading.Thread(target=self._run, name="file-events", daemon=True)
        self._thread.start()

    async def add(self, volume: Path, folders: Folders) -> Watch:
        """Begins to watch a volume. Raises `OSError`."""
        return await self._call(lambda: self._add(volume, folders))

    def _add(self, volume: Path, folders: Folders) -> Watch:
        watch = Watch(volume, folders, self._budget)
        try:
            self._watches[watch.fsid] = watch
            self._group.watch(volume)
        except BaseException:
            self._watches.pop(watch.fsid, None)
            watch.close()
            raise
        return watch

    async def change(self, watch: Watch, folders: Folders) -> None:
        """Other mounts of the volume are told about from now on."""
        await self._call(lambda: watch.change(folders))

    async def remove(self, watch: Watch) -> None:
        """Ends it; what happened before is pending then, and nothing keeps the volume from being unmounted."""
        await self._call(lambda: self._remove(watch))

    def _remove(self, watch: Watch) -> None:
        self._watches.pop(watch.fsid, None)
        try:
            self._group.unwatch(watch.volume)
        except OSError as error:
            log.debug("%s is watched no more: %s", watch.volume, error)
        finally:
            watch.close()

    async def flush(self) -> None:
        """What happened before the call is pending when it returns."""
        await self._call(lambda: None)

    async def close(self) -> None:
        """Ends the thread and the group, marks included. Final."""
        await self._call(self._stop)
        await asyncio.to_thread(self._thread.join)
        os.close(self._wake)

    def _stop(self) -> None:
        self._closing = True
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
        self._group.close()

    async def _call(self, function: Callable[[], T]) -> T:
        """Runs `function` in the thread, after everything that happened until now has been read."""
        if self._closing:
            raise UnavailableError("file events have ended")
        result: Future[T] = Future()

        def order() -> None:
            try:
                result.set_result(function())
            except BaseException as error:  # noqa: BLE001 -- raised where it is waited for
                result.set_exception(error)

        self._orders.append(order)
        os.eventfd_write(self._wake, 1)
        return await asyncio.shield(asyncio.wrap_future(result))

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        waiting = select.poll()
        waiting.register(self._group, select.POLLIN)
        waiting.register(self._wake, select.POLLIN)
        while not self._closing:
            ready = {fd for fd, _ in waiting.poll()}
            if self._wake not in ready:
                self._ordered.poll(GATHER_SECONDS * 1000)
            self._clear_wake()
            orders = len(self._orders)
            try:
                self._read_all()
            except Exception:
                log.exception("file events: a round of them could not be read")
            for _ in range(orders):
                self._orders.popleft()()

    def _clear_wake(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _read_all(self) -> None:
        """One round: until the kernel's queue is empty."""
        round_ = _Round(self._watches, self._own_pid)
        while buffers := self._read_batch():
            round_.handle(buffers)
            self._notify()
        round_.end()
        if round_.overflowed:
            self.overflows += 1
            log.error("file events: the kernel's queue was full; accesses of native mounts are not on record")

    def _read_batch(self) -> list[bytes]:
        """What there is, and what follows while it is a burst that nobody waits for."""
        buffers: list[bytes] = []
        until = time.monotonic() + BURST_SECONDS
        while self._read_some(buffers) >= BURST_BYTES and sum(map(len, buffers)) < _BATCH_BYTES:
            if time.monotonic() > until or self._ordered.poll(GATHER_SECONDS * 1000):
                break
        return buffers

    def _read_some(self, buffers: list[bytes]) -> int:
        """Reads what is there, at most a batch; how many bytes."""
        size = 0
        while size < _BATCH_BYTES and (buffer := self._group.read()):
            buffers.append(buffer)
            size += len(buffer)
        return size


class _Round:
    def __init__(self, watches: dict[bytes, Watch], own_pid: int) -> None:
        self._watches = watches
        self._own_pid = own_pid
        self._handled = 0
        self.overflowed = False
        self._buffers: list[bytes] = []
        self._gone: dict[bytes, tuple[bytes, bytes]] | None = None

    def handle(self, buffers: list[bytes]) -> None:
        self._buffers, self._gone = buffers, None
        for buffer in buffers:
            self._handle(buffer)

    def _handle(self, buffer: bytes) -> None:
        watches, own_pid = self._watches, self._own_pid
        for position, fsid in fanotify.positions(buffer):
            watch = watches.get(fsid)
            if watch is None:
                if not fsid and fanotify.event_at(buffer, position).mask & fanotify.QUEUE_OVERFLOW:
                    self.overflowed = True
                continue
            if self._handled >= ROUND_EVENTS and watch.handled >= ROUND_EVENTS_EACH:
                watch.skimmed += 1
                continue
            watch.handled += 1
            self._handled += 1
            event = fanotify.event_at(buffer, position)
            if event.pid != own_pid:
                watch.see(event, self._removed)

    def _removed(self) -> Gone:
        """The directories whose removal is among what was read with this."""
        if self._gone is None:
            removed = fanotify.ON_DIRECTORY | fanotify.DELETE
            self._gone = {
                event.itself: (event.directory, event.name)
                for buffer in self._buffers
                for event in fanotify.parse(buffer)
                if event.mask & removed == removed and event.itself
            }
        return self._gone

    def end(self) -> None:
        for watch in self._watches.values():
            if watch.skimmed:
                mounts = {target: mount for mount, target in watch.folders.values()}
                watch.pending.add_unknown(mounts, watch.skimmed)
            watch.handled = watch.skimmed = 0
