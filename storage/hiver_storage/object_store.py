"""What a plug-in for a bucket says of its service: keys, pages, bodies and conditions. No paths, no directories.

Every method may raise whatever its library raises; `translate` makes that the contract's. No method repeats anything.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime
from typing import Final, NamedTuple, Protocol, TypeVar

from msgspec import Struct

T = TypeVar("T")

LINK: Final = "hiverlink"
"""Metadata of an object that stands for a symbolic link: its target, percent-encoded. Azure allows identifiers alone as
names, and servers lose header fields with underscores."""
WRITE: Final = "hiverwrite"
"""Metadata of every object that we write: a random word. By it, a write whose answer was lost is known as our own."""


class Stored(Struct, frozen=True):
    """An object as the service describes it."""

    key: str
    size: int
    mtime: datetime
    version: str
    link_target: str | None = None
    write: str | None = None
    """Its `WRITE`; None also where the service does not tell."""


class Call(Protocol):
    """Makes a request of a store, and repeats it while it fails in a way that may pass. Errors are the contract's."""

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T: ...


class Page(NamedTuple):
    """A piece of a listing."""

    objects: list[Stored]
    prefixes: list[str]
    """What ends in the delimiter, each standing for everything below it."""
    next: str | None
    """For the next page; None at the end."""


class Body(abc.ABC):
    """The answer to a read."""

    version: str
    size: int
    """Of what is to come."""

    @abc.abstractmethod
    def pieces(self) -> AsyncIterator[bytes]:
        """The bytes, at most 1 MiB at a time."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Also in the middle. Never raises."""


class Upload(abc.ABC):
    """An object on its way, in parts. It has its name from `finish` on, and not before."""

    @abc.abstractmethod
    async def add(self, data: bytes) -> None:
        """The next part: all have the size that `Store.part_bytes` says, but the last. Can be repeated."""

    @abc.abstractmethod
    async def finish(self) -> Stored:
        """Under the condition that it was begun with. Can be repeated."""

    @abc.abstractmethod
    async def abort(self) -> None:
        """Frees what the service keeps of it."""


class Store(abc.ABC):
    """One bucket. A condition is None, `ABSENT`, or the version that must be there; if it does not hold, the error is
    `VersionConflictError` or `FileNotFoundError`."""

    page_keys: int = 1000
    """Most entries of one page of a listing."""

    @abc.abstractmethod
    async def open(self) -> None:
        """Asks nothing of the service."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Frees connections."""

    @abc.abstractmethod
    def translate(self, error: Exception) -> OSError | None:
        """A library's error as the contract's; None if it is none of the service or the connection."""

    @abc.abstractmethod
    def part_bytes(self, size: int) -> int:
        """What an object of `size` bytes is sent in pieces of; one that is not longer goes in one request."""

    @abc.abstractmethod
    async def head(self, key: str) -> Stored:
        """Describes an object."""

    @abc.abstractmethod
    async def page(self, prefix: str, *, flat: bool, after: str | None = None, limit: int | None = None) -> Page:
        """One page of what begins with `prefix`, in the order of keys: all of it, or cut at the next `/` (`flat`)."""

    @abc.abstractmethod
    async def fetch(self, key: str, offset: int, size: int | None, version: str | None) -> Body | None:
        """A range, of this version only; None if `offset` is at or behind the end."""

    @abc.abstractmethod
    async def put(self, key: str, data: bytes, condition: str | None, metadata: Mapping[str, str]) -> Stored:
        """A whole object."""

    @abc.abstractmethod
    async def begin(self, key: str, size: int, condition: str | None, metadata: Mapping[str, str]) -> Upload:
        """A large object."""

    @abc.abstractmethod
    async def copy(self, source: Stored, key: str) -> None:
        """At the service, with its metadata."""

    @abc.abstractmethod
    async def remove(self, key: str) -> None:
        """Also what is not there."""
