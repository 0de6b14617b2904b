"""The contract of a file-system plug-in (entry-point group `hiver.filesystems`): one per `fs[].backend` value.

A plug-in speaks to its service and does nothing else: no cache, no rules, no events. Those are the core's
(docs/files.md). It runs in a process of its own per mount, on one event loop; calls overlap.

Paths are absolute relative to the mount (`/`, `/a/b`), clean, without a trailing slash. Whatever the service calls its
objects, a plug-in keeps below its prefix or folder: no path leads out of it.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any, ClassVar, Final

from msgspec import Struct

ABSENT: Final = ""
"""As an expected version: there must be nothing of that name yet."""


class VersionConflictError(OSError):
    """The object is not, or no longer, the version that the caller expected. Nothing was changed."""


class Info(Struct, frozen=True):
    """One object of a backend."""

    path: str
    size: int
    """Bytes; 0 for directories and links."""
    mtime: datetime
    """With a time zone."""
    is_dir: bool
    link_target: str | None = None
    """Of a symbolic link; None for everything else."""
    version: str | None = None
    """Changes whenever the content does (etag, generation, revision); never empty. None where the backend has none, and
    for directories."""


class FileSystem(abc.ABC):
    """A backend bound to one mount's configuration.

    Errors, of every method: `FileNotFoundError` (something does not exist), `PermissionError` (the service refuses us:
    credentials, rights), other `OSError` with an errno for the rest. `EAGAIN`, `ETIMEDOUT`, `ECONNRESET`,
    `EHOSTUNREACH` and `EIO` mean that a later attempt may succeed. A plug-in itself repeats what is safe to repeat a
    few times over some seconds (rate limits, 5xx, cut connections); the core repeats uploads for as long as it takes.
    No message of an error holds a credential.
    """

    backend: ClassVar[str]
    native: ClassVar[bool] = False
    """True: the data are a folder on this host and the mount can be a kernel mount."""
    case_sensitive: ClassVar[bool] = True
    """False: names that differ only in case or Unicode form mean the same object."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the whole `fs[]` entry (PROTOCOL 4.2). Raises `InvalidError` naming the member. No I/O."""
        self.config = config

    async def open(self) -> None:  # noqa: B027 -- most connect when they are first used
        """Called once, on the event loop that all else runs on, before everything else. Quick; asks nothing of the
        service."""

    @abc.abstractmethod
    async def stat(self, path: str) -> Info:
        """`/` always exists. A link is described itself."""

    @abc.abstractmethod
    def list_directory(self, path: str) -> AsyncIterator[Info]:
        """One level, each name once, in any order, page by page. `FileNotFoundError` for what is no directory, unless
        the service does not tell an empty directory from none."""

    @abc.abstractmethod
    def read(self, path: str, offset: int, size: int | None) -> AsyncIterator[bytes]:
        """At most `size` bytes (None: all) from `offset` on, in pieces of at most 1 MiB or so, asked for as a range.
        An offset at or behind the end gives nothing. A cut connection is an error, never a short answer."""

    @abc.abstractmethod
    async def write(self, path: str, content: AsyncIterator[bytes], *, size: int, expected_version: str | None) -> Info:
        """Replaces the whole object, all or nothing, making missing parents; `size` is what `content` holds.

        `expected_version`: None overwrites whatever is there; `ABSENT` or a version make it a `VersionConflictError`
        when there is something else, by a condition of the service's own where it has one. Returns what is there now.
        """

    @abc.abstractmethod
    async def make_directory(self, path: str) -> None:
        """With missing parents. A directory that exists is a success."""

    @abc.abstractmethod
    async def symlink(self, path: str, target: str) -> None:
        """Makes or replaces a link that holds `target`, whatever that is (PROTOCOL 6.4)."""

    @abc.abstractmethod
    async def delete(self, path: str) -> None:
        """Removes a file, a link or an empty directory. A missing path is a success (PROTOCOL 6.4). `ENOTEMPTY`."""

    @abc.abstractmethod
    async def move(self, source: str, target: str) -> None:
        """Renames a file, a link or a directory with all that is below it; replaces a file at `target`."""

    async def close(self) -> None:  # noqa: B027 -- most have nothing to free
        """Frees connections."""
