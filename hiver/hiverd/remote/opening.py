"""Files as handles see them: opened, read, changed, closed.

Methods called `..._here` run on FUSE threads and answer at once if nothing has to be waited for; the coroutines do the
rest on the loop.
"""

from __future__ import annotations

import errno
import os

from hiverd.remote.listing import Listings
from hiverd.remote.node import Node
from hiverd.remote.reading import Reader
from hiverd.remote.shared import Shared
from hiverd.remote.tree import split
from hiverd.remote.uploads import Uploader


class Files:
    def __init__(self, shared: Shared, listings: Listings, reader: Reader, uploader: Uploader) -> None:
        self._shared = shared
        self._table = shared.table
        self._listings = listings
        self._reader = reader
        self._uploader = uploader

    def is_ours(self, path: str) -> bool:
        """Nothing that the backend says can change whether it exists. Under the lock."""
        node = self._table.nodes.get(path)
        return node is not None and (node.pending or node.version is None)

    # -- open

    def open_here(self, path: str, *, write: bool, truncate: bool) -> bool | None:
        with self._table.lock:
            node = self._table.find(path)
            if node is None or self._must_ask(node):
                return None
            if truncate and not self._has_room(node):
                return None
            if write and not truncate and not node.complete():
                return None
            return self._enter(node, truncate=truncate)

    def _must_ask(self, node: Node) -> bool:
        settings = self._shared.settings
        if settings.asynchronous or node.pending or node.version is None:
            return False
        parent, _ = split(node.path)
        if not node.present.total and self._listings.is_good(parent):
            return False  # there is nothing yet that could be outdated, but for what the listing itself said
        asked = max(node.asked, self._listings.begun(parent))
        return self._shared.now() - asked > settings.stat_seconds

    def _enter(self, node: Node, *, truncate: bool) -> bool:
        unchanged = node.path in self._table.opened
        self._table.note_opened(node.path)
        if truncate and (node.pending or node.version is not None):
            self._truncate(node)
        node.opens += 1
        node.used = self._shared.clock.wall()
        return unchanged

    def _truncate(self, node: Node) -> None:
        """The content is to go. If not all of it is here, it goes at once: after a crash between the record and the
        change, a file with holes must not be what is uploaded."""
        if not node.complete():
            with self._shared.tree.opened(node.path, os.O_WRONLY) as fd:
                os.ftruncate(fd, 0)
        self._begin(node)

    def _begin(self, node: Node) -> None:
        node.generation += 1
        node.last_change = self._shared.now()
        if not node.pending:
            self._table.begin_pending(node)

    async def open(self, path: str, *, write: bool, truncate: bool) -> bool:
        table = self._table
        node = await self._known(path)
        with table.lock:
            node.pins += 1
        try:
            if self._must_ask(node):
                await self._ask(node)
            if truncate:
                await self._room(node)
            while True:
                with table.lock:
                    if node.gone:
                        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                    if not write or truncate or node.complete():
                        return self._enter(node, truncate=truncate)
                await self._reader.need(node, 0, None)
        finally:
            self._unpin(node)

    async def _known(self, path: str) -> Node:
        with self._table.lock:
            node = self._table.find(path)
        if node is None:
            await self._listings.refresh(split(path)[0])
            with self._table.lock:
                node = self._table.find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node

    async def _ask(self, node: Node) -> None:
        try:
            await self._reader.ask(node)
        except FileNotFoundError:
            with self._table.lock:
                if node.pending or node.version is None:
                    return
                self._listings.touch(node.path)
                self._table.vanish(node)
            raise

    def _unpin(self, node: Node) -> None:
        with self._table.lock:
            node.pins -= 1
            self._table.rest(node)

    # -- read

    def read_here(self, path: str, offset: int, size: int) -> Node | None:
        """The file whose bytes have to be fetched first."""
        with self._table.lock:
            node = self._table.find(path)
            if node is None:
                return None
            here = node.has(offset, offset + size)
            ahead = self._reader.note_read(node, offset, size) if here else None
            if ahead is not None:
                self._shared.loop.call_soon_threadsafe(self._reader.ahead, node, *ahead)
            if not here:
                self._reader.note_miss(node, offset, size)
            return None if here else node

    # -- changes

    def created(self, path: str) -> None:
        with self._table.lock:
            self._listings.touch(path)
            self._table.forget_intents(path)
            node = self._table.add(path)
            node.opens = 1
            node.used = self._shared.clock.wall()
            self._table.note_opened(path)

    def modify_here(self, path: str) -> Node | None:
        """The file for which something has to be waited for first, pinned."""
        with self._table.lock:
            node = self._table.find(path)
            if node is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if node.complete() and self._has_room(node):
                self._begin(node)
                return None
            node.pins += 1
            return node

    async def modify(self, node: Node) -> None:
        try:
            await self._room(node)
            while True:
                with self._table.lock:
                    if node.complete():
                        self._begin(node)
                        return
                await self._reader.need(node, 0, None)
        finally:
            self._unpin(node)

    def _has_room(self, node: Node) -> bool:
        return node.pending or not self._table.pending or self._table.dirty_bytes < self._shared.settings.dirty_bytes

    async def _room(self, node: Node) -> None:
        """Waits while too much is pending; `ENOSPC` only when for a long time nothing at all could be uploaded."""
        since, succeeded = self._shared.now(), self._uploader.succeeded
        while not self._has_room(node):
            self._uploader.kick()
            await self._uploader.settled()
            if self._uploader.succeeded != succeeded:
                since, succeeded = self._shared.now(), self._uploader.succeeded
            elif self._shared.now() - since > self._shared.settings.room_seconds:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), node.path)

    # -- close

    def close(self, path: str, *, written: bool) -> None:
        with self._table.lock:
            node = self._table.nodes.get(path)
            if node is None:
                return
            node.opens = max(0, node.opens - 1)
            self._closed(node, written=written)
            self._table.rest(node)

    def _closed(self, node: Node, *, written: bool) -> None:
        if written and node.unsettled and not node.pending and node.version is not None:
            self._begin(node)  # its last change may have come behind the upload's look at it
        node.unsettled = node.unsettled and node.opens > 0
        if not node.pending or not (written or not node.opens):
            return
        found = self._shared.tree.status(node.path)
        if found is not None:
            node.size = found.st_size
            self._table.account(node)
        if written or not self._uploader.is_scheduled(node):
            self._uploader.closed(node)
