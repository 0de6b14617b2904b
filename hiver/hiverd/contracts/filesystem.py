"""The contract of a file-system plug-in (entry-point group `hiver.filesystems`): one per `fs[].backend` value."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any, ClassVar

from msgspec import Struct


class Info(Struct, frozen=True):
    """One object of a backend. `path` is absolute relative to the mount."""

    path: str
    size: int
    mtime: datetime
    is_dir: bool
    link_target: str | None = None
    version: str | None = None
    """Changes whenever the content does (etag, generation, revision); None where the backend has none."""


class FileSystem(abc.ABC):
    """A backend bound to one mount's configuration. Errors: FileNotFoundError, PermissionError, OSError."""

    backend: ClassVar[str]
    native: ClassVar[bool] = False
    """True: the data are a folder on this host and the mount can be a kernel mount."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the whole `fs[]` entry (PROTOCOL 4.2). Raises `InvalidError` naming the member."""
        self.config = config

    @abc.abstractmethod
    async def stat(self, path: str) -> Info: ...

    @abc.abstractmethod
    def list_directory(self, path: str) -> AsyncIterator[Info]: ...

    @abc.abstractmethod
    def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]: ...

    @abc.abstractmethod
    async def write(self, path: str, content: AsyncIterator[bytes], *, expected_version: str | None) -> Info:
        """Replaces atomically. `expected_version` makes a conflict an error instead of an overwrite."""

    @abc.abstractmethod
    async def delete(self, path: str) -> None:
        """A missing path is a success (PROTOCOL 6.4)."""

    @abc.abstractmethod
    async def move(self, source: str, target: str) -> None: ...

    async def close(self) -> None:  # noqa: B027 -- most have nothing to free
        """Frees connections."""
