"""Changes of names: told to the backend at once, unless it does not know the file yet (PROTOCOL 6.4).

Each `..._here` is called by a FUSE thread under the table's lock and says whether that was all; if not, the coroutine
of the same name is to run on the loop. What the backend did is recorded, together with what the folder is still to do,
in one commit.
"""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import AsyncExitStack, suppress
from typing import Final

from hiverd.remote.listing import Listings
from hiverd.remote.node import Node
from hiverd.remote.reading import Reader
from hiverd.remote.shared import Shared
from hiverd.remote.state import Row
from hiverd.remote.uploads import Uploader

RESCUE_BYTES: Final = 64 << 20
"""An open file that is removed is fetched first, up to this size, as its readers may go on."""


class Changes:
    def __init__(self, shared: Shared, listings: Listings, reader: Reader, uploader: Uploader) -> None:
        self._shared = shared
        self._table = shared.table
        self._backend = shared.backend
        self._listings = listings
        self._reader = reader
        self._uploader = uploader

    # -- new ones

    async def make_directory(self, path: str) -> None:
        self._listings.touch(path)
        await self._backend.make_directory(path)
        with self._table.lock:
            self._listings.touch(path)
            self._table.forget_intents(path)
            self._table.state.save(Row(path, "directory", None, 0, 0))
            self._table.state.commit()
            self._listings.made(path)

    async def symlink(self, path: str, target: str) -> None:
        self._listings.touch(path)
        await self._backend.symlink(path, target)
        with self._table.lock:
            self._listings.touch(path)
            self._table.forget_intents(path)
            self._table.state.save(Row(path, "link", None, 0, 0, target))
            self._table.state.commit()

    # -- removal

    def unlink_here(self, path: str) -> bool:
        kind = self._table.kind_of(path)
        if kind == "file":
            node = self._table.find(path)
            if node is not None and (node.version is not None or node.lock.locked()):
                return False
            self._forget(path, node)
            return True
        return kind is None

    async def unlink(self, path: str) -> None:
        self._listings.touch(path)
        with self._table.lock:
            node = self._table.find(path)
        if node is None:
            await self._delete(path)
            with self._table.lock:
                self._forget(path, None)
            return
        async with node.lock:
            if node.version is not None:
                await self._rescue(node)
                await self._delete(path)
            with self._table.lock:
                self._forget(path, node)

    def _forget(self, path: str, node: Node | None) -> None:
        self._listings.touch(path)
        self._table.intend(path, None)
        if node is not None:
            self._table.remove(node)
        else:
            self._table.state.delete(path)
        self._table.state.commit()

    async def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            await self._backend.delete(path)

    async def _rescue(self, node: Node) -> None:
        with self._table.lock:
            needed = node.opens > 0 and not node.complete() and node.size <= RESCUE_BYTES
        if needed:
            with suppress(Exception):
                await self._reader.need(node, 0, None)

    async def remove_directory(self, path: str) -> None:
        with self._table.lock:
            if self._has_entries(path):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
            if self._table.kind_of(path) is None:
                return
        self._listings.touch(path)
        await self._delete(path)
        with self._table.lock:
            self._forget(path, None)
            self._listings.forget(path)

    def _has_entries(self, path: str) -> bool:
        return bool(self._table.hot_below(path) or self._table.state.children(path))

    # -- renames

    def rename_here(self, source: str, target: str) -> bool:
        table = self._table
        if source == target or table.kind_of(source) is None:
            return True
        if table.kind_of(source) != "file" or table.kind_of(target) not in {"file", None}:
            return False
        node, replaced = table.find(source), table.find(target)
        if node is None or node.version is not None or node.lock.locked():
            return False
        if replaced is not None and replaced.lock.locked():
            return False
        self._rename_new(node, replaced, target)
        return True

    def _rename_new(self, node: Node, replaced: Node | None, target: str) -> None:
        """The backend does not have it: it is uploaded under its new name, as a successor of what was there."""
        base = replaced.version if replaced is not None else None
        self._move_node(node, replaced, target)
        if base is not None:
            node.version = base
            if node.pending:
                self._table.save(node)
            else:  # never written, so that what it replaces is now empty
                self._table.begin_pending(node)
                self._uploader.closed(node)
        self._table.state.commit()

    def _move_node(self, node: Node, replaced: Node | None, target: str) -> None:
        table = self._table
        source = node.path
        self._listings.touch(source)
        self._listings.touch(target)
        table.intend(source, target)
        table.forget_intents(target)
        if replaced is not None:
            table.remove(replaced)
        table.state.delete(source)
        table.rename(node, target)
        table.save(node)

    async def rename(self, source: str, target: str) -> None:
        with self._table.lock:
            kind, replaced_kind = self._table.kind_of(source), self._table.kind_of(target)
        self._listings.touch(source)
        self._listings.touch(target)
        if kind == "directory":
            await self._rename_directory(source, target, replaced=replaced_kind is not None)
            return
        if replaced_kind == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
        if replaced_kind == "link":
            await self._delete(target)
            with self._table.lock:
                self._table.state.delete(target)
        if kind == "link":
            await self._rename_link(source, target)
        else:
            await self._rename_file(source, target)

    async def _rename_file(self, source: str, target: str) -> None:
        table = self._table
        with table.lock:
            node, replaced = table.find(source), table.find(target)
            if node is None:
                return
            nodes = sorted((one for one in (node, replaced) if one is not None), key=lambda one: one.path)
            for one in nodes:
                one.pins += 1
        try:
            async with AsyncExitStack() as stack:
                for one in nodes:
                    await stack.enter_async_context(one.lock)
                await self._rename_locked(node, replaced, target)
        finally:
            with table.lock:
                for one in nodes:
                    one.pins -= 1
                    table.rest(one)

    async def _rename_locked(self, node: Node, replaced: Node | None, target: str) -> None:
        source = node.path
        if node.version is not None and node.pending:
            await self._uploader.upload(node)
        if replaced is not None and replaced.opens:
            await self._rescue(replaced)
        version = node.version
        if version is not None:
            await self._backend.move(source, target)
            with suppress(Exception):
                version = (await self._backend.stat(target)).version
        with self._table.lock:
            if replaced is None:  # it may have come meanwhile
                replaced = self._table.find(target)
            if version is None:
                self._rename_new(node, replaced, target)
                return
            node.version = version
            self._move_node(node, replaced, target)
            self._table.state.commit()

    async def _rename_link(self, source: str, target: str) -> None:
        table = self._table
        await self._backend.move(source, target)
        with table.lock:
            replaced = table.find(target)
            if replaced is not None:
                table.remove(replaced)
            row = table.state.load(source)
            table.intend(source, target)
            table.forget_intents(target)
            table.state.delete(source)
            if row is not None:
                table.state.save(row._replace(path=target))
            table.state.commit()

    async def _rename_directory(self, source: str, target: str, *, replaced: bool) -> None:
        table = self._table
        with table.lock:
            if replaced and table.kind_of(target) != "directory":
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), target)
            if self._has_entries(target):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), target)
            if target.startswith(source + "/"):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), target)
        self._uploader.hold(source)
        try:
            await self._settle(source)
            if replaced:
                await self._delete(target)
            await self._backend.move(source, target)
            with table.lock:
                table.intend(source, target)
                table.forget_intents(target)
                table.move_directory(source, target)
                self._listings.forget(source)
                self._listings.forget(target)
                self._listings.touch(source)
                self._listings.touch(target)
                table.state.commit()
        finally:
            self._uploader.release(source)

    async def _settle(self, directory: str) -> None:
        """Uploads what is pending below, and waits for what is on its way."""
        slots = asyncio.Semaphore(self._shared.settings.parallel_uploads)

        async def one(node: Node) -> None:
            async with slots:
                await self._uploader.force(node)

        with self._table.lock:
            nodes = [node for node in self._table.hot_below(directory) if node.pending]
        await asyncio.gather(*(one(node) for node in nodes))
