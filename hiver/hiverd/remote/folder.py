"""A folder on the disk that is kept like a backend (docs/files.md). The front of this package.

The methods of `Content` are called by many FUSE threads at once; what is known answers there and then, everything else
is done by the loop while the thread waits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec import Struct

from hiverd.clock import Clock, SystemClock
from hiverd.contracts.filesystem import FileSystem
from hiverd.remote.cache import trim
from hiverd.remote.calls import RecordedBackend, SyncCall, for_workload
from hiverd.remote.changes import Changes
from hiverd.remote.listing import Listings
from hiverd.remote.nodes import Table
from hiverd.remote.opening import Files
from hiverd.remote.reading import Reader
from hiverd.remote.recovery import recover
from hiverd.remote.settings import RemoteSettings
from hiverd.remote.shared import Shared
from hiverd.remote.state import State
from hiverd.remote.tree import Tree, split
from hiverd.remote.uploads import Uploader

T = TypeVar("T")

TICK_SECONDS: Final = 0.2
"""Between commits of what need not be durable at once, and looks at the cache's bound."""
PROGRESS_SECONDS: Final = 0.25


class Pending(Struct, frozen=True):
    """What is not on the backend yet."""

    count: int
    bytes: int
    error: str | None = None
    """Of one of the files: the last reason why it is not."""


def _nobody(_path: str) -> None:
    pass


class RemoteFolder:
    """Implements `hiverd.remote.content.Content`.

    `folder` is the base: `tree/` is to be served, `state.sqlite3` is ours. An existing one is taken over: what is
    pending there is uploaded. `record` is called on the loop's thread, before and after each call of the backend.
    `changed` is told of paths (and directories, for all below) that another writer of the service has changed, so that
    the kernel's caches can follow; it is called with a lock held, on any thread, and must only take a note.
    """

    def __init__(
        self,
        folder: Path,
        backend: FileSystem,
        *,
        loop: asyncio.AbstractEventLoop,
        record: Callable[[SyncCall], None],
        settings: RemoteSettings | None = None,
        clock: Clock | None = None,
        changed: Callable[[str], None] = _nobody,
    ) -> None:
        """Makes or opens the folder; asks nothing of the backend. `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        clock = clock or SystemClock()
        self.tree_path = folder / "tree"
        known = (folder / "state.sqlite3").exists()
        self._tree = Tree(self.tree_path)
        state = State(folder / "state.sqlite3")
        self._table = Table(state, self._tree, clock, changed)
        self._shared = Shared(
            backend=RecordedBackend(backend, record),
            table=self._table,
            tree=self._tree,
            settings=settings or RemoteSettings(),
            clock=clock,
            loop=loop,
        )
        self._listings = Listings(self._shared, verify=known)
        self._reader = Reader(self._shared)
        self._uploader = Uploader(self._shared, self._listings)
        self._changes = Changes(self._shared, self._listings, self._reader, self._uploader)
        self._files = Files(self._shared, self._listings, self._reader, self._uploader)
        self._closed = False

    # -- life, on the loop

    async def start(self) -> Pending:
        """After the plug-in's `open`. Begins to upload what an earlier run left, and says how much that is."""
        nodes = await asyncio.to_thread(recover, self._table)
        with self._table.lock:
            for node in nodes:
                self._uploader.schedule(node, self._shared.now())
        self._shared.spawn(self._uploader.run(), "uploads")
        self._shared.spawn(self._tick(), "remote folder")
        return self.pending()

    def pending(self) -> Pending:
        """From any thread."""
        with self._table.lock:
            error = next((node.error for node in self._table.pending if node.error), None)
            return Pending(len(self._table.pending), self._table.dirty_bytes, error)

    def kick(self) -> None:
        """Failed uploads are tried again now."""
        self._uploader.kick()

    def use(self, backend: FileSystem) -> None:
        """Another plug-in object for the same data, with new credentials say. The old one is the caller's to close."""
        self._shared.backend.plugin = backend
        self.kick()

    async def drain(self, timeout_seconds: float, progress: Callable[[Pending], None] | None = None) -> Pending:
        """Uploads everything now, also what is still open; returns what is left after that time."""
        self._uploader.draining = True
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._drain(progress)
        finally:
            self._uploader.draining = False
        return self.pending()

    async def _drain(self, progress: Callable[[Pending], None] | None) -> None:
        self._uploader.kick()
        told = float("-inf")
        while True:
            left = self.pending()
            if progress is not None and self._shared.loop.time() - told >= PROGRESS_SECONDS:
                told = self._shared.loop.time()
                progress(left)
            if not left.count:
                return
            await self._uploader.settled()

    async def stop(self) -> None:
        """Ends all work at once; drain first. What is pending stays so. The plug-in is the caller's to close."""
        if self._closed:
            return
        self._closed = True
        tasks = list(self._shared.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with self._table.lock:
            for node in list(self._table.nodes.values()):
                self._table.save(node)
            self._table.state.close()
        self._tree.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            with self._table.lock:
                self._table.finish_intents()
                self._table.state.commit()
            if self._table.cached_bytes > self._shared.settings.cache_bytes:
                await asyncio.to_thread(trim, self._shared)

    # -- Content, on any other thread

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        try:
            return asyncio.run_coroutine_threadsafe(self._tracked(work), self._shared.loop).result()
        except concurrent.futures.CancelledError:
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
        except Exception as error:
            raise for_workload(error) from error

    async def _tracked(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        if task is not None:
            self._shared.tasks.add(task)
            task.add_done_callback(self._shared.tasks.discard)
        return await work

    def look_up(self, path: str) -> None:
        if path == "/":
            return
        parent, _ = split(path)
        with self._table.lock:
            if self._listings.is_good(parent) or self._files.is_ours(path):
                return
        with contextlib.suppress(FileNotFoundError):
            self._wait(self._listings.refresh(parent))

    def list(self, path: str) -> None:
        with self._table.lock:
            if self._listings.is_good(path):
                return
        self._wait(self._listings.refresh(path))

    def open(self, path: str, *, write: bool, truncate: bool) -> bool:
        known = self._files.open_here(path, write=write, truncate=truncate)
        if known is not None:
            return known
        return self._wait(self._files.open(path, write=write, truncate=truncate))

    def read(self, path: str, offset: int, size: int) -> None:
        node = self._files.read_here(path, offset, size)
        if node is not None:
            self._wait(self._reader.need(node, offset, offset + size))

    def modify(self, path: str) -> None:
        node = self._files.modify_here(path)
        if node is not None:
            self._wait(self._files.modify(node))

    def close(self, path: str, *, written: bool) -> None:
        self._files.close(path, written=written)

    def created(self, path: str) -> None:
        self._files.created(path)

    def make_directory(self, path: str) -> None:
        self._wait(self._changes.make_directory(path))

    def symlink(self, path: str, target: str) -> None:
        self._wait(self._changes.symlink(path, target))

    def unlink(self, path: str) -> None:
        with self._table.lock:
            if self._changes.unlink_here(path):
                return
        self._wait(self._changes.unlink(path))

    def remove_directory(self, path: str) -> None:
        self._wait(self._changes.remove_directory(path))

    def rename(self, source: str, target: str) -> None:
        with self._table.lock:
            if self._changes.rename_here(source, target):
                return
        self._wait(self._changes.rename(source, target))
