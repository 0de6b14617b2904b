"""Snapshots wherever fsspec reaches: `gs://bucket/prefix`, `s3://bucket/prefix`, `file:///folder`.

An object store has no rename, so a version is two objects: the archive, under a name that nobody looks for, and then a
marker whose name says all there is to know about it. The marker is what makes the version visible, and goes first when
it is deleted. An archive without one is a dead writer's.

    <url>/<key>/data-<server>-<random>.tar.zst
    <url>/<key>/<version>.<bytes>.<sha256>.<name of the archive>.snapshot

Credentials are the business of the library for the scheme and come from the environment that it reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final

from msgspec import Struct

from hiver_snapshots.threads import Threads
from hiver_snapshots.uploads import DATA, Place, Upload
from hiver_snapshots.urls import location
from hiverd.contracts.errors import BackendError, HiverError, UnavailableError
from hiverd.contracts.snapshot import (
    SnapshotInfo,
    SnapshotStore,
    damaged_snapshot,
    is_snapshot_key,
    missing_snapshot,
    new_version,
    verified,
    version_time,
)

log = logging.getLogger(__name__)

_MARKER: Final = re.compile(r"([0-9TZ]+-[0-9a-f]{8})\.(\d+)\.([0-9a-f]{64})\.(data-[0-9a-z.-]+)\.snapshot")
_OURS: Final = frozenset({"keep", "path", "url", "instance", "memory"})
_READ_BYTES: Final = 8 << 20
_FORGOTTEN: Final = timedelta(days=1)
"""After this time an archive without a marker that another server began is a dead writer's, too."""


class _Version(Struct, frozen=True):
    info: SnapshotInfo
    marker: str
    data: str


class RemoteStore(SnapshotStore):
    """Options besides the contract's go to the library: `{"endpoint_url": "https://minio.example"}`."""

    name: ClassVar[str] = "remote"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._location = location(str(options.get("url", "")), memory=bool(options.get("memory")))
        self._instance = re.sub(r"[^0-9a-z]", "", str(options["instance"]).lower())
        self._keep = int(options["keep"])
        self._threads = Threads()
        self._naming = threading.Lock()
        """Held while a version gets its name and becomes visible: the last to be complete is the newest."""
        self._making = threading.Lock()
        self._place: Place | None = None

    async def start(self) -> None:
        with self._told():
            await self._threads.run(self._sweep)

    async def put(self, key: str, content: AsyncIterator[bytes]) -> SnapshotInfo:
        with self._told():
            upload = Upload(await self._threads.run(self._reached), key, self._instance)
        try:
            await self._threads.write(content, upload.write, self._told)
            with self._told():
                return await self._threads.run(self._publish, upload, key)
        finally:
            await self._threads.settle(upload.discard)

    async def get(self, key: str, version: str | None = None) -> AsyncIterator[bytes]:
        with self._told():
            found = await self._threads.run(self._found, key, version)
            first = await self._threads.run(self._read, found, 0)
        async for piece in verified(found.info, self._pieces(found, first)):
            yield piece

    async def _pieces(self, found: _Version, piece: bytes) -> AsyncIterator[bytes]:
        position = 0
        while piece:
            yield piece
            position += len(piece)
            with self._told():
                piece = await self._threads.run(self._read, found, position)

    async def list(self, key: str | None = None) -> AsyncIterator[SnapshotInfo]:
        with self._told():
            keys = [key] if key is not None else await self._threads.run(self._keys)
        for one in keys:
            with self._told():
                found = await self._threads.run(self._versions, one)
            for version in found:
                yield version.info

    async def delete(self, key: str, version: str | None = None) -> None:
        with self._told():
            await self._threads.run(self._delete, key, version)

    async def close(self) -> None:
        self._threads.close()

    # -- what blocks --------------------------------------------------------------------------------------------------

    def _reached(self) -> Place:
        """Made when it is first needed: finding credentials may ask the network."""
        with self._making:
            if self._place is None:
                options = {name: value for name, value in self.options.items() if name not in _OURS}
                self._place = Place(self._location.url, options)
            return self._place

    def _publish(self, upload: Upload, key: str) -> SnapshotInfo:
        upload.finish()
        place = self._reached()
        with self._naming:
            found = self._versions(key)
            version = new_version(datetime.now(UTC), found[0].info.version if found else None)
            marker = f"{key}/{version}.{upload.size}.{upload.sha256}.{upload.name}.snapshot"
            try:
                place.write_whole(marker, b'{"see": "the name"}\n')
            except BaseException:
                # An answer may have been lost on its way: a marker without an archive would be worse than the reverse.
                try:
                    place.remove(marker)
                except BaseException:
                    upload.keep()
                    raise
                raise
        upload.keep()
        self._prune(key)
        published = _version_of(key, marker.partition("/")[2])
        assert published is not None  # noqa: S101 -- it was named right above
        return published.info

    def _prune(self, key: str) -> None:
        with contextlib.suppress(Exception):  # it is there; what is too many goes with the next one
            for old in self._versions(key)[self._keep :]:
                self._remove(old)

    def _read(self, found: _Version, position: int) -> bytes:
        end = min(found.info.bytes, position + _READ_BYTES)
        if position >= end:
            return b""
        place = self._reached()
        try:
            return bytes(place.files.cat_file(f"{place.root}/{found.data}", start=position, end=end))
        except FileNotFoundError:
            if any(version.marker == found.marker for version in self._versions(found.info.key)):
                raise damaged_snapshot(found.info) from None
            raise missing_snapshot(found.info.key, found.info.version) from None

    def _keys(self) -> Sequence[str]:
        return [name for name in self._reached().names() if is_snapshot_key(name)]

    def _versions(self, key: str) -> Sequence[_Version]:
        """Newest first."""
        found = [_version_of(key, name) for name in self._reached().names(key)]
        return sorted((one for one in found if one is not None), key=lambda one: one.info.version, reverse=True)

    def _found(self, key: str, version: str | None) -> _Version:
        for one in self._versions(key):
            if version in {None, one.info.version}:
                return one
        raise missing_snapshot(key, version)

    def _delete(self, key: str, version: str | None) -> None:
        found = self._versions(key) if version is None else [self._found(key, version)]
        if not found:
            raise missing_snapshot(key)
        for one in found:
            self._remove(one)

    def _remove(self, version: _Version) -> None:
        place = self._reached()
        place.remove(version.marker)
        place.remove(version.data)
        place.remove_folder_if_empty(version.info.key)

    def _sweep(self) -> None:
        place = self._reached()
        for key in self._keys():
            names = place.names(key)
            known = {version.data for name in names if (version := _version_of(key, name)) is not None}
            for name in names:
                path = f"{key}/{name}"
                if name.startswith(DATA) and path not in known and self._is_dead(place, path, name):
                    log.info("removing an unfinished snapshot of key %s", key)
                    place.remove(path)
            place.remove_folder_if_empty(key)

    def _is_dead(self, place: Place, path: str, name: str) -> bool:
        """This server has only just started, so whatever it began is."""
        if name.startswith(f"{DATA}{self._instance}-"):
            return True
        try:
            modified = place.files.modified(f"{place.root}/{path}")
        except (FileNotFoundError, NotImplementedError):
            return False
        return bool(datetime.now(UTC) - modified.astimezone(UTC) > _FORGOTTEN)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A library's errors as those of the contract. Its texts stay here: they can show a URL with a signature."""
        try:
            yield
        except (HiverError, asyncio.CancelledError):
            raise
        except PermissionError:
            raise BackendError(f"the snapshot store {self._location.url} refuses this server's credentials") from None
        except FileNotFoundError:
            raise BackendError(f"the snapshot store {self._location.url} does not exist") from None
        except Exception as error:  # noqa: BLE001 -- each library has its own
            if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise UnavailableError(f"the snapshot store {self._location.url} is full") from None
            reason = type(error).__name__
            raise UnavailableError(f"the snapshot store {self._location.url} failed: {reason}") from None


def _version_of(key: str, name: str) -> _Version | None:
    """None: the object is no marker."""
    found = _MARKER.fullmatch(name)
    moment = version_time(found[1]) if found is not None else None
    if found is None or moment is None:
        return None
    info = SnapshotInfo(key=key, version=found[1], bytes=int(found[2]), created_at=moment, sha256=found[3])
    return _Version(info=info, marker=f"{key}/{name}", data=f"{key}/{found[4]}")
