"""Bytes on demand: ranges from the backend into the folder's files. Runs on the loop.

One file never holds bytes of two versions. What lies in a file came from one version, checked like this: the first
range of an empty file needs no check; each further one is kept only if a `stat` that is asked after its first byte came
still tells the recorded version.
"""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import aclosing

from hiverd.remote.calls import Remote
from hiverd.remote.node import Fetch, Node
from hiverd.remote.ranges import Ranges, aligned, parts
from hiverd.remote.shared import Shared
from hiverd.remote.tree import write_at

NEAR_BYTES = 1 << 20
"""A read that starts this close to the last one's end goes on with it: the kernel's requests overtake each other."""


class Reader:
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._settings = shared.settings
        self._slots = asyncio.Semaphore(shared.settings.parallel_downloads)

    # -- from any thread, under the table's lock

    def note_read(self, node: Node, offset: int, size: int) -> tuple[int, int] | None:
        """Keeps track of a sequential reader; the range to fetch ahead of it, if it is time for that."""
        end = offset + size
        if abs(offset - node.next_offset) > NEAR_BYTES:
            node.window = 0
            node.ahead = 0
            node.next_offset = end
            return None
        node.next_offset = max(end, node.next_offset)
        if node.complete():
            return None
        start = max(node.ahead, end)
        if start >= node.size or start - end > max(node.window, self._settings.chunk_bytes) // 2:
            return None
        node.window = min(max(node.window * 2, self._settings.chunk_bytes), self._settings.read_ahead_bytes)
        start, node.ahead = aligned(start, start + node.window, self._settings.block_bytes, node.size)
        return start, node.ahead

    def note_miss(self, node: Node, offset: int, size: int) -> None:
        """A read that has to wait."""
        if abs(offset - node.next_offset) > NEAR_BYTES:
            node.window = 0
            node.ahead = 0
        node.next_offset = offset + size

    # -- on the loop

    def ahead(self, node: Node, start: int, end: int) -> None:
        """Begins to fetch what a sequential reader will ask for."""
        with self._shared.table.lock:
            if not node.gone and node.behind is None:
                self._begin(node, start, min(end, node.size))

    async def need(self, node: Node, start: int, end: int | None) -> None:
        """Waits until these bytes are in the folder (None: all). `ESTALE`: they no longer exist in this version."""
        table = self._shared.table
        with table.lock:
            node.pins += 1
        try:
            while True:
                with table.lock:
                    stop = node.size if end is None else min(end, node.size)
                    if node.has(start, stop):
                        return
                    if node.gone or node.behind is not None:
                        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                    relevant = self._begin(node, *self._wanted(node, start, stop, whole=end is None))
                    progress = node.progress
                await progress.wait()
                self._raise(relevant)
        finally:
            with table.lock:
                node.pins -= 1
                if not node.pins:
                    table.rest(node)

    def _wanted(self, node: Node, start: int, end: int, *, whole: bool) -> tuple[int, int]:
        if whole:
            return start, end
        if start == node.ahead:  # a sequential reader whose read-ahead has not begun
            node.ahead = max(end, min(node.size, start + self._settings.chunk_bytes))
            return aligned(start, node.ahead, self._settings.block_bytes, node.size)
        return aligned(start, end, self._settings.block_bytes, node.size)

    def _begin(self, node: Node, start: int, end: int) -> list[Fetch]:
        """The fetches, old and new, that together bring this range."""
        here = Ranges()
        for low, high in node.present:
            here.add(low, high)
        for fetch in node.fetches:
            here.add(fetch.start, fetch.end)
        for low, high in parts(here.missing(start, end), self._settings.part_bytes):
            checked = bool(node.fetches) or node.present.total > 0
            fetch = Fetch(low, high)
            node.fetches.append(fetch)
            self._shared.spawn(self._run(node, fetch, checked=checked), f"fetch {node.path}")
        return [fetch for fetch in node.fetches if fetch.start < end and start < fetch.end]

    def _raise(self, fetches: list[Fetch]) -> None:
        for fetch in fetches:
            if fetch.error is not None:
                raise fetch.error

    async def _run(self, node: Node, fetch: Fetch, *, checked: bool) -> None:
        try:
            async with self._slots:
                await self._fetch(node, fetch, checked=checked)
        except Exception as error:  # noqa: BLE001 -- whoever waits for it gets it
            fetch.error = error
        finally:
            with self._shared.table.lock:
                node.fetches.remove(fetch)
                self._shared.table.save(node)
                self._shared.table.rest(node)
            self._tell(node)

    async def _fetch(self, node: Node, fetch: Fetch, *, checked: bool) -> None:
        table = self._shared.table
        with table.lock:
            path, version, size = node.path, node.version, node.size
            if not _wanted_still(node, version):
                return
        at = fetch.start
        pieces = self._shared.backend.read(path, fetch.start, fetch.end - fetch.start)
        with self._shared.tree.opened(path, os.O_WRONLY) as fd:
            async with aclosing(pieces):
                async for piece in pieces:
                    if checked and at == fetch.start and not await self._is_still(node, version):
                        return
                    with table.lock:
                        if not _wanted_still(node, version):
                            return
                        self._keep(node, fd, at, piece[: fetch.end - at])
                    at += len(piece)
                    self._tell(node)
        if at < fetch.end and await self._is_still(node, version):
            raise OSError(errno.EIO, f"{path}: {at - fetch.start} bytes instead of {fetch.end - fetch.start} of {size}")

    def _keep(self, node: Node, fd: int, offset: int, piece: bytes) -> None:
        write_at(fd, offset, piece, node.mtime_ns)
        node.present.add(offset, offset + len(piece))
        node.used = self._shared.clock.wall()
        self._shared.table.account(node)

    def _tell(self, node: Node) -> None:
        node.progress.set()
        node.progress = asyncio.Event()

    async def _is_still(self, node: Node, version: str | None) -> bool:
        """Whether the backend's object is still this version; if not, the node learns of it."""
        remote = await self.ask(node)
        return remote.version == version and node.version == version

    async def ask(self, node: Node) -> Remote:
        """What the backend says now; the node follows. `FileNotFoundError` also when it is no file any more."""
        remote = await self._shared.backend.stat(node.path)
        if remote.kind != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), node.path)
        table = self._shared.table
        with table.lock:
            node.asked = self._shared.now()
            if node.version is not None and remote.version != node.version:
                if not node.pending and node.behind is None:
                    table.take(node, remote)
            elif node.behind is not None:
                node.behind = None
        return remote


def _wanted_still(node: Node, version: str | None) -> bool:
    return not node.pending and not node.gone and node.behind is None and node.version == version
