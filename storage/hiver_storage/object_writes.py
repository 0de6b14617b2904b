"""Writing an object, all or nothing, under a condition, and in parts if it is large."""

from __future__ import annotations

import asyncio
import errno
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import NoReturn, TypeVar

from hiverd.contracts.filesystem import VersionConflictError

from .content import Parts, whole
from .object_store import WRITE, Call, Store, Stored, Upload

T = TypeVar("T")

_ABORT_SECONDS = 10


class _RefusedError(Exception):
    """The service refused a write: the condition does not hold, or what it is about does not exist. The content's own
    errors, which may be of the same types, are something else."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(reason)
        self.reason = reason


async def write_object(
    store: Store, call: Call, key: str, content: AsyncIterator[bytes], size: int, condition: str | None
) -> Stored:
    """`VersionConflictError` if the condition does not hold."""
    metadata = {WRITE: secrets.token_hex(8)}
    part_bytes = store.part_bytes(size)
    try:
        if size > part_bytes:
            await _require(store, call, key, condition)
            return await _in_parts(store, call, key, Parts(content, size, part_bytes), condition, metadata)
        data = await whole(content, size)
        return await _asked(call, partial(store.put, key, data, condition, metadata))
    except _RefusedError as refused:
        return await _own(store, call, key, metadata[WRITE]) or _conflict(condition, refused.reason)


async def _in_parts(
    store: Store, call: Call, key: str, parts: Parts, condition: str | None, metadata: Mapping[str, str]
) -> Stored:
    upload = await _asked(call, partial(store.begin, key, parts.size, condition, metadata))
    try:
        async for data in parts:
            await _asked(call, partial(upload.add, data))
        return await _asked(call, upload.finish)
    except BaseException:
        await _abort(store, upload)
        raise


async def _asked(call: Call, request: Callable[[], Awaitable[T]]) -> T:
    try:
        return await call(request)
    except (VersionConflictError, FileNotFoundError) as error:
        raise _RefusedError(error) from None


async def _require(store: Store, call: Call, key: str, condition: str | None) -> None:
    """Looks beforehand, so that a large object is not sent in vain."""
    if condition is None:
        return
    try:
        found = (await call(partial(store.head, key))).version
    except FileNotFoundError:
        found = ""
    if found != condition:
        raise VersionConflictError(errno.EEXIST, "the object is of another version")


async def _abort(store: Store, upload: Upload) -> None:
    """One attempt; services forget what is never finished, after some days."""
    try:
        async with asyncio.timeout(_ABORT_SECONDS):
            await upload.abort()
    except Exception as error:
        if store.translate(error) is None:
            raise


async def _own(store: Store, call: Call, key: str, write: str) -> Stored | None:
    """The object, if this write has put it there. An attempt may have succeeded without our hearing of it, and the
    next one have met its result."""
    try:
        found = await call(partial(store.head, key))
    except FileNotFoundError:
        return None
    return found if found.write == write else None


def _conflict(condition: str | None, error: OSError) -> NoReturn:
    """An object that does not exist is of another version than the one that was expected."""
    if condition is None or isinstance(error, VersionConflictError):
        raise error from None
    raise VersionConflictError(errno.EEXIST, "the object is of another version") from None
