"""Snapshots in a folder of this host: `<folder>/<key>/<version>.<sha256>.tar.zst`, readable by plain tar.

The name says everything, so that there is one file per version and nothing to keep in step with it. The folder may be
shared by several servers, also over a network file system that has locks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final

from hiver_snapshots.drafts import Draft, sweep, sync_folder
from hiver_snapshots.pieces import BLOCK_BYTES
from hiver_snapshots.threads import Threads
from hiverd.contracts.errors import BackendError, InvalidError, UnavailableError
from hiverd.contracts.snapshot import (
    SnapshotInfo,
    SnapshotStore,
    damaged_snapshot,
    is_snapshot_key,
    missing_snapshot,
    new_version,
    version_time,
)

_NAME: Final = re.compile(r"([0-9TZ]+-[0-9a-f]{8})\.([0-9a-f]{64})(?:\.tar(?:\.gz|\.zst)?)")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PASSING: Final = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE})


class LocalStore(SnapshotStore):
    name: ClassVar[str] = "local"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._folder = Path(options["path"])
        self._keep = int(options["keep"])
        self._threads = Threads()
        self._naming = threading.Lock()
        """Held while a version gets its name and becomes visible: the last to be complete is the newest."""

    async def start(self) -> None:
        await self._threads.run(self._prepare)

    def _prepare(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in self._key_folders():
                sweep(folder)
        except OSError as error:
            raise InvalidError(
                f"snapshots.path: cannot use the folder {self._folder}: {error.strerror}; choose another",
                field="snapshots.path",
            ) from error

    async def put(self, key: str, content: AsyncIterator[bytes]) -> SnapshotInfo:
        draft = Draft(self._folder / key)
        try:
            with _told():
                await self._threads.run(draft.open)
            await self._threads.write(content, draft.write, _told)
            with _told():
                return await self._threads.run(self._publish, draft, key)
        finally:
            await self._threads.settle(draft.discard)

    def _publish(self, draft: Draft, key: str) -> SnapshotInfo:
        def name() -> str:
            found = self._versions(key)
            version = new_version(datetime.now(UTC), found[0][0].version if found else None)
            return f"{version}.{draft.sha256}{draft.suffix}"

        with self._naming:
            final = draft.publish(name)
        published = _info_of(key, final, draft.size)
        assert published is not None  # noqa: S101 -- it was named right above
        with suppress(OSError):  # it is there; what is too many goes with the next one
            self._remove(key, [path for _, path in self._versions(key)[self._keep :]])
        return published

    async def get(self, key: str, version: str | None = None) -> AsyncIterator[bytes]:
        with _told():
            reader = await self._threads.acquire(lambda: self._opened(key, version), _Reader.close)
        try:
            while True:
                with _told():
                    block = await self._threads.run(reader.read)
                if not block:
                    break
                yield block
        finally:
            await self._threads.settle(reader.close)
        reader.require_whole()

    def _opened(self, key: str, version: str | None) -> _Reader:
        while True:
            info, path = self._found(key, version)
            try:
                return _Reader(info, path)
            except FileNotFoundError:
                continue  # a newer one has come, or it was deleted

    async def list(self, key: str | None = None) -> AsyncIterator[SnapshotInfo]:
        with _told():
            keys = [key] if key is not None else await self._threads.run(self._keys)
        for one in keys:
            with _told():
                found = await self._threads.run(self._versions, one)
            for info, _ in found:
                yield info

    async def delete(self, key: str, version: str | None = None) -> None:
        with _told():
            await self._threads.run(self._delete, key, version)

    def _delete(self, key: str, version: str | None) -> None:
        if version is not None:
            self._remove(key, [self._found(key, version)[1]])
            return
        paths = [path for _, path in self._versions(key)]
        if not paths:
            raise missing_snapshot(key)
        self._remove(key, paths)

    async def local_file(self, info: SnapshotInfo) -> Path | None:
        with _told():
            return (await self._threads.run(self._found, info.key, info.version))[1]

    async def close(self) -> None:
        self._threads.close()

    # -- the folder: all of it blocks ---------------------------------------------------------------------------------

    def _key_folders(self) -> Sequence[Path]:
        try:
            return [path for path in self._folder.iterdir() if is_snapshot_key(path.name) and path.is_dir()]
        except FileNotFoundError:
            return []

    def _keys(self) -> Sequence[str]:
        return sorted(folder.name for folder in self._key_folders())

    def _versions(self, key: str) -> Sequence[tuple[SnapshotInfo, Path]]:
        """Newest first."""
        found = []
        try:
            with os.scandir(self._folder / key) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # removed since
                        info = _info_of(key, entry.name, entry.stat(follow_symlinks=False).st_size)
                        if info is not None:
                            found.append((info, Path(entry.path)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(found, key=lambda pair: pair[0].version, reverse=True)

    def _found(self, key: str, version: str | None) -> tuple[SnapshotInfo, Path]:
        for info, path in self._versions(key):
            if version in {None, info.version}:
                return info, path
        raise missing_snapshot(key, version)

    def _remove(self, key: str, paths: Sequence[Path]) -> None:
        if not paths:
            return
        for path in paths:
            path.unlink(missing_ok=True)
        folder = self._folder / key
        with suppress(FileNotFoundError):
            sync_folder(folder)
        with suppress(OSError):  # not empty, as a rule
            folder.rmdir()


class _Reader:
    """An open version. It may be closed while a thread is reading."""

    def __init__(self, info: SnapshotInfo, path: Path) -> None:
        self._info = info
        self._fd: int | None = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()

    def read(self) -> bytes:
        with self._lock:
            if self._fd is None:
                return b""
            block = os.read(self._fd, BLOCK_BYTES)
            self._digest.update(block)
            return block

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
            self._fd = None

    def require_whole(self) -> None:
        """Raises `SnapshotDamagedError`."""
        if self._digest.hexdigest() != self._info.sha256:
            raise damaged_snapshot(self._info)


def _info_of(key: str, name: str, size: int) -> SnapshotInfo | None:
    """None: the file is no version of ours."""
    found = _NAME.fullmatch(name)
    moment = version_time(found[1]) if found is not None else None
    if found is None or moment is None:
        return None
    return SnapshotInfo(key=key, version=found[1], bytes=size, created_at=moment, sha256=found[2])


@contextmanager
def _told() -> Iterator[None]:
    """The operating system's errors, as those of the contract."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UnavailableError("the snapshot store is full; the snapshots in it are as they were") from error
        kind = UnavailableError if error.errno in _PASSING else BackendError
        raise kind(f"the snapshot store failed: {error.strerror or type(error).__name__}") from error
