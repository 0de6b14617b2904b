"""The agent's side of one HTTP/1.1 exchange: its request's body, and the answer written back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Final

from hiverd.egress.stream import Stream
from hiverd.http.framing import Headers, ProtocolError
from hiverd.http.headers import field_block
from hiverd.http.requests import RequestError, RequestHead, RequestParser

IDLE_SECONDS: Final = 75.0
"""Without a request on a connection that is kept open."""
HEAD_SECONDS: Final = 30.0
"""From the first byte of a request's head to its last."""
BODY_STALL_SECONDS: Final = 120.0
"""Between two pieces of a body that the agent sends."""


class AgentGoneError(Exception):
    """The agent has closed, or is too slow; nobody is left to answer."""


class AgentSide:
    """One request and its answer. `excess` is what has been read of the next one."""

    def __init__(self, stream: Stream, excess: bytes = b"") -> None:
        self.stream = stream
        self._parser = RequestParser()
        self._early = excess
        self._pieces: list[bytes] = []
        self._answer_begun = False

    @property
    def head(self) -> RequestHead:
        """Once `read_head` has returned True."""
        assert self._parser.head is not None  # noqa: S101 -- see above
        return self._parser.head

    @property
    def body_read(self) -> bool:
        """The whole body has been taken."""
        return self._parser.complete and not self._pieces

    @property
    def excess(self) -> bytes:
        return self._parser.excess

    @property
    def trailers(self) -> Headers:
        return self._parser.trailers

    async def read_head(self) -> bool:
        """False when the agent has closed between two requests. Raises `RequestError`, `AgentGoneError`, `OSError`."""
        data, self._early = self._early, b""
        try:
            while True:
                if data and (piece := self._parser.feed(data)):
                    self._pieces.append(piece)
                if self._parser.head is not None:
                    return True
                async with asyncio.timeout(HEAD_SECONDS if self._parser.begun else IDLE_SECONDS):
                    data = await self.stream.read()
                if not data:
                    if self._parser.begun:
                        raise AgentGoneError
                    return False
        except TimeoutError as error:
            if not self._parser.begun:
                return False
            raise RequestError(408, "the request head did not come in time") from error
        except RequestError:
            raise
        except ProtocolError as error:
            raise RequestError(400, str(error)) from error

    async def body(self) -> AsyncIterator[bytes]:
        """The pieces of the body as they come. Raises `AgentGoneError`, `RequestError`, `OSError`."""
        for piece in self._pieces:
            yield piece
        self._pieces.clear()
        while not self._parser.complete:
            try:
                async with asyncio.timeout(BODY_STALL_SECONDS):
                    data = await self.stream.read()
                piece = self._parser.feed(data)
            except TimeoutError as error:
                raise AgentGoneError from error
            except ProtocolError as error:
                raise RequestError(400, str(error)) from error
            if not data:
                raise AgentGoneError
            if piece:
                yield piece

    async def whole_body(self, limit: int) -> bytes:
        """Raises `RequestError` 413 beyond the limit."""
        gathered = bytearray()
        async for piece in self.body():
            gathered += piece
            if len(gathered) > limit:
                raise RequestError(413, "the request's body is too large to be changed")
        return bytes(gathered)

    async def ask_for_body(self) -> None:
        """Tells an agent that waits for it to send its body."""
        if self.head.expects_continue and not self._pieces and not self._parser.complete:
            await self.stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def start(self, status: int, fields: Headers, *, close: bool) -> None:
        """Writes the head of the answer."""
        self._answer_begun = True
        if close and status != 101:
            fields = [*fields, (b"connection", b"close")]
        await self.stream.write(status_line(status) + field_block(fields) + b"\r\n")

    async def refuse(self, status: int, text: str) -> None:
        """A short answer of our own, after which the connection ends. Nothing if another answer has begun."""
        if self._answer_begun:
            self.stream.abort()
            return
        content = f"{text}\n".encode() if text else b""
        fields: Headers = [(b"content-length", b"%d" % len(content))]
        if content:
            fields.append((b"content-type", b"text/plain; charset=utf-8"))
        await self.start(status, fields, close=True)
        if content and not (self._parser.head is not None and self.head.method == "HEAD"):
            await self.stream.write(content)


def status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")
