"""What is pending goes to the backend: after a pause, several at once, again and again until it is there.

Runs on the loop, but for `schedule`. An upload reads a file that may change meanwhile: changes are counted, and a file
that has changed since, or that somebody may be changing, stays pending, as a successor of what was uploaded.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from hiverd.contracts.filesystem import ABSENT, VersionConflictError
from hiverd.remote.calls import Remote, is_condition, safe_text
from hiverd.remote.collisions import Collisions
from hiverd.remote.listing import Listings
from hiverd.remote.node import NEVER, Node
from hiverd.remote.schedule import Schedule, due_after_close, retry_pause
from hiverd.remote.shared import Shared

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 1 << 20
DIRECT_BYTES: Final = 64 << 10
"""Files up to this are read where the loop runs: a trip to another thread takes longer."""
SETTLED_SECONDS: Final = 1.0
"""An open file that has not been changed for so long is taken as unchanging."""


class _ChangedError(Exception):
    """The file has become shorter while it was read."""


class Uploader:
    def __init__(self, shared: Shared, listings: Listings) -> None:
        self._shared = shared
        self._table = shared.table
        self._settings = shared.settings
        self._listings = listings
        self._collisions = Collisions(shared, listings, schedule=self.schedule, uploaded=self.uploaded)
        self._schedule: Schedule[Node] = Schedule()
        self._wake = asyncio.Event()
        self._sleeps_until = NEVER
        self._running: set[Node] = set()
        self._barriers: list[str] = []
        self.draining = False
        self.succeeded = 0
        """Uploads so far, since the start."""
        self._settled = asyncio.Event()

    # -- from any thread, under the table's lock

    def closed(self, node: Node) -> None:
        """A handle that changed it has gone."""
        due = due_after_close(
            now=self._shared.now(),
            first_change=node.first_change,
            quiet_seconds=self._settings.quiet_seconds,
            longest_seconds=self._settings.longest_seconds,
        )
        self.schedule(node, due)

    def schedule(self, node: Node, due: float) -> None:
        self._schedule.put(node, due)
        if due < self._sleeps_until:
            self._sleeps_until = due
            self._shared.loop.call_soon_threadsafe(self._wake.set)

    def is_scheduled(self, node: Node) -> bool:
        return node in self._schedule

    # -- on the loop

    async def settled(self) -> None:
        """Until an upload has ended, well or not; or for a moment."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), 0.25)

    def kick(self) -> None:
        """All that waits is tried now: something has changed, or time is short."""
        with self._table.lock:
            for node in self._table.pending:
                if node in self._schedule or self.draining:
                    self.schedule(node, self._shared.now())

    async def run(self) -> None:
        while True:
            with self._table.lock:
                self._start_due()
                self._wake.clear()
                full = len(self._running) >= self._settings.parallel_uploads
                due = None if full else self._schedule.next_due()
                self._sleeps_until = float("inf") if due is None else due
                if full:
                    self._sleeps_until = NEVER
            pause = None if due is None else max(0.0, due - self._shared.now())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    def _start_due(self) -> None:
        held: list[Node] = []
        while len(self._running) < self._settings.parallel_uploads:
            node = self._schedule.pop(self._shared.now())
            if node is None:
                break
            if not node.pending or node.gone:
                continue
            if node in self._running or self._is_held(node.path):
                held.append(node)
                continue
            self._running.add(node)
            self._shared.spawn(self._attempt(node), f"upload {node.path}")
        for node in held:
            self._schedule.put(node, self._shared.now() + 0.05)

    def _is_held(self, path: str) -> bool:
        return any(path.startswith(barrier) for barrier in self._barriers)

    def hold(self, directory: str) -> None:
        """Nothing below is uploaded until `release`: its name is changing."""
        self._barriers.append(directory + "/")

    def release(self, directory: str) -> None:
        self._barriers.remove(directory + "/")

    async def _attempt(self, node: Node) -> None:
        try:
            async with node.lock:
                if node.pending and not node.gone:
                    await self._try(node)
        finally:
            with self._table.lock:
                self._running.discard(node)
                self._table.rest(node)
                self._start_due()
                if len(self._running) < self._settings.parallel_uploads and self._schedule.next_due() is not None:
                    self._wake.set()
            self._settled.set()
            self._settled = asyncio.Event()

    async def _try(self, node: Node) -> None:
        now = self._shared.now()
        quiet_at = node.last_change + SETTLED_SECONDS
        if node.opens and now < min(quiet_at, node.first_change + self._settings.longest_seconds):
            with self._table.lock:
                self.schedule(node, quiet_at)  # it may just be being changed
            return
        try:
            await self.upload(node)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the content is here and stays pending
            self._failed(node, error)

    def _failed(self, node: Node, error: Exception) -> None:
        with self._table.lock:
            if not node.pending or node.gone:
                return
            node.attempts += 1
            node.error = safe_text(error)
            self._table.save(node)
            longest = (
                min(2.0, self._settings.longest_retry_seconds)
                if self.draining
                else self._settings.longest_retry_seconds
            )
            pause = retry_pause(node.attempts, first=self._settings.retry_seconds, longest=longest)
            if isinstance(error, _ChangedError):
                pause = self._settings.quiet_seconds
            self.schedule(node, self._shared.now() + pause)
        log.warning("%s: upload failed (attempt %d): %s", node.path, node.attempts, node.error)

    async def force(self, node: Node) -> None:
        """Uploads now what is pending; the error is the caller's (PROTOCOL 6.4: before a move)."""
        async with node.lock:
            if node.pending and not node.gone:
                await self.upload(node)

    async def upload(self, node: Node) -> None:
        """With the node's lock. It may be pending afterwards, for a newer content."""
        tree, table = self._shared.tree, self._table
        try:
            with tree.opened(node.path, os.O_RDONLY) as fd:
                with table.lock:
                    generation, base, path = node.generation, node.version, node.path
                    settled = not node.opens or self._shared.now() - node.last_change >= SETTLED_SECONDS
                    node.first_change = self._shared.now()
                    size = os.fstat(fd).st_size
                remote = await self._write(path, fd, size, base)
                with table.lock:
                    self._listings.touch(path)
                    self.uploaded(node, remote, fd, unchanged=settled and node.generation == generation)
        except FileNotFoundError as error:
            if tree.status(node.path) is not None:
                raise
            self._lost(node, error)
        except VersionConflictError:
            await self._collisions.settle(node)

    def uploaded(self, node: Node, remote: Remote, fd: int, *, unchanged: bool) -> None:
        """The backend has what was read from `fd`. Under the lock."""
        node.version = remote.version
        node.asked = self._shared.now()
        node.attempts, node.error = 0, None
        self.succeeded += 1
        if node.gone:
            return
        status = os.fstat(fd)
        if unchanged and status.st_size == remote.size:
            node.size, node.mtime_ns = status.st_size, status.st_mtime_ns
            node.unsettled = node.opens > 0
            self._table.end_pending(node)
        else:
            self._table.save(node)
            if node not in self._schedule:
                pause = self._settings.longest_seconds if node.opens else self._settings.quiet_seconds
                if self.draining:
                    pause = min(pause, SETTLED_SECONDS)
                self.schedule(node, self._shared.now() + pause)

    def _lost(self, node: Node, error: Exception) -> None:
        with self._table.lock:
            if node.pending and not node.gone:
                log.error("%s: is recorded as pending and not in the folder: %s", node.path, safe_text(error))
                self._table.remove(node)

    async def _write(self, path: str, fd: int, size: int, base: str | None) -> Remote:
        """Under the version that the content was made from; compared by us where the backend has none."""
        backend = self._shared.backend
        expected: str | None = ABSENT if base is None else base
        if base is not None and not is_condition(base):
            try:
                if (await backend.stat(path)).version != base:
                    raise VersionConflictError(errno.ESTALE, "changed meanwhile", path)
                expected = None
            except FileNotFoundError:
                expected = ABSENT
        try:
            return await backend.write(path, self._pieces(fd, size), size=size, expected_version=expected)
        except FileNotFoundError:
            if expected == ABSENT:
                raise
        return await backend.write(path, self._pieces(fd, size), size=size, expected_version=ABSENT)

    async def _pieces(self, fd: int, size: int) -> AsyncIterator[bytes]:
        offset = 0
        while offset < size:
            count = min(PIECE_BYTES, size - offset)
            if size <= DIRECT_BYTES:
                piece = os.pread(fd, count, offset)
            else:
                piece = await asyncio.to_thread(os.pread, fd, count, offset)
            if not piece:
                raise _ChangedError
            offset += len(piece)
            yield piece
