"""What the file-system conformance suite needs of a plug-in, and small helpers to drive one."""

from __future__ import annotations

import abc
import asyncio
import errno
import traceback
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, Literal, TypeVar

from hiverd.contracts.filesystem import FileSystem, Info, VersionConflictError

T = TypeVar("T")

DEADLINE_SECONDS: Final = 60.0
PARALLEL: Final = 16

TRANSIENT: Final = frozenset({errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EIO})
"""The error numbers that mean that a later attempt may succeed."""

Deviation = Literal[
    "no-prefix",
    "no-newlines",
    "no-symlinks",
    "no-versions",
    "no-empty-directories",
    "implied-directories",
    "missing-is-empty",
    "links-beside",
    "racy-versions",
]
"""What a service cannot do. The suite checks that it is so, and fails once it no longer is.

- `no-prefix`: there is nothing to bind a mount to a part of the store with.
- `no-newlines`: a name with a line feed is refused.
- `no-symlinks`: links are refused.
- `no-versions`: `Info.version` is None.
- `no-empty-directories`: a directory exists only while something is in it.
- `implied-directories`: a directory that came about with an object below it goes with the last one.
- `missing-is-empty`: listing what does not exist gives nothing instead of an error.
- `links-beside`: a link lies beside its name, so a write that expects nothing does not see one, and replaces it.
- `racy-versions`: of two writers at the same moment both may win.
"""

FailureKind = Literal["429", "500", "503", "cut", "lost-answer", "short-body"]
"""How a request fails: refused with a status; the connection ends before the request is heard (`cut`), after it was
done but before the answer (`lost-answer`), or in the middle of the answer's body (`short-body`)."""


class Faults(abc.ABC):
    """Misbehaviour of the service, on demand."""

    @property
    @abc.abstractmethod
    def requests(self) -> int:
        """How many requests have arrived so far."""

    @abc.abstractmethod
    def fail(self, kind: FailureKind, count: int) -> None:
        """The next `count` requests fail. 0: from now on all is well again."""

    @abc.abstractmethod
    def revoke(self) -> None:
        """From now on no credential is accepted."""

    def expire_token(self) -> bool:
        """The token in use is no longer accepted, one that is fetched now is. False: there are no such tokens."""
        return False


class Harness(abc.ABC):
    """A store that is empty at first, and instances of the plug-in on it."""

    deviations: frozenset[Deviation] = frozenset()
    secrets: tuple[str, ...] = ()
    """What must never be in an error or a log: keys, tokens."""
    faults: Faults | None = None
    many: int = 1100
    """More entries than the service gives in one page of a listing."""
    big_bytes: int = 20 << 20
    """More than the plug-in sends in one request."""

    @abc.abstractmethod
    def build(self, prefix: str = "") -> FileSystem:
        """A new instance, not opened. `prefix` is the part of the store that it is bound to (`team`, `a/b`); the same
        prefix means the same objects, none means all of the store. Without use if `no-prefix` is declared."""

    @asynccontextmanager
    async def opened(self, prefix: str = "") -> AsyncIterator[FileSystem]:
        """An opened instance; closed on leaving."""
        files = self.build(prefix)
        try:
            await files.open()
            yield files
        finally:
            await files.close()

    def deviates(self, deviation: Deviation) -> bool:
        return deviation in self.deviations

    def require_no_secret(self, text: str) -> None:
        """Raises AssertionError without repeating the secret's neighbourhood to the reader twice."""
        for number, secret in enumerate(self.secrets):
            if secret in text:
                raise AssertionError(f"secret {number} is shown: {text}")


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


class BrokenSourceError(Exception):
    """What `broken` raises; a plug-in passes it on."""


async def put(files: FileSystem, path: str, data: bytes = b"", expected_version: str | None = None) -> Info:
    """Writes bytes."""
    return await files.write(path, pieces(data), size=len(data), expected_version=expected_version)


async def get(files: FileSystem, path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Reads bytes."""
    return b"".join([piece async for piece in files.read(path, offset, size)])


async def entries(files: FileSystem, path: str) -> dict[str, Info]:
    """A listing by path, with each path once."""
    found: dict[str, Info] = {}
    async for info in files.list_directory(path):
        assert info.path not in found, f"listed twice: {info.path!r}"  # noqa: S101 -- a test suite
        found[info.path] = info
    return found


async def exists(files: FileSystem, path: str) -> bool:
    """Whether there is anything."""
    try:
        await files.stat(path)
    except FileNotFoundError:
        return False
    return True


async def tree(files: FileSystem, path: str = "/") -> Mapping[str, bytes | str | None]:
    """Everything below: bytes of files, targets of links, None for directories."""
    found: dict[str, bytes | str | None] = {}
    for name, info in (await entries(files, path)).items():
        found[name] = None
        if info.is_dir:
            found |= await tree(files, name)
        elif info.link_target is not None:
            found[name] = info.link_target
        else:
            found[name] = await get(files, name)
    return found


async def each(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs them, at most `PARALLEL` at a time."""
    gate = asyncio.Semaphore(PARALLEL)

    async def one(coroutine: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await coroutine

    return await asyncio.gather(*map(one, work))


@contextmanager
def refused() -> Iterator[list[OSError]]:
    """What is done within must end in an `OSError` with a number, whatever its text; the list has it afterwards."""
    caught: list[OSError] = []
    try:
        yield caught
    except OSError as error:
        caught.append(error)
    if not caught:
        raise AssertionError("nothing was refused")
    if caught[0].errno is None:
        raise AssertionError(f"no error number: {caught[0]!r}")


def require_transient(error: OSError) -> None:
    """Raises AssertionError unless the error says that a later attempt may succeed."""
    if error.errno not in TRANSIENT or isinstance(error, FileNotFoundError | VersionConflictError):
        raise AssertionError(f"not an error that passes: {error!r}") from error


def shown(error: BaseException) -> str:
    """All that a log could show of an error."""
    return "".join([str(error), repr(error), *traceback.format_exception(error)])
