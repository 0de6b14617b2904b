"""The contract of a snapshot store (entry-point group `hiver.snapshots`): archives under keys, with versions.

A store knows nothing of what it keeps: an archive is bytes. What it promises is that a reader never meets half of one.
"""

from __future__ import annotations

import abc
import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Final

from msgspec import Struct

from hiverd.contracts.errors import BackendError, NotFoundError

_KEY: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_VERSION: Final = re.compile(r"(\d{8}T\d{12})Z-[0-9a-f]{8}")
_VERSION_TIME: Final = "%Y%m%dT%H%M%S%f"
_INLINE_BYTES: Final = 64 << 10
"""Smaller pieces are hashed where they are: a thread would cost more than it saves."""


class SnapshotDamagedError(BackendError):
    """What is stored is not what was put there: its SHA-256 or its length is another one. It must not be used."""


class SnapshotInfo(Struct, frozen=True):
    """One version of one key."""

    key: str
    version: str
    """Sorts by time as text, and is unique: `new_version`."""
    bytes: int
    """Of the archive as it was put."""
    created_at: datetime
    """When it became visible; UTC."""
    sha256: str | None = None
    """In lower-case hex. None: another program wrote it, and nobody knows what it ought to be."""


class SnapshotStore(abc.ABC):
    """Keeps archives under keys.

    - A `put` becomes visible whole or not at all. Until it is durable, the version before it stays as it is; of several
      at once under one key the last to be complete is the newest, and none is a mixture.
    - The newest `options["keep"]` versions of a key stay. Older ones go when a `put` is complete.
    - What a writer leaves that was killed in the middle is never seen, and goes with a later `start`.

    A key is 1 to 64 characters out of `A-Z a-z 0-9 . _ -` and neither `.` nor `..` (`is_snapshot_key`); callers have
    made sure of that. Errors, of every method: `UnavailableError` where a later attempt may succeed (no space, no
    answer), `BackendError` for the rest. No message holds a credential.
    """

    name: ClassVar[str]

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options`: `keep`, an int of at least 1; `path`, a folder for stores on this host; `url`, empty where the
        operator gave none; `instance`, a word that is this server's at every start and no other's; and the operator's
        table `[snapshots.options]`. Raises `InvalidError` or `UnsupportedError` telling what to do. No I/O."""
        self.options = options

    async def start(self) -> None:  # noqa: B027 -- many have nothing to do
        """Called once, on the event loop that all else runs on, before everything else. Removes what dead writers
        left. `InvalidError` and `UnsupportedError`, which say what to do, keep the server from starting; after any
        other error it starts, and says so."""

    @abc.abstractmethod
    async def put(self, key: str, content: AsyncIterator[bytes]) -> SnapshotInfo:
        """Durable when it returns. What `content` raises comes out of here, and then nothing has changed."""

    @abc.abstractmethod
    def get(self, key: str, version: str | None = None) -> AsyncIterator[bytes]:
        """The archive in pieces; without `version` the newest. `NotFoundError` comes before the first piece.

        All pieces are compared with the checksum while they pass: if they are not what was put, the iterator raises
        `SnapshotDamagedError` *instead of ending*. So data are to be trusted only once it has ended. Who must know
        before using any (a restore) goes through `SnapshotStores.fetched` of
        `hiverd.sandboxes.snapshot_stores`.
        """

    @abc.abstractmethod
    def list(self, key: str | None = None) -> AsyncIterator[SnapshotInfo]:
        """Of one key or of all: keys in order, versions of a key from the newest to the oldest. No error for none."""

    @abc.abstractmethod
    async def delete(self, key: str, version: str | None = None) -> None:
        """One version, or all of the key. Raises `NotFoundError` if there is nothing of that name."""

    async def find(self, key: str, version: str | None = None) -> SnapshotInfo:
        """The newest version or the named one. Raises `NotFoundError`."""
        async for info in self.list(key):
            if version is None or info.version == version:
                return info
        raise missing_snapshot(key, version)

    async def local_file(self, info: SnapshotInfo) -> Path | None:
        """A file of this host that holds the archive and nothing else, and never changes; None where there is none. It
        may be removed at any time: who opened it can go on."""
        return None

    async def close(self) -> None:  # noqa: B027 -- most have nothing to free
        """Frees connections."""


def is_snapshot_key(text: str) -> bool:
    """Whether it may be a key (PROTOCOL 4.3): safe as the name of a file."""
    return _KEY.fullmatch(text) is not None and text not in {".", ".."}


def new_version(now: datetime, newest: str | None = None) -> str:
    """`20261124T211503123456Z-5f0c9a1e`: later ones sort behind, also those of one moment and after the clock was set
    back. `newest`: the newest version of the same key that is known."""
    moment = now.astimezone(UTC)
    if newest is not None and (before := version_time(newest)) is not None and before >= moment:
        moment = before + timedelta(microseconds=1)
    return f"{moment.strftime(_VERSION_TIME)}Z-{secrets.token_hex(4)}"


def version_time(version: str) -> datetime | None:
    """When a version was made; None for what is no version of `new_version`."""
    found = _VERSION.fullmatch(version)
    if found is None:
        return None
    try:
        return datetime.strptime(found[1], _VERSION_TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


@asynccontextmanager
async def closing(content: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """Frees what content holds open, also if it was not read to its end."""
    try:
        yield content
    finally:
        if isinstance(content, AsyncGenerator):
            await content.aclose()


async def verified(info: SnapshotInfo, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Passes the pieces on. Raises `SnapshotDamagedError` instead of ending if they are not what `info` says."""
    digest, size = hashlib.sha256(), 0
    async with closing(content):
        async for piece in content:
            if len(piece) > _INLINE_BYTES:
                await asyncio.to_thread(digest.update, piece)
            else:
                digest.update(piece)
            size += len(piece)
            yield piece
    if size != info.bytes or (info.sha256 is not None and digest.hexdigest() != info.sha256):
        raise damaged_snapshot(info)


def damaged_snapshot(info: SnapshotInfo) -> SnapshotDamagedError:
    return SnapshotDamagedError(f'snapshot "{info.key}", version {info.version}, is damaged: its checksum is wrong')


def missing_snapshot(key: str, version: str | None = None) -> NotFoundError:
    which = "" if version is None else f" of version {version[:80]}"
    return NotFoundError(f'there is no snapshot "{key}"{which}')
