"""Content on its way from Drive: ranges, each whole or not at all, and never of two versions."""

from __future__ import annotations

import errno
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from hiver_storage.retrying import PIECE_BYTES, error

from .entries import Entry
from .service import RangeError, Service
from .tree import SHARED, Tree

_RANGE_BYTES: Final = 8 << 20
"""What is asked for at once. A library that reads whole answers holds it in memory."""


async def read(
    service: Service, tree: Tree, entry: Entry, path: str, offset: int, size: int | None
) -> AsyncGenerator[bytes, None]:
    """What fits into one range costs one request. Of more, each is given only when the file is known to be the same."""
    if entry.is_dir:
        raise error(errno.EISDIR, path)
    if entry.link is not None:
        raise OSError(errno.EINVAL, "a link has no content", path)
    end = None if size is None else offset + size
    if entry.body is not None:
        if data := entry.body[offset:end]:
            yield data
        return
    async with aclosing(_ranges(service, tree, entry, path, offset, end)) as ranges:
        async for data in ranges:
            for start in range(0, len(data), PIECE_BYTES):
                yield data[start : start + PIECE_BYTES]


async def _ranges(
    service: Service, tree: Tree, entry: Entry, path: str, offset: int, end: int | None
) -> AsyncGenerator[bytes, None]:
    started: str | None = None
    if min(entry.size, entry.size if end is None else end) - offset > _RANGE_BYTES:
        started = await _version(tree, entry)
    while end is None or offset < end:
        data, total = await _range(service, entry, offset, min(_RANGE_BYTES, (end or sys.maxsize) - offset))
        after = offset + len(data)
        is_last = not data or after >= total or after == end
        if started is None and not is_last:
            started = await _version(tree, entry)  # longer than we knew: once more, now that it matters
            continue
        if started is not None and await _version(tree, entry) != started:
            raise OSError(errno.EIO, "the file changed while it was read", path)
        yield data
        if is_last:
            return
        offset = after


async def _version(tree: Tree, entry: Entry) -> str:
    now = await tree.by_id(entry.id)
    if now is None:
        raise error(errno.ENOENT, entry.name)
    return now.version


async def _range(service: Service, entry: Entry, offset: int, size: int) -> tuple[bytes, int]:
    """The bytes, and how many the file has (0 if there are none in the range)."""
    headers = {"Range": f"bytes={offset}-{offset + size - 1}", "accept-encoding": "identity"}
    answered: list[Any] = []

    def make(api: Any) -> Any:
        request = api.files().get_media(fileId=entry.id, **SHARED)
        request.add_response_callback(answered.append)
        return request

    try:
        data: bytes = await service.call(make, headers=headers)
    except RangeError:
        return b"", 0
    answer = answered[-1]
    if int(answer.status) != 206:
        return data[offset : offset + size], len(data)
    total = str(answer.get("content-range", "")).rpartition("/")[2]
    if not total.isdigit() or len(data) != min(size, max(0, int(total) - offset)):
        raise OSError(errno.EIO, "Drive gave another range than the one that was asked for")
    return data, int(total)
