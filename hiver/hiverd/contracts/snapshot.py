"""The contract of a snapshot store (entry-point group `hiver.snapshots`)."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any, ClassVar

from msgspec import Struct


class SnapshotInfo(Struct, frozen=True):
    key: str
    version: str
    bytes: int
    created_at: datetime


class SnapshotStore(abc.ABC):
    """Keeps archives under keys. A `put` becomes visible whole or not at all; the last complete one wins."""

    name: ClassVar[str]

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    @abc.abstractmethod
    async def put(self, key: str, content: AsyncIterator[bytes]) -> SnapshotInfo: ...

    @abc.abstractmethod
    def get(self, key: str, version: str | None = None) -> AsyncIterator[bytes]:
        """Raises `NotFoundError` before the first piece if there is no such snapshot."""

    @abc.abstractmethod
    def list(self, key: str | None = None) -> AsyncIterator[SnapshotInfo]: ...

    @abc.abstractmethod
    async def delete(self, key: str, version: str | None = None) -> None: ...

    async def close(self) -> None:  # noqa: B027 -- most have nothing to free
        """Frees connections."""
