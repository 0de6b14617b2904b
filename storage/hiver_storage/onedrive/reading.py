"""Content on its way from OneDrive, never of two versions."""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from hiver_storage.retrying import TransientError, error
from hiver_storage.web import failure, range_header, ranged_body, read_on, transport_errors

from .graph import Graph
from .naming import Item


async def read(
    graph: Graph, names: Sequence[str], path: str, offset: int, size: int | None
) -> AsyncGenerator[bytes, None]:
    """A range. Addresses of content expire: each attempt asks for one, and whether the version is still the same."""
    started: str | None = None

    async def same() -> Item:
        nonlocal started
        item = await graph.item(names, to_read=True)
        if item is None:
            raise error(errno.ENOENT, path)
        if item.is_dir:
            raise error(errno.EISDIR, path)
        started = started or item.version
        if item.version != started:
            raise OSError(errno.EIO, "the file changed while it was read", path)
        return item

    async def part(offset: int, size: int | None) -> AsyncGenerator[bytes, None]:
        item = await same()
        if offset < item.size:
            async with aclosing(_download(graph, item, path, offset, size)) as pieces:
                async for piece in pieces:
                    yield piece

    async def still() -> None:
        await same()

    async with aclosing(read_on(part, still, offset, size)) as pieces:
        async for piece in pieces:
            yield piece


async def _download(graph: Graph, item: Item, path: str, offset: int, size: int | None) -> AsyncGenerator[bytes, None]:
    if item.download_url is None:
        raise OSError(errno.EACCES, "the item has no content that could be read", path)
    with transport_errors():
        request = graph.transfers.build_request("GET", item.download_url, headers=range_header(offset, size))
        response = await graph.transfers.send(request, stream=True)
    try:
        if response.status_code in (401, 403, 404, 410):
            raise TransientError(errno.EIO, "the address of the content has expired")
        if response.status_code not in (200, 206, 416):
            raise failure(response, path)
        async with aclosing(ranged_body(response, offset, size)) as pieces:
            async for piece in pieces:
                yield piece
    finally:
        await response.aclose()
