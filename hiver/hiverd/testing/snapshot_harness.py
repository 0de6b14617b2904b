"""What the conformance suite of snapshot stores needs of a store, and small helpers to drive one."""

from __future__ import annotations

import abc
import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from hiverd.contracts.snapshot import SnapshotInfo, SnapshotStore

DEADLINE_SECONDS: Final = 60.0
KEEP: Final = 3
FIRST: Final = "0123abcd"
SECOND: Final = "4567cdef"
"""Servers. A `put` of one must survive a start of the other."""


class StoreHarness(abc.ABC):
    """A place that is empty at first, and stores on it."""

    keeps_one: bool = False
    """The store keeps no version but the newest, whatever is asked of it."""
    big_bytes: int = 20 << 20
    """More than the store sends at once."""

    @abc.abstractmethod
    def build(self, keep: int = KEEP, *, instance: str = FIRST) -> SnapshotStore:
        """Another store on the same place, not started; `instance` says which server has it."""

    @abc.abstractmethod
    async def damage(self, info: SnapshotInfo) -> None:
        """Changes a byte in the middle of what is stored, and nothing else."""

    @abc.abstractmethod
    async def leftovers(self) -> list[str]:
        """Whatever is in the place besides complete versions."""

    async def abandon(self) -> None:  # noqa: B027 -- many leave nothing
        """Leaves what a writer of the server `FIRST` leaves that is killed in the middle of a `put` of the key `demo`.
        Does nothing where that is nothing."""

    def fill(self) -> None:  # noqa: B027 -- few can
        """From now on there is no space left. Does nothing, and `can_fill` is False, where that cannot be."""

    can_fill: bool = False

    @asynccontextmanager
    async def started(self, keep: int = KEEP, *, instance: str = FIRST) -> AsyncIterator[SnapshotStore]:
        """A store that was started; closed on leaving."""
        store = self.build(keep, instance=instance)
        try:
            await store.start()
            yield store
        finally:
            await store.close()


class BrokenSourceError(Exception):
    """What `broken` raises; a store passes it on."""


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    """Content in pieces."""
    for piece in data:
        await asyncio.sleep(0)
        yield piece


async def broken(*data: bytes) -> AsyncIterator[bytes]:
    """Content whose source fails after these pieces."""
    for piece in data:
        yield piece
    raise BrokenSourceError


async def held(gate: asyncio.Event, *data: bytes) -> AsyncIterator[bytes]:
    """Content whose last piece comes when the gate is opened."""
    for piece in data[:-1]:
        yield piece
    await gate.wait()
    yield data[-1]


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes without a pattern, the same for the same seed."""
    return random.Random(seed).randbytes(size)  # noqa: S311 -- test data


async def put(store: SnapshotStore, key: str, data: bytes) -> SnapshotInfo:
    """Stores bytes."""
    return await store.put(key, pieces(data))


async def get(store: SnapshotStore, key: str, version: str | None = None) -> bytes:
    """Reads bytes, all of them."""
    return b"".join([piece async for piece in store.get(key, version)])


async def listed(store: SnapshotStore, key: str | None = None) -> list[SnapshotInfo]:
    """A listing as it comes."""
    return [info async for info in store.list(key)]


async def versions(store: SnapshotStore, key: str) -> list[str]:
    """Of one key, as they come."""
    return [info.version for info in await listed(store, key)]
