"""The folder follows the backend's directories: one listing each, shared by all who wait for it. Runs on the loop,
but for what is under the table's lock.
"""

from __future__ import annotations

import asyncio
from typing import Final

from hiverd.remote.calls import Remote
from hiverd.remote.node import NEVER
from hiverd.remote.nodes import Table
from hiverd.remote.reconciliation import Reconciliation
from hiverd.remote.shared import Shared, Stopwatch
from hiverd.remote.tree import split

BATCH: Final = 250
"""Entries that are made at a time: the lock is free in between."""
WAITING_BATCHES: Final = 40


class _Directory:
    """What is known of one directory's listing. Under the table's lock."""

    __slots__ = ("begun", "good_until", "running", "touched")

    def __init__(self) -> None:
        self.begun = NEVER
        """When the listing that the folder follows was asked for."""
        self.good_until = NEVER
        self.running: asyncio.Task[None] | None = None
        self.touched: set[str] = set()
        """Names that changed here while the listing ran: it may or may not know of that, so it says nothing of them."""


class Listings:
    def __init__(self, shared: Shared, *, verify: bool) -> None:
        self._shared = shared
        self._table: Table = shared.table
        self._directories: dict[str, _Directory] = {}
        self._verify = verify
        """The folder is from an earlier process: what lies in a directory is compared with the records once."""

    # -- from any thread, under the table's lock

    def is_good(self, directory: str) -> bool:
        known = self._directories.get(directory)
        return known is not None and self._shared.now() < known.good_until

    def begun(self, directory: str) -> float:
        """When the backend was last asked for this directory."""
        known = self._directories.get(directory)
        return known.begun if known is not None else NEVER

    def touch(self, path: str) -> None:
        """An entry is about to change, or has: a listing that runs right now does not know."""
        parent, name = split(path)
        known = self._directories.get(parent)
        if known is not None and known.running is not None:
            known.touched.add(name)

    def forget(self, directory: str) -> None:
        """All below it is listed anew, when it is next looked at."""
        prefix = directory.rstrip("/") + "/"
        for path, known in self._directories.items():
            if path == directory or path.startswith(prefix):
                known.good_until = NEVER

    def made(self, directory: str) -> None:
        """It is new and empty."""
        known = self._directories.setdefault(directory, _Directory())
        known.begun = self._shared.now()
        known.good_until = self._good_until(known.begun, 0.0)

    def _good_until(self, begun: float, took: float) -> float:
        settings = self._shared.settings
        if settings.asynchronous:
            return float("inf")
        return begun + took + max(settings.listing_seconds, settings.listing_factor * took)

    # -- on the loop

    async def refresh(self, directory: str) -> None:
        """The folder has what the backend has, as of now or as of a moment ago. `FileNotFoundError`."""
        with self._table.lock:
            if self.is_good(directory):
                return
            known = self._directories.setdefault(directory, _Directory())
            if known.running is None:
                known.running = self._shared.spawn(self._list(directory, known), f"list {directory}")
            running = known.running
        await asyncio.shield(running)

    async def _list(self, directory: str, known: _Directory) -> None:
        watch = Stopwatch()
        begun = self._shared.now()
        work = Reconciliation(self._shared, directory, known.touched)
        try:
            if self._verify and known.begun == NEVER:
                await asyncio.to_thread(work.compare_with_folder)
            await self._follow(directory, work)
            with self._table.lock:
                known.begun = begun
                known.good_until = self._good_until(begun, watch.seconds())
        except FileNotFoundError:
            with self._table.lock:
                if directory != "/":
                    self._table.forget_directory(directory)
                    self._directories.pop(directory, None)
            raise
        finally:
            with self._table.lock:
                work.ended = True
                known.running = None
                known.touched = set()

    async def _follow(self, directory: str, work: Reconciliation) -> None:
        """Entries are made in a thread, while the next ones come: no page is asked for later because of it."""
        batches: asyncio.Queue[list[Remote] | None] = asyncio.Queue(WAITING_BATCHES)
        await asyncio.to_thread(work.prepare)
        making = self._shared.spawn(self._make(work, batches), f"make {directory}")
        try:
            batch: list[Remote] = []
            async for remote in self._shared.backend.list_directory(directory):
                batch.append(remote)
                if len(batch) >= BATCH:
                    await batches.put(batch)
                    batch = []
            await batches.put(batch)
            await batches.put(None)
            await making
        finally:
            making.cancel()
        await asyncio.to_thread(work.finish)

    @staticmethod
    async def _make(work: Reconciliation, batches: asyncio.Queue[list[Remote] | None]) -> None:
        failure: Exception | None = None
        while (batch := await batches.get()) is not None:
            try:
                if failure is None:
                    await asyncio.to_thread(work.follow, batch)
            except Exception as error:  # noqa: BLE001 -- the rest is still taken out of the queue, so that nobody hangs
                failure = error
        if failure is not None:
            raise failure
