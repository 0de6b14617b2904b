"""Content on its way to OneDrive: in one request, or in an upload session."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Final

import httpx
from msgspec import Struct

from hiver_storage.retrying import TransientError, error, in_blocks
from hiver_storage.web import failure
from hiverd.contracts.filesystem import VersionConflictError

from .graph import Graph, body
from .naming import Item, parse

SMALL_BYTES: Final = 4 << 20
"""Graph's limit for an upload in one request."""
CHUNK_BYTES: Final = 32 * 320 << 10
"""10 MiB: a multiple of 320 KiB, as Graph wants it. Each upload under way holds two."""


class Condition(Struct, frozen=True):
    """Under which the content may take the name."""

    etag: str | None = None
    """Of the item that is to be replaced."""
    absent: bool = False
    """There must be none."""

    @property
    def behavior(self) -> str:
        return "fail" if self.absent else "replace"

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.etag is None else {"If-Match": self.etag}


class Upload:
    """One write of one item."""

    def __init__(self, graph: Graph, names: Sequence[str], condition: Condition, path: str) -> None:
        self._graph = graph
        self._names = names
        self._condition = condition
        self._path = path
        self._doubt = False

    async def small(self, data: bytes) -> Item | None:
        """None: the folder for it is missing. Raises `VersionConflictError`."""
        return await self._graph.patience.repeat(lambda: self._put(data))

    async def _put(self, data: bytes) -> Item | None:
        params = {"@microsoft.graph.conflictBehavior": self._condition.behavior}
        headers = {"Content-Type": "application/octet-stream", **self._condition.headers}
        try:
            response = await self._graph.once(
                "PUT",
                self._graph.url(self._names, "content"),
                params=params,
                headers=headers,
                content=data,
                also=(404, 409, 412),
            )
        except TransientError as failed:
            self._doubt = self._doubt or failed.may_be_done
            raise
        if response.status_code == 404:
            return None
        if response.status_code in (409, 412):
            return await self._refused(data)
        return parse(body(response))

    async def _refused(self, data: bytes) -> Item:
        """The condition does not hold; after a lost answer perhaps because of our own write."""
        item = await self._graph.item(self._names, to_read=True)
        if self._doubt and item is not None and item.size == len(data) and await self._content(item) == data:
            return item
        if item is not None and item.is_dir and self._condition == Condition():
            raise error(errno.EISDIR, self._path)
        raise VersionConflictError(errno.EEXIST, "changed meanwhile", self._path)

    async def _content(self, item: Item) -> bytes:
        response = await self._graph.transfer("GET", item.download_url or "")
        if response.status_code != 200:
            raise TransientError(errno.EIO, "the content cannot be read back")
        return response.content

    # -- sessions -----------------------------------------------------------------------------------------------------

    async def big(self, content: AsyncIterator[bytes], size: int) -> Item | None:
        """As `small`. Nothing shows before the last chunk has arrived."""
        response = await self._graph.ask(
            "POST",
            self._graph.url(self._names, "createUploadSession"),
            json={"item": {"@microsoft.graph.conflictBehavior": self._condition.behavior}},
            headers=self._condition.headers,
            also=(404, 409, 412),
        )
        if response.status_code == 404:
            return None
        if response.status_code in (409, 412):
            raise VersionConflictError(errno.EEXIST, "changed meanwhile", self._path)
        url = str(body(response).get("uploadUrl", ""))
        try:
            return await self._send(url, content, size)
        except BaseException:
            cancelling = asyncio.ensure_future(self._cancel(url))
            with suppress(asyncio.CancelledError):
                await asyncio.shield(cancelling)
            raise

    async def _cancel(self, url: str) -> None:
        """Otherwise what was sent is kept for days."""
        with suppress(TransientError, OSError):
            await self._graph.transfer("DELETE", url)

    async def _send(self, url: str, content: AsyncIterator[bytes], size: int) -> Item:
        start = 0
        async for chunk in in_blocks(content, size, CHUNK_BYTES):
            item = await self._graph.patience.repeat(_Chunk(self, url, chunk, start, size))
            start += len(chunk)
            if item is not None:
                return item
        raise OSError(errno.EIO, "OneDrive did not take the whole content", self._path)

    async def put_range(self, url: str, data: bytes, start: int, size: int) -> httpx.Response:
        span = f"bytes {start}-{start + len(data) - 1}/{size}"
        return await self._graph.transfer("PUT", url, content=data, headers={"Content-Range": span})

    async def position(self, url: str) -> int | None:
        """How much has arrived; None if there is no such session any more."""
        response = await self._graph.transfer("GET", url)
        if response.status_code in (404, 410):
            return None
        if not response.is_success:
            raise failure(response, self._path)
        return _next_position(body(response))

    async def finished(self, size: int) -> Item:
        """The session has gone while we did not listen: it has ended well, or has expired."""
        item = await self._graph.item(self._names)
        if item is None or item.is_dir or item.size != size or item.etag == self._condition.etag:
            raise OSError(errno.EIO, "OneDrive ended the upload", self._path)
        return item

    def conflict(self) -> VersionConflictError:
        return VersionConflictError(errno.EEXIST, "changed meanwhile", self._path)


class _Chunk:
    """Sends one chunk. Called again, it first asks how much of it has arrived."""

    def __init__(self, upload: Upload, url: str, data: bytes, start: int, size: int) -> None:
        self._upload = upload
        self._url = url
        self._data = data
        self._start = self._position = start
        self._size = size
        self._tried = False

    async def __call__(self) -> Item | None:
        """The item, once it is complete."""
        end = self._start + len(self._data)
        if self._tried:
            position = await self._upload.position(self._url)
            if position is None:
                return await self._upload.finished(self._size)
            self._position = position
        while self._start <= self._position < end:
            self._tried = True
            data = self._data[self._position - self._start :]
            response = await self._upload.put_range(self._url, data, self._position, self._size)
            if response.status_code in (409, 412):
                raise self._upload.conflict()
            if response.status_code in (404, 416):
                raise TransientError(errno.EIO, "the upload is not where we thought it was")
            if not response.is_success:
                raise failure(response, "")
            answer = body(response)
            if "id" in answer:
                return parse(answer)
            self._position = _next_position(answer)
        if self._position < self._start:
            raise OSError(errno.EIO, "OneDrive lost a part of the upload")
        return None


def _next_position(answer: dict[str, Any]) -> int:
    try:
        return int(answer["nextExpectedRanges"][0].partition("-")[0])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise OSError(errno.EIO, "OneDrive does not say what it expects next") from None
