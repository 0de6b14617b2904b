"""A file system on a bucket: paths, directories, links and moves, told to a `Store`.

A directory is an object `dir/` of no bytes, or is implied by an object below it. Directories have no times of their
own. A link is an object of no bytes whose metadata hold the target. If a key and keys below it both exist, the file
hides what is below; nothing that we do makes such keys, and neither is lost.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

from hiverd.contracts.filesystem import FileSystem, Info

from .failures import Patience, persist
from .keys import Keys, clean_path, encode_target, parent
from .names import Names
from .object_reads import read_object
from .object_store import LINK, Page, Store, Stored
from .object_writes import write_object
from .ordering import Once

T = TypeVar("T")

_NO_TIME: Final = datetime.fromtimestamp(0, UTC)
PARALLEL: Final = 16
_TARGET_BYTES: Final = 4095


class ObjectFileSystem(FileSystem):
    """A plug-in gives the store."""

    patience: Patience = Patience()

    def __init__(self, config: Mapping[str, Any], store: Store, prefix: str, names: Names) -> None:
        super().__init__(config)
        self.store = store
        self._keys = Keys(prefix, names)

    @property
    def _copying(self) -> Patience:
        """What the service does with large objects by itself takes its time."""
        return self.patience._replace(request_seconds=60 * self.patience.request_seconds)

    async def open(self) -> None:
        await self.store.open()

    async def close(self) -> None:
        await self.store.close()

    # -- looking ------------------------------------------------------------------------------------------------------

    async def stat(self, path: str) -> Info:
        path = clean_path(path)
        if path == "/":
            return _directory(path)
        try:
            return _info(path, await self._find(self._keys.file(path)))
        except FileNotFoundError:
            if await self._has_any(path):
                return _directory(path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None

    async def list_directory(self, path: str) -> AsyncIterator[Info]:
        path = clean_path(path)
        prefix = self._keys.directory(path)
        base = path.rstrip("/") + "/"
        once = Once()
        empty = path != "/"
        async for page in self._pages(prefix, flat=True):
            empty = empty and not (page.objects or page.prefixes)
            for order, name, found in await self._named(page, prefix):
                shown = self._keys.shown(name)
                if shown is not None and once.admits(order, name):
                    yield _directory(base + shown) if found is None else _info(base + shown, found)
        if empty:
            await self._explain_missing(path)

    async def _explain_missing(self, path: str) -> None:
        info = await self.stat(path)
        if not info.is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)

    async def _named(self, page: Page, prefix: str) -> list[tuple[str, str, Stored | None]]:
        """(key below the prefix, name, object or None for a directory) in the order of keys."""
        named: list[tuple[str, str, Stored | None]] = [
            (key.removeprefix(prefix), found.key.removeprefix(prefix), found)
            for key, found in await self._resolve(page.objects)
            if key != prefix
        ]
        named += [(key.removeprefix(prefix), key.removeprefix(prefix)[:-1], None) for key in page.prefixes]
        return sorted(named, key=lambda one: one[0])

    async def _has_any(self, path: str) -> bool:
        """Whether there is a marker of this directory, or anything below it."""
        page = await self._page(self._keys.directory(path), flat=False, limit=1)
        return bool(page.objects)

    async def _page(self, prefix: str, *, flat: bool, after: str | None = None, limit: int | None = None) -> Page:
        try:
            return await self._call(lambda: self.store.page(prefix, flat=flat, after=after, limit=limit))
        except FileNotFoundError:
            # To be told apart from a path that does not exist: nobody is to think that everything was deleted.
            raise OSError(errno.EIO, "the bucket does not exist") from None

    async def _pages(self, prefix: str, *, flat: bool) -> AsyncIterator[Page]:
        after: str | None = None
        while True:
            page = await self._page(prefix, flat=flat, after=after)
            yield page
            after = page.next
            if after is None:
                return

    async def _call(self, call: Callable[[], Awaitable[T]], *, patience: Patience | None = None) -> T:
        return await persist(patience or self.patience, self.store.translate, call)

    # -- reading ------------------------------------------------------------------------------------------------------

    async def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        """A read that breaks off goes on where it was, in the same version; `EAGAIN` if that has gone meanwhile."""
        pieces = read_object(self.store, self._call, self.patience, self._keys.file(path), offset, size)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    # -- writing ------------------------------------------------------------------------------------------------------

    async def write(self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None) -> Info:
        key = self._keys.file(path)
        return _info(clean_path(path), await self._write(key, content, size, expected_version))

    async def _write(self, key: str, content: AsyncIterator[bytes], size: int, condition: str | None) -> Stored:
        """`VersionConflictError` if the condition does not hold."""
        return await write_object(self.store, self._call, key, content, size, condition)

    async def make_directory(self, path: str) -> None:
        path = clean_path(path)
        try:
            info = await self.stat(path)
        except FileNotFoundError:
            await self._call(lambda: self.store.put(self._keys.directory(path), b"", None, {}))
            return
        if not info.is_dir:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    async def symlink(self, path: str, target: str) -> None:
        if len(os.fsencode(target)) > _TARGET_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        await self._link(self._keys.file(path), target)

    # -- removing and renaming ----------------------------------------------------------------------------------------

    async def delete(self, path: str) -> None:
        path = clean_path(path)
        key = self._keys.file(path)
        try:
            found = await self._find(key)
        except FileNotFoundError:
            removed = await self._delete_directory(path)
        else:
            await self._remove(found)
            removed = True
        if removed:
            await self._keep(parent(path))

    async def _delete_directory(self, path: str) -> bool:
        """False if there is none."""
        marker = self._keys.directory(path)
        page = await self._page(marker, flat=False, limit=2)
        if any(found.key != marker for found in page.objects):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        if page.objects:
            await self._call(lambda: self.store.remove(marker))
        return bool(page.objects)

    async def _keep(self, path: str) -> None:
        """A directory does not go with the last thing in it, also if only that implied it."""
        if path != "/" and not await self._has_any(path):
            await self._call(lambda: self.store.put(self._keys.directory(path), b"", None, {}))

    async def move(self, source: str, target: str) -> None:
        """A tree is copied as a whole before any of it is removed."""
        source, target = clean_path(source), clean_path(target)
        info = await self.stat(source)
        if source == target:
            return
        if target.startswith(source.rstrip("/") + "/"):
            raise OSError(errno.EINVAL, "a directory cannot be moved into itself", source)
        await self._require_replaceable(info, target)
        if info.is_dir:
            await self._move_tree(source, target)
        else:
            found = await self._find(self._keys.file(source))
            await self._replace(found, self._keys.file(target))
            await self._remove(found)
        await self._keep(parent(source))

    async def _require_replaceable(self, info: Info, target: str) -> None:
        """As rename(2)."""
        try:
            there = await self.stat(target)
        except FileNotFoundError:
            return
        if there.is_dir and not info.is_dir:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
        if info.is_dir and not there.is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), target)
        if info.is_dir:
            marker = self._keys.directory(target)
            page = await self._page(marker, flat=False, limit=2)
            if target == "/" or any(found.key != marker for found in page.objects):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), target)

    async def _move_tree(self, source: str, target: str) -> None:
        below, into = self._keys.directory(source), self._keys.directory(target)
        keys: list[str] = []
        async for page in self._pages(below, flat=False):
            copies = [(found, into + found.key.removeprefix(below)) for found in page.objects]
            await self._each([partial(self.store.copy, *one) for one in copies])
            keys += [found.key for found in page.objects]
        await self._each([partial(self.store.remove, key) for key in keys])

    async def _each(self, calls: list[Callable[[], Awaitable[None]]]) -> None:
        """Some at a time; the first error ends them all."""
        waiting = iter(calls)

        async def work() -> None:
            for call in waiting:
                await self._call(call, patience=self._copying)

        tasks = [asyncio.create_task(work(), name="object calls") for _ in range(min(PARALLEL, len(calls)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- what a service without metadata in listings does otherwise ----------------------------------------------------

    async def _find(self, key: str) -> Stored:
        """The file or link of this key."""
        return await self._call(lambda: self.store.head(key))

    async def _resolve(self, objects: list[Stored]) -> list[tuple[str, Stored]]:
        """What a listing's objects stand for, each with the key that it has in the order of keys."""
        return [(found.key, found) for found in objects]

    async def _link(self, key: str, target: str) -> None:
        """Puts a link there, whatever is there."""
        await self._call(lambda: self.store.put(key, b"", None, {LINK: encode_target(target)}))

    async def _replace(self, found: Stored, key: str) -> None:
        """Copies a file or a link over whatever file or link is there."""
        await self._call(lambda: self.store.copy(found, key), patience=self._copying)

    async def _remove(self, found: Stored) -> None:
        await self._call(lambda: self.store.remove(found.key))


def _directory(path: str) -> Info:
    return Info(path, 0, _NO_TIME, is_dir=True)


def _info(path: str, found: Stored) -> Info:
    size = 0 if found.link_target is not None else found.size
    return Info(path, size, found.mtime, is_dir=False, link_target=found.link_target, version=found.version)
