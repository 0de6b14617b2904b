"""ASGI answers of the file API that are larger than memory should hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import HTTPReceiveMessage, HTTPResponseBodyEvent, Receive, Scope, Send

from hiverd.api.transfers import WORTHWHILE_BYTES, takeover_of
from hiverd.contracts.errors import HiverError
from hiverd.files.access import DirectoryEntry, Download
from hiverd.files.paths import content_disposition

JSON_TYPE: Final = "application/json; charset=utf-8"


def _body(data: bytes, *, more: bool) -> HTTPResponseBodyEvent:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _until_gone(receive: Receive) -> None:
    while True:
        message: HTTPReceiveMessage = await receive()  # type: ignore[assignment]
        if message["type"] == "http.disconnect":
            return


class _Watch:
    """Notices that the client has left: ASGI servers swallow what is sent to nobody."""

    def __init__(self, receive: Receive) -> None:
        self._task = asyncio.create_task(_until_gone(receive), name="files:watch-disconnect")

    @property
    def gone(self) -> bool:
        return self._task.done()

    def stop(self) -> None:
        self._task.cancel()


class FileDownload(ASGIResponse):
    """An open file as an attachment. Closes it in any case.

    If the file gets shorter meanwhile the promised Content-Length cannot be kept: the answer stays incomplete, upon
    which the server cuts the connection (RFC 9112, 8: the client sees an incomplete message).
    """

    _should_set_content_length = False

    def __init__(self, download: Download) -> None:
        super().__init__(
            status_code=200,
            media_type="application/octet-stream",
            headers={
                "content-length": str(download.size),
                "content-disposition": content_disposition(download.path),
                "x-content-type-options": "nosniff",
            },
        )
        self._download = download

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = _Watch(receive)
        try:
            await self.start_response(send)
            if not await self._sent_directly(scope):
                async with aclosing(self._download.pieces()) as pieces:
                    async for piece in pieces:
                        if watch.gone:
                            self._download.close("the client left")
                            return
                        await send(_body(piece, more=True))
            await send(_body(b"", more=False))
        except (EOFError, HiverError):
            return
        finally:
            watch.stop()
            self._download.close("interrupted")

    async def _sent_directly(self, scope: Scope) -> bool:
        takeover = takeover_of(scope)
        if takeover is None or self._download.size < WORTHWHILE_BYTES:
            return False
        async with takeover.response() as outgoing:
            if outgoing is not None:
                await self._download.send(outgoing)
        return outgoing is not None


class DirectoryListing(ASGIResponse):
    """`{"entries": [...]}`, sent in batches when there are many."""

    _should_set_content_length = False

    def __init__(
        self, first: list[DirectoryEntry], rest: AsyncGenerator[list[DirectoryEntry]], *, complete: bool
    ) -> None:
        super().__init__(status_code=200, media_type=JSON_TYPE)
        self._first = first
        self._rest = rest
        if complete:
            self.body = b'{"entries":' + msgspec.json.encode(first) + b"}"
            self.headers["content-length"] = str(len(self.body))

    @classmethod
    async def of(cls, batches: AsyncGenerator[list[DirectoryEntry]]) -> DirectoryListing:
        """Reads the first batch, so that what is wrong with the directory is known before the answer begins."""
        first = await anext(batches)
        second = await anext(batches, None)
        if second is None:
            return cls(first, batches, complete=True)
        return cls(first + second, batches, complete=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.body:
            await self.start_response(send)
            await send(_body(self.body, more=False))
            return
        watch = _Watch(receive)
        try:
            async with aclosing(self._rest):
                await self.start_response(send)
                await send(
                    {"type": "http.response.body", "body": b'{"entries":[' + _items(self._first), "more_body": True}
                )
                async for batch in self._rest:
                    if watch.gone:
                        return
                    await send(_body(b"," + _items(batch), more=True))
                await send(_body(b"]}", more=False))
        except HiverError:
            return
        finally:
            watch.stop()


def _items(batch: list[DirectoryEntry]) -> bytes:
    return msgspec.json.encode(batch)[1:-1]
