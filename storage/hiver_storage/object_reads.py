"""Reading an object, across connections that break."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from hiverd.contracts.filesystem import VersionConflictError

from .failures import Patience, of_connection
from .object_store import Body, Call, Store


async def read_object(
    store: Store, call: Call, patience: Patience, key: str, offset: int, size: int | None
) -> AsyncGenerator[bytes]:
    """What breaks off goes on where it was, in the same version; `EAGAIN` if that has gone meanwhile."""
    version: str | None = None
    end = None if size is None else offset + size
    failures = 0
    while end is None or offset < end:
        body = await _fetched(store, call, key, offset, None if end is None else end - offset, version)
        if body is None:
            return
        version, stop = body.version, offset + body.size
        failure = of_connection(ConnectionResetError())
        try:
            async with aclosing(body.pieces()) as pieces:  # type: ignore[type-var]  # they are generators
                async for piece in pieces:
                    offset += len(piece)
                    failures = 0
                    yield piece
        except Exception as error:
            translated = store.translate(error)
            if translated is None:
                raise
            failure = translated
        finally:
            await body.close()
        if offset >= stop:
            return
        failures += 1
        if failures >= patience.attempts:
            raise failure
        await asyncio.sleep(patience.first_seconds * 2**failures / 2)


async def _fetched(
    store: Store, call: Call, key: str, offset: int, size: int | None, version: str | None
) -> Body | None:
    try:
        return await call(partial(store.fetch, key, offset, size, version))
    except (VersionConflictError, FileNotFoundError):
        if version is None:
            raise
        raise OSError(errno.EAGAIN, "the file changed while it was read") from None
