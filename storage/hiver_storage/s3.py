"""The backend `s3`: a bucket of Amazon S3 or a service that speaks as it does (PROTOCOL 4.2).

Versions are entity tags, conditions are `If-Match` and `If-None-Match`. A link is an object beside its name,
`<path>.symlink`, that holds the target (PROTOCOL 6.4); a file of such a name that we write says so in its metadata.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar, Final

from msgspec.structs import replace

from hiverd.contracts.filesystem import ABSENT, VersionConflictError

from .keys import prefix_of
from .names import UNDECODABLE, Names
from .object_files import PARALLEL, ObjectFileSystem
from .object_store import Stored
from .s3_store import LINK_BYTES, LINK_VERSION, S3Store

_NAMES: Final = Names(UNDECODABLE)
_SIDE: Final = ".symlink"


class S3FileSystem(ObjectFileSystem):
    """`s3_bucket`, `s3_access_key_id` and `s3_secret_access_key` are required; the host's own rights are never used."""

    backend: ClassVar[str] = "s3"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._s3 = S3Store(config)
        super().__init__(config, self._s3, prefix_of(config, "s3_prefix"), _NAMES)

    async def _find(self, key: str) -> Stored:
        try:
            found = await super()._find(key)
        except FileNotFoundError:
            found = None
        if found is not None and not _may_be_side(found):
            return found
        link = await self._side(key)
        if link is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return link

    async def _side(self, key: str) -> Stored | None:
        """The link beside this key."""
        return await self._call(lambda: self._s3.side(key + _SIDE))

    async def _drop_side(self, key: str) -> None:
        if (link := await self._side(key)) is not None:
            await self._call(lambda: self._s3.remove(link.key))

    async def _resolve(self, objects: list[Stored]) -> list[tuple[str, Stored]]:
        gate = asyncio.Semaphore(PARALLEL)

        async def one(found: Stored) -> tuple[str, Stored]:
            if not _may_be_side(found):
                return found.key, found
            key = found.key.removesuffix(_SIDE)
            async with gate:
                link = await self._side(key)
            return found.key, found if link is None else replace(link, key=key)

        return list(await asyncio.gather(*map(one, objects)))

    async def _write(self, key: str, content: AsyncIterator[bytes], size: int, condition: str | None) -> Stored:
        """A link beside a file that is expected not to exist is not looked for: that would double each upload."""
        if condition is not None and condition.startswith(LINK_VERSION):
            link = await self._side(key)
            if link is None or link.version != condition:
                raise VersionConflictError(errno.EEXIST, "the object is of another version")
            stored = await super()._write(key, content, size, ABSENT)
        else:
            stored = await super()._write(key, content, size, condition)
            if condition is not None:
                return stored
        await self._drop_side(key)
        return stored

    async def _link(self, key: str, target: str) -> None:
        """The file goes last: until then it hides the link."""
        await self._call(lambda: self._s3.put(key + _SIDE, os.fsencode(target), None, {}))
        await self._call(lambda: self._s3.remove(key))

    async def _replace(self, found: Stored, key: str) -> None:
        if found.link_target is None:
            await super()._replace(found, key)
            await self._drop_side(key)
        else:
            await super()._replace(found, key + _SIDE)
            await self._call(lambda: self._s3.remove(key))

    async def _remove(self, found: Stored) -> None:
        """A link that the file hides goes first, so that it does not appear."""
        if found.link_target is None:
            await self._drop_side(found.key)
        await super()._remove(found)


def _may_be_side(found: Stored) -> bool:
    return found.key.endswith(_SIDE) and found.size <= LINK_BYTES and found.write is None
