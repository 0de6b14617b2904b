"""The backend `onedrive`: a folder of OneDrive or of a SharePoint library, through Microsoft Graph (PROTOCOL 4.2).

What a mount shows is told in `naming`. Beyond that:

- Names that differ only in case mean the same item.
- Deleting moves to the recycle bin.
- Writes are conditional by the service: `If-Match` with the item's eTag, or `fail` where nothing is expected. A link
  lies beside its name, so it is looked for right before instead.
- A move onto a file asks the service to replace it; where it does not, the file goes to the recycle bin just before.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

from hiver_storage.names import split
from hiver_storage.retrying import Locks, Patience, collected, error
from hiverd.contracts.errors import InvalidError
from hiverd.contracts.filesystem import FileSystem, Info, VersionConflictError

from .auth import text
from .graph import Graph
from .naming import LINK_SUFFIX, Item, decode, encode, info
from .reading import read
from .upload import SMALL_BYTES, Condition, Upload

_LINKS_AT_ONCE: Final = 8
_TARGETS: Final = 10_000

Names = tuple[str, ...]
"""OneDrive's, from the drive's root on."""


class OneDriveFileSystem(FileSystem):
    """Members `onedrive_*` of the configuration. `open` makes the clients."""

    backend: ClassVar[str] = "onedrive"
    case_sensitive: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        try:
            self._prefix = encode(split("/" + text(config, "onedrive_prefix").strip("/")))
        except OSError:
            raise InvalidError(
                "onedrive_prefix must be a path without `.`, `..` and `//`", field="onedrive_prefix"
            ) from None
        self._graph = Graph(config)
        self._locks = Locks()
        self._targets: dict[tuple[str, str], str] = {}
        self._started = datetime.now(UTC)

    def __repr__(self) -> str:
        return "<OneDriveFileSystem>"

    @property
    def patience(self) -> Patience:
        return self._graph.patience

    async def open(self) -> None:
        self._graph.open()

    async def close(self) -> None:
        await self._graph.close()

    # -- looking ------------------------------------------------------------------------------------------------------

    async def stat(self, path: str) -> Info:
        """Raises FileNotFoundError. A link is described itself."""
        names = self._names(path)
        if path == "/":
            return Info(path, 0, self._started, is_dir=True)
        item, link = await self._look(names)
        if item is not None:
            return info(item, path)
        if link is not None:
            return info(link, path, await self._target(names, link))
        raise error(errno.ENOENT, path)

    async def _look(self, names: Names) -> tuple[Item | None, Item | None]:
        """What is there, and if there is nothing, the link that may lie beside."""
        item = await self._graph.item(names)
        if item is not None:
            return item, None
        return None, await self._link(names)

    async def _link(self, names: Names) -> Item | None:
        link = await self._graph.item(_beside(names))
        return link if link is not None and link.is_link else None

    async def list_directory(self, path: str) -> AsyncIterator[Info]:
        """Raises FileNotFoundError, NotADirectoryError. Links cost a request each when they are first seen."""
        names = self._names(path)
        items: list[Item] = []
        try:
            items = [item async for item in self._graph.children(names)]
        except FileNotFoundError:
            if path != "/":
                raise error(errno.ENOENT, path) from None
        if not items and path != "/" and not (await self._existing(names, path)).is_dir:
            raise error(errno.ENOTDIR, path)
        base = path.rstrip("/")
        shown = {item.name.casefold() for item in items if not item.has_link_name}
        for item in items:
            if not item.has_link_name:
                yield info(item, f"{base}/{decode(item.name)}")
        links = [item for item in items if item.is_link and _stem(item).casefold() not in shown]
        gate = asyncio.Semaphore(_LINKS_AT_ONCE)

        async def described(link: Item) -> Info:
            async with gate:
                target = await self._target((*names, _stem(link)), link)
            return info(link, f"{base}/{decode(_stem(link))}", target)

        for link in await asyncio.gather(*map(described, links)):
            yield link

    async def _existing(self, names: Names, path: str) -> Item:
        item = await self._graph.item(names)
        if item is None:
            raise error(errno.ENOENT, path)
        return item

    async def _target(self, names: Names, link: Item) -> str:
        """Read once per version."""
        key = link.id, link.version
        if key not in self._targets:
            data = b"".join([piece async for piece in read(self._graph, _beside(names), "", 0, None)])
            while len(self._targets) >= _TARGETS:
                del self._targets[next(iter(self._targets))]
            self._targets[key] = os.fsdecode(data)
        return self._targets[key]

    async def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        """Raises FileNotFoundError; EISDIR. A request for the address of the content, and one for the content."""
        async with aclosing(read(self._graph, self._names(path), path, offset, size)) as pieces:
            async for piece in pieces:
                yield piece

    # -- changing -----------------------------------------------------------------------------------------------------

    async def write(self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None) -> Info:
        names = self._names(path, changing=True)
        data = await collected(content, size) if size <= SMALL_BYTES else None
        async with self._locks(_folded(names)):
            condition, clear_link = await self._condition(names, expected_version, path)
            if data is not None:
                item = await self._put(names, data, condition, path)
            else:
                item = await self._put_big(names, content, size, condition, path)
            if clear_link:
                await self._graph.remove(_beside(names))
            return info(item, path)

    async def _condition(self, names: Names, expected: str | None, path: str) -> tuple[Condition, bool]:
        """And whether there may be a link that the file takes the place of."""
        if expected is None:
            return Condition(), True
        if not expected:
            if await self._link(names) is not None:
                raise VersionConflictError(errno.EEXIST, "there is a link", path)
            return Condition(absent=True), False
        item, link = await self._look(names)
        current = item or link
        if current is None or current.is_dir or current.version != expected:
            raise VersionConflictError(errno.EEXIST, "changed meanwhile", path)
        return (Condition(absent=True), True) if item is None else (Condition(etag=item.etag), False)

    async def _put(self, names: Names, data: bytes, condition: Condition, path: str) -> Item:
        upload = Upload(self._graph, names, condition, path)
        item = await upload.small(data)
        if item is None:
            await self._make(names[:-1], path)
            item = await upload.small(data)
        if item is None:
            raise OSError(errno.EIO, "the folder of the file vanished", path)
        return item

    async def _put_big(
        self, names: Names, content: AsyncIterator[bytes], size: int, condition: Condition, path: str
    ) -> Item:
        if len(names) > 1 and await self._graph.item(names[:-1]) is None:
            await self._make(names[:-1], path)
        item = await Upload(self._graph, names, condition, path).big(content, size)
        if item is None:
            raise OSError(errno.EIO, "the folder of the file vanished", path)
        return item

    async def make_directory(self, path: str) -> None:
        """Raises FileExistsError, NotADirectoryError where a file is in the way."""
        names = self._names(path)
        item, link = await self._look(names) if names else (None, None)
        if link is not None or (item is not None and not item.is_dir):
            raise error(errno.EEXIST, path)
        if item is None:
            await self._make(names, path)

    async def _make(self, names: Names, path: str) -> None:
        """A folder with missing parents; one that exists is a success."""
        if not names:
            return
        body = {"name": names[-1], "folder": {}, "@microsoft.graph.conflictBehavior": "fail"}
        url = self._graph.url(names[:-1], "children")
        response = await self._graph.ask("POST", url, json=body, also=(404, 409))
        if response.status_code == 404:
            await self._make(names[:-1], path)
            response = await self._graph.ask("POST", url, json=body, also=(409,))
        if response.status_code == 409:
            item = await self._graph.item(names)
            if item is None or not item.is_dir:
                raise error(errno.ENOTDIR, path)

    async def symlink(self, path: str, target: str) -> None:
        names = self._names(path, changing=True)
        if not target:
            raise error(errno.ENOENT, path)  # as Linux says
        async with self._locks(_folded(names)):
            item = await self._graph.item(names)
            if item is not None and item.is_dir:
                raise error(errno.EISDIR, path)
            await self._put(_beside(names), os.fsencode(target), Condition(), path)
            if item is not None:
                await self._graph.remove(names)

    async def delete(self, path: str) -> None:
        """Into the recycle bin."""
        names = self._names(path, changing=True)
        async with self._locks(_folded(names)):
            item = await self._graph.item(names)
            if item is not None and item.is_dir:
                await self._require_empty(names, path)
            else:
                await self._graph.remove(_beside(names))
            if item is not None:
                await self._graph.remove(names)

    async def _require_empty(self, names: Names, path: str) -> None:
        async for _ in self._graph.children(names, at_most=1):
            raise error(errno.ENOTEMPTY, path)

    async def move(self, source: str, target: str) -> None:
        from_names, to_names = self._names(source, changing=True), self._names(target, changing=True)
        async with self._locks(_folded(from_names), _folded(to_names)):
            item, link = await self._look(from_names)
            if item is None and link is None:
                raise error(errno.ENOENT, source)
            if source == target:
                return
            if _folded(to_names)[: len(from_names)] == _folded(from_names) and len(to_names) > len(from_names):
                raise error(errno.EINVAL, target)
            renamed = _folded(from_names) == _folded(to_names)
            there = None if renamed else await self._graph.item(to_names)
            if there is not None:
                await self._require_room(there, to_names, target, moves_directory=item is not None and item.is_dir)
            if item is not None:
                await self._relocate(item, from_names, to_names, target)
                if not item.is_dir and not renamed:
                    await self._graph.remove(_beside(to_names))
            elif link is not None:
                await self._relocate(link, _beside(from_names), _beside(to_names), target)
                if there is not None:
                    await self._graph.remove(to_names)

    async def _require_room(self, there: Item, names: Names, path: str, *, moves_directory: bool) -> None:
        if there.is_dir != moves_directory:
            raise error(errno.EISDIR if there.is_dir else errno.ENOTDIR, path)
        if there.is_dir:
            await self._require_empty(names, path)
            await self._graph.remove(names)

    async def _relocate(self, item: Item, from_names: Names, to_names: Names, path: str) -> None:
        changes: dict[str, Any] = {"name": to_names[-1], "@microsoft.graph.conflictBehavior": "replace"}
        if _folded(from_names[:-1]) != _folded(to_names[:-1]):
            changes["parentReference"] = {"id": (await self._parent(to_names[:-1], path)).id}
        response = await self._graph.change(item, changes, also=(409,))
        if response.status_code == 409:
            # The service does not replace; what is there was seen to be a file, or a link that goes as well.
            await self._graph.remove(to_names)
            await self._graph.change(item, changes)

    async def _parent(self, names: Names, path: str) -> Item:
        parent = await self._graph.item(names)
        if parent is None:
            await self._make(names, path)
            parent = await self._existing(names, path)
        if not parent.is_dir:
            raise error(errno.ENOTDIR, path)
        return parent

    def _names(self, path: str, *, changing: bool = False) -> Names:
        names = encode(split(path))
        if changing and not names:
            raise error(errno.EBUSY, path)
        return (*self._prefix, *names)


def _beside(names: Sequence[str]) -> Names:
    """Where the link of that name lies."""
    return (*names[:-1], names[-1] + LINK_SUFFIX)


def _stem(link: Item) -> str:
    return link.name[: -len(LINK_SUFFIX)]


def _folded(names: Sequence[str]) -> Names:
    return tuple(name.casefold() for name in names)


__all__ = ["OneDriveFileSystem"]
