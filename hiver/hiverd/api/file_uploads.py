"""Request bodies of the file API as streams: raw, and `multipart/form-data` (RFC 7578) without spooling."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

from litestar import Request
from multipart import (
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from hiverd.contracts.errors import InvalidError

_MAX_DESTINATION_BYTES: Final = 8192
_MAX_PARTS: Final = 16
_MAX_HEADER_BYTES: Final = 8192


async def body_of(request: Request[Any, Any, Any]) -> AsyncIterator[bytes]:
    """The body's pieces as they arrive. Raises `InvalidError` when the client leaves before its end."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise InvalidError("the upload was cut short")
        if message["type"] != "http.request":
            continue
        if message["body"]:
            yield message["body"]
        if not message.get("more_body", False):
            return


class UploadForm:
    """The old clients' form: `destination`, a directory, then `file` with a file name (PROTOCOL 3.10).

    The destination has to come first, as it does with every published client: only then can the file be received
    in the place where it belongs.
    """

    def __init__(self, content_type: str, body: AsyncIterator[bytes]) -> None:
        """Raises `InvalidError` if this is no form."""
        media_type, options = parse_options_header(content_type)
        if media_type != "multipart/form-data" or not options.get("boundary"):
            raise InvalidError("path is empty, and the body is not multipart/form-data", field="path")
        self._body = body
        try:
            self._parser = PushMultipartParser(
                options["boundary"], max_segment_count=_MAX_PARTS, max_header_size=_MAX_HEADER_BYTES, strict=True
            )
        except MultipartError as error:
            raise InvalidError(f"malformed form: {error}") from error
        self._events = self._parsed()
        self.destination = ""
        self.filename = ""

    async def open(self) -> None:
        """Reads up to the file's first byte and sets `destination` and `filename`. Raises `InvalidError`."""
        destination: str | None = None
        async for event in self._events:
            if not isinstance(event, MultipartSegment):
                continue
            if event.name == "destination":
                destination = await self._text()
            elif event.name == "file":
                self.filename = _usable_filename(event.filename)
                break
        else:
            missing = "file" if destination else "destination"
            raise InvalidError(f"part '{missing}' is missing", field=missing)
        if not destination:
            raise InvalidError("part 'destination' is missing or does not come before 'file'", field="destination")
        if not destination.startswith("/"):
            raise InvalidError("destination must be an absolute path", field="destination")
        self.destination = destination

    async def content(self) -> AsyncIterator[bytes]:
        """The file. Ends only after the whole form was there, so that a cut one does not count as complete."""
        async for event in self._events:
            if event is None:
                break
            if isinstance(event, (bytes, bytearray)):
                yield bytes(event)
        async for _ in self._events:
            pass

    async def _text(self) -> str:
        value = bytearray()
        async for event in self._events:
            if event is None:
                break
            if isinstance(event, (bytes, bytearray)):
                value += event
            if len(value) > _MAX_DESTINATION_BYTES:
                raise InvalidError("destination is too long", field="destination")
        return value.decode("utf-8", "surrogateescape")

    async def _parsed(self) -> AsyncGenerator[MultipartSegment | bytes | bytearray | None]:
        try:
            async for chunk in self._body:
                for event in self._parser.parse(chunk):
                    yield event
            self._parser.close()
        except MultipartError as error:
            raise InvalidError(f"malformed form: {error}") from error


def _usable_filename(filename: str | None) -> str:
    name = (filename or "").rsplit("/", 1)[-1]
    if name in ("", ".", "..") or "\0" in name:
        raise InvalidError("part 'file' has no usable file name", field="file")
    return name
