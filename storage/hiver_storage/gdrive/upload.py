"""Content on its way to Drive: in one request, or in a session of chunks that goes on where a cut one stopped."""

from __future__ import annotations

import errno
import hashlib
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from googleapiclient.http import MediaInMemoryUpload, MediaUpload

from hiver_storage.retrying import Patience, TransientError, in_blocks

from .entries import FIELDS, Entry, parse
from .service import Service
from .tree import SHARED

SMALL_BYTES: Final = 5 << 20
"""Drive's limit for an upload in one request."""
CHUNK_BYTES: Final = 8 << 20
"""A multiple of 256 KiB, as Drive wants it. Each upload under way holds two."""

Check = Callable[[], Awaitable[None]]


class Target:
    """The file that gets the content: a new one of an id that was chosen beforehand, or one that exists."""

    def __init__(self, body: dict[str, Any], *, file_id: str, is_new: bool) -> None:
        self.body = body
        self.file_id = file_id
        self.is_new = is_new

    def request(self, api: Any, media: MediaUpload) -> Any:
        if self.is_new:
            body = {**self.body, "id": self.file_id}
            return api.files().create(body=body, media_body=media, fields=FIELDS, **SHARED)
        return api.files().update(fileId=self.file_id, body=self.body, media_body=media, fields=FIELDS, **SHARED)


def media_type(name: str) -> str:
    """By the name's extension, as other programs that show the drive expect it."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


async def send_small(
    service: Service, target: Target, name: str, data: bytes, resumed: Callable[[], Awaitable[Entry | None]]
) -> Entry:
    """`resumed` is asked before a repeated attempt: the entry, if an earlier one was done after all."""
    doubt = False

    async def attempt() -> Entry:
        nonlocal doubt
        if doubt and (entry := await resumed()) is not None:
            return entry
        media = MediaInMemoryUpload(data, mimetype=media_type(name), resumable=False)
        try:
            return parse(await service.once(lambda api: target.request(api, media)))
        except TransientError as failure:
            doubt = doubt or failure.may_be_done
            raise

    return await service.patience.repeat(attempt)


async def send_big(
    service: Service, target: Target, name: str, content: AsyncIterator[bytes], size: int, *, before_last: Check
) -> tuple[Entry, str]:
    """The entry, and the MD5 of what was sent. `before_last` may still refuse it all: nothing shows before the last
    chunk."""
    window = _Window(size, media_type(name))
    digest = hashlib.md5(usedforsecurity=False)
    request = await service.run(lambda _: target.request(service.api(), window))
    window.request = request
    async for chunk in in_blocks(content, size, CHUNK_BYTES):
        digest.update(chunk)
        window.take(chunk)
        if window.end == size:
            await before_last()
        answer = await _send_chunk(service.patience, service, request, window)
        if answer is not None:
            return parse(answer), digest.hexdigest()
    raise OSError(errno.EIO, "Drive did not take the whole content")


async def _send_chunk(patience: Patience, service: Service, request: Any, window: _Window) -> dict[str, Any] | None:
    """Drive may take a part of a chunk; and after an error the library first asks how much has arrived."""

    async def attempt() -> Any:
        if request.resumable_progress >= window.end:  # a lost answer said so
            return None
        try:
            return (await service.run(lambda connection: request.next_chunk(http=connection)))[1]
        except OSError as refused:
            if refused.errno != errno.EINVAL:
                raise
            # httplib2 sends a request again whose answer was lost, and the chunk is not at its place any more. The
            # library asks where we are before the next attempt.
            raise TransientError(errno.EIO, "Drive refuses a chunk") from None

    answer: dict[str, Any] | None = None
    while answer is None and request.resumable_progress < window.end:
        answer = await patience.repeat(attempt)
    return answer


class _Window(MediaUpload):  # type: ignore[misc]  # the library has no types
    """What the library takes chunks from: the one chunk that is here."""

    def __init__(self, size: int, mime_type: str) -> None:
        self._size = size
        self._type = mime_type
        self._data = b""
        self.end = 0
        self.request: Any = None

    def take(self, chunk: bytes) -> None:
        self._data = chunk
        self.end += len(chunk)

    def chunksize(self) -> int:
        """Exactly what is left of it: the library takes less for the end of the content."""
        progress: int = self.request.resumable_progress
        return self.end - progress

    def getbytes(self, begin: int, length: int) -> bytes:
        start = self.end - len(self._data)
        if begin < start or begin >= self.end:
            raise OSError(errno.EIO, "Drive lost a part of the upload")
        return self._data[begin - start :][:length]

    def size(self) -> int:
        return self._size

    def mimetype(self) -> str:
        return self._type

    def resumable(self) -> bool:
        return True

    def has_stream(self) -> bool:
        return False
