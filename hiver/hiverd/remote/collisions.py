"""The backend has another version than the one that ours was made from: both are kept."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Protocol

from hiverd.remote.calls import Remote
from hiverd.remote.conflicts import conflict_name
from hiverd.remote.listing import Listings
from hiverd.remote.node import Node
from hiverd.remote.ranges import Ranges
from hiverd.remote.shared import Shared
from hiverd.remote.tree import join, split

log = logging.getLogger(__name__)


class _Uploaded(Protocol):
    def __call__(self, node: Node, remote: Remote, fd: int, *, unchanged: bool) -> None: ...


class Collisions:
    def __init__(
        self,
        shared: Shared,
        listings: Listings,
        *,
        schedule: Callable[[Node, float], None],
        uploaded: _Uploaded,
    ) -> None:
        self._shared = shared
        self._table = shared.table
        self._settings = shared.settings
        self._listings = listings
        self._schedule = schedule
        self._uploaded = uploaded

    async def settle(self, node: Node) -> None:
        """The backend has something else than ours was made from. Theirs stays; ours goes beside it."""
        table = self._table
        try:
            theirs = await self._shared.backend.stat(node.path)
        except FileNotFoundError:
            with table.lock:  # it has gone: ours is a new one
                node.version = None
                self._again(node)
            return
        if theirs.kind == "file" and await self._is_alike(node, theirs):
            return
        await asyncio.to_thread(self._keep_both, node, theirs)

    def _again(self, node: Node) -> None:
        self._table.save(node)
        self._schedule(node, self._shared.now())

    async def _is_alike(self, node: Node, theirs: Remote) -> bool:
        """Whether the backend has our content: then an earlier upload did arrive, and only its answer did not."""
        with self._shared.tree.opened(node.path, os.O_RDONLY) as fd:
            generation, status = node.generation, os.fstat(fd)
            if status.st_size != theirs.size:
                return False
            offset = 0
            async with aclosing(self._shared.backend.read(node.path, 0, None)) as pieces:
                async for piece in pieces:
                    if piece != await asyncio.to_thread(os.pread, fd, len(piece), offset):
                        return False
                    offset += len(piece)
            if offset != theirs.size or (await self._shared.backend.stat(node.path)).version != theirs.version:
                return False
            with self._table.lock:
                self._listings.touch(node.path)
                self._uploaded(node, theirs, fd, unchanged=not node.opens and node.generation == generation)
        return True

    def _keep_both(self, node: Node, theirs: Remote) -> None:
        """In the folder and the database; the copy is then uploaded as any new file is. In a worker thread."""
        table = self._table
        with table.lock:
            generation, path = node.generation, node.path
            parent, name = split(path)
            taken = {split(row.path)[1] for row in table.state.children(parent)}
            taken.update(split(other)[1] for other in table.nodes if split(other)[0] == parent)
        copy_path = self._copy(path, name, taken)
        with table.lock:
            self._listings.touch(path)
            self._listings.touch(copy_path)
            copy = table.add(copy_path)
            found = self._shared.tree.status(copy_path)
            copy.size = found.st_size if found is not None else 0
            if node.gone or node.generation != generation or not node.pending:
                table.remove(copy)  # it may hold two states of the file
                self._shared.tree.remove(copy_path)
                if node.pending:
                    self._schedule(node, self._shared.now() + self._settings.quiet_seconds)
                return
            self._resolve(node, theirs, copy)
        log.warning("%s: the service has another version; ours is kept as %s", path, copy_path)

    def _copy(self, path: str, name: str, taken: set[str]) -> str:
        while True:
            chosen = conflict_name(name, self._shared.clock.wall(), taken)
            with suppress(FileExistsError):
                self._shared.tree.copy_beside(path, chosen)
                return join(split(path)[0], chosen)
            taken.add(chosen)

    def _pend_copy(self, copy: Node) -> None:
        self._table.begin_pending(copy)
        self._table.changed(copy.path)
        self._schedule(copy, self._shared.now())

    def _resolve(self, node: Node, theirs: Remote, copy: Node) -> None:
        table = self._table
        node.pending = False
        node.attempts, node.error = 0, None
        if theirs.kind != "file":  # a directory or a link has taken the name
            table.remove(node)
            self._shared.tree.remove(node.path)
            self._pend_copy(copy)
            self._listings.forget(split(node.path)[0])
            return
        ours = (node.version or "~ours", node.size, node.mtime_ns)
        node.present = Ranges()
        node.version, node.size, node.mtime_ns = theirs.version, theirs.size, theirs.mtime_ns
        table.save(node)
        self._pend_copy(copy)  # commits both
        if node.opens:  # those who have it open keep ours, until they close it
            node.version, node.size, node.mtime_ns = ours
            node.present = Ranges.whole(node.size)
            node.behind = theirs
        else:
            table.reset(node, theirs.size, theirs.mtime_ns)
        table.changed(node.path)
