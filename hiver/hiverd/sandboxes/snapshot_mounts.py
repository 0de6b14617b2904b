"""Snapshots in a mount of the sandbox's own configuration: `snapshot.files.mount` (PROTOCOL 3.16).

One file per key, `snapshot-<key>.tar.zst` or `.tar.gz`, which is replaced in one step: a mount keeps no older versions.
Archives that other programs left there are read as well; nobody knows their checksum.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Final
from weakref import WeakValueDictionary

from msgspec import Struct

from hiverd.contracts.errors import BackendError, UnavailableError
from hiverd.contracts.snapshot import (
    SnapshotInfo,
    SnapshotStore,
    closing,
    damaged_snapshot,
    is_snapshot_key,
    missing_snapshot,
    new_version,
    version_time,
)
from hiverd.sandboxes.snapshot_places import Place
from hiverd.sandboxes.snapshot_spool import Spool, spooled
from hiverd.sandboxes.snapshot_trailers import SUFFIXES, TRAILER_MAX_BYTES, parsed, suffix_of, trailer

_PREFIX: Final = "snapshot-"
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Locks = WeakValueDictionary[str, asyncio.Lock]


class SnapshotReplacedError(UnavailableError):
    """A newer one has taken the place of the version that was being read."""


class _Found(Struct, frozen=True):
    info: SnapshotInfo
    name: str


class MountStore(SnapshotStore):
    """`place`: the mount. `spool`: a folder where an archive waits until it is known to be whole. `locks`: shared by
    all stores on the same mount; `identity` tells mounts apart."""

    name: ClassVar[str] = "mount"

    def __init__(self, place: Place, spool: Path, locks: Locks, identity: str) -> None:
        super().__init__({})
        self._place = place
        self._spool = spool
        self._locks = locks
        self._identity = identity

    async def put(self, key: str, content: AsyncIterator[bytes]) -> SnapshotInfo:
        async with spooled(self._spool, content) as spool:
            lock = self._locks.setdefault(f"{self._identity}\0{key}", asyncio.Lock())
            async with lock:
                return await self._commit(key, spool)

    async def _commit(self, key: str, spool: Spool) -> SnapshotInfo:
        before = await self._versions(key)
        version = new_version(datetime.now(UTC), before[0].info.version if before else None)
        end = trailer(spool.head, version, spool.sha256, spool.size)
        name = f"{_PREFIX}{key}{suffix_of(spool.head)}"
        with _told():
            await asyncio.to_thread(spool.finish, end)
            await self._place.write(name, spool, spool.size + len(end))
            for old in before:
                if old.name != name:
                    await self._place.remove(old.name)
        return _info(key, version, spool.size, spool.sha256)

    async def get(self, key: str, version: str | None = None) -> AsyncIterator[bytes]:
        found = await self._found(key, version)
        reading = _Reading(found.info)
        async with closing(self._place.read(found.name, 0, None)) as pieces:
            while True:
                with _told():
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                if ready := await asyncio.to_thread(reading.take, piece):
                    yield ready
        if last := reading.last():
            yield last
        reading.require_whole(version)

    async def list(self, key: str | None = None) -> AsyncIterator[SnapshotInfo]:
        keys = {key} if key is not None else await self._keys()
        for one in sorted(keys):
            for found in await self._versions(one):
                yield found.info

    async def delete(self, key: str, version: str | None = None) -> None:
        found = await self._versions(key) if version is None else [await self._found(key, version)]
        if not found:
            raise missing_snapshot(key)
        with _told():
            for one in found:
                await self._place.remove(one.name)

    async def _keys(self) -> set[str]:
        with _told():
            names = await self._place.names()
        return {key for name in names if (key := _key_of(name)) is not None}

    async def _found(self, key: str, version: str | None) -> _Found:
        for found in await self._versions(key):
            if version in {None, found.info.version}:
                return found
        raise missing_snapshot(key, version)

    async def _versions(self, key: str) -> tuple[_Found, ...]:
        """One, as a rule. More where another program left its own, or a writer died before it removed the last."""
        found = [await self._look(key, f"{_PREFIX}{key}{suffix}") for suffix in SUFFIXES]
        return tuple(sorted((one for one in found if one is not None), key=lambda one: one.info.version, reverse=True))

    async def _look(self, key: str, name: str) -> _Found | None:
        with _told():
            try:
                size, changed = await self._place.look(name)
                start = max(0, size - TRAILER_MAX_BYTES)
                async with closing(self._place.read(name, start, size - start)) as pieces:
                    tail = b"".join([piece async for piece in pieces])
            except FileNotFoundError:
                return None
        ours = parsed(tail, size)
        if ours is None:
            version = f"{changed.astimezone(UTC):%Y%m%dT%H%M%S%f}Z-00000000"
            return _Found(SnapshotInfo(key=key, version=version, bytes=size, created_at=changed), name)
        return _Found(_info(key, ours[0], ours[2], ours[1]), name)


class _Reading:
    """The archive out of the pieces of a file. It may be another file than the one that was looked at before: so what
    it ought to be comes from its own end, which is held back meanwhile."""

    def __init__(self, info: SnapshotInfo) -> None:
        self._info = info
        self._held = b""
        self._digest = hashlib.sha256()
        self._size = 0
        self._told: tuple[str, str, int] | None = None

    def take(self, piece: bytes) -> bytes:
        """What is certainly no part of a trailer."""
        self._size += len(piece)
        self._held += piece
        ready, self._held = self._held[:-TRAILER_MAX_BYTES], self._held[-TRAILER_MAX_BYTES:]
        self._digest.update(ready)
        return ready

    def last(self) -> bytes:
        """What is left of the archive after the last piece."""
        self._told = parsed(self._held, self._size)
        if self._told is not None:
            self._held = self._held[: len(self._held) - (self._size - self._told[2])]
        self._digest.update(self._held)
        return self._held

    def require_whole(self, version: str | None) -> None:
        """Raises `SnapshotDamagedError`, or `SnapshotReplacedError` if it is not the version that was asked for."""
        if self._told is None:
            if self._info.sha256 is not None:
                raise damaged_snapshot(self._info)
            return
        if self._digest.hexdigest() != self._told[1]:
            raise damaged_snapshot(self._info)
        if version not in {None, self._told[0]}:
            raise SnapshotReplacedError(f'snapshot "{self._info.key}" was replaced while it was read')


def _key_of(name: str) -> str | None:
    for suffix in SUFFIXES:
        if name.startswith(_PREFIX) and name.endswith(suffix):
            key = name[len(_PREFIX) : -len(suffix)]
            return key if is_snapshot_key(key) else None
    return None


def _info(key: str, version: str, size: int, sha256: str) -> SnapshotInfo:
    moment = version_time(version)
    assert moment is not None  # noqa: S101 -- it was made, or parsed, as one
    return SnapshotInfo(key=key, version=version, bytes=size, created_at=moment, sha256=sha256)


@contextmanager
def _told() -> Iterator[None]:
    """`OSError` as an error of the contract. Plug-ins' texts hold no credentials, numbers hold even less."""
    what = "the mount that keeps the snapshot"
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UnavailableError(f"{what} is full; the snapshots in it are as they were") from error
        if isinstance(error, PermissionError):
            raise BackendError(f"{what} refuses this server") from error
        raise UnavailableError(f"{what} failed: {error.strerror or type(error).__name__}") from error
