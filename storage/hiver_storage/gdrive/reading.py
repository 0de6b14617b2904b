"""Content on its way from Drive: ranges, each whole or not at all, and never of two versions."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any, Final

from ..retrying import PIECE_BYTES, error
from .entries import Entry
from .service import RangeError, Service
from .tree import SHARED, Tree

_RANGE_BYTES: Final = 8 << 20
"""What is asked for at once. A library that reads whole answers holds it in memory."""


async def read(
    service: Service, tree: Tree, entry: Entry, path: str, offset: int, size: int | None
) -> AsyncIterator[bytes]:
    """A file of one range costs one request. Of more, each is given only when the file is known to be the same still."""
    if entry.is_dir:
        raise error(errno.EISDIR, path)
    if entry.link is not None:
        raise OSError(errno.EINVAL, "a link has no content", path)
    if entry.body is not None:
        data = entry.body[offset:] if size is None else entry.body[offset : offset + size]
        if data:
            yield data
        return
    end = None if size is None else offset + size
    started: str | None = None
    if entry.size - offset > _RANGE_BYTES and (size is None or size > _RANGE_BYTES):
        started = await _version(tree, entry)
    while end is None or offset < end:
        data, total = await _range(
            service, entry, offset, _RANGE_BYTES if end is None else min(end - offset, _RANGE_BYTES)
        )
        after = offset + len(data)
        is_last = not data or after >= total or after == end
        if started is None and not is_last:
            started = await _version(tree, entry)  # longer than we knew: once more, now that it matters
            continue
        if started is not None and await _version(tree, entry) != started:
            raise OSError(errno.EIO, "the file changed while it was read", path)
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]
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
