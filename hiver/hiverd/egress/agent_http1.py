"""HTTP/1.1 with the agent: one exchange at a time on a connection (RFC 9112)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Final

from hiverd.egress.agent import BODY_STALL_SECONDS, HEAD_SECONDS, IDLE_SECONDS, AgentGoneError, AgentSide
from hiverd.egress.stream import Stream
from hiverd.http.framing import Headers, ProtocolError
from hiverd.http.headers import field_block
from hiverd.http.requests import RequestError, RequestParser

_LAST_CHUNK: Final = b"0\r\n"


class Http1Agent(AgentSide):
    """One request and its answer. `excess` is what has been read of the next one."""

    def __init__(self, stream: Stream, excess: bytes = b"") -> None:
        self._stream = stream
        self._parser = RequestParser()
        self._early = excess
        self._pieces: list[bytes] = []
        self._broken: ProtocolError | None = None
        """What is wrong with the part of the body that came with the head."""
        self._begun = False
        self._chunked = False
        self._keep = False
        self._finished = False
        self._held = b""
        self._head_deadline_monotonic: float | None = None

    @property
    def body_read(self) -> bool:
        return self._parser.complete and not self._pieces

    @property
    def trailers(self) -> Headers:
        return self._parser.trailers

    @property
    def excess(self) -> bytes:
        """What has come behind the request."""
        return self._parser.excess

    @property
    def reusable(self) -> bool:
        """The exchange has ended well and the connection can carry another one."""
        return self._finished and self._keep and self.body_read

    @property
    def gone(self) -> bool:
        return self._stream.gone

    def watch(self, on_gone: Callable[[], None] | None) -> None:
        self._stream.on_gone = on_gone
        if on_gone is not None and self._stream.gone and self.body_read:
            self._stream.on_gone = None
            on_gone()

    async def read_head(self) -> bool:
        """False when the agent has closed between two requests. Raises `RequestError`, `AgentGoneError`, `OSError`."""
        data, self._early = self._early, b""
        try:
            while True:
                self._take_first(data)
                if self._parser.head is not None:
                    self.head = self._parser.head
                    return True
                data = await self._stream.read(self._patience_seconds())
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

    def _take_first(self, data: bytes) -> None:
        """A body that is malformed from the start is still the body of a request that can be judged."""
        try:
            if data and (piece := self._parser.feed(data)):
                self._pieces.append(piece)
        except ProtocolError as error:
            if self._parser.head is None:
                raise
            self._broken = error

    def _patience_seconds(self) -> float:
        """A head has its time as a whole, however small the pieces in which it comes."""
        if not self._parser.begun:
            return IDLE_SECONDS
        now = time.monotonic()
        if self._head_deadline_monotonic is None:
            self._head_deadline_monotonic = now + HEAD_SECONDS
        return max(0.0, self._head_deadline_monotonic - now)

    async def body(self) -> AsyncIterator[bytes]:
        while self._pieces:
            yield self._pieces.pop(0)
        if self._broken is not None:
            raise RequestError(400, str(self._broken)) from self._broken
        while not self._parser.complete:
            try:
                data = await self._stream.read(BODY_STALL_SECONDS)
                piece = self._parser.feed(data)
            except TimeoutError as error:
                raise AgentGoneError from error
            except ProtocolError as error:
                raise RequestError(400, str(error)) from error
            if not data:
                raise AgentGoneError
            if piece:
                yield piece

    async def ask_for_body(self) -> None:
        if self.head.expects_continue and not self._pieces and not self._parser.complete:
            await self._stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def start(self, status: int, fields: Headers, *, length: int | None, has_body: bool) -> None:
        self._begun = True
        self._chunked = has_body and length is None and not self.head.old
        # Without a length and chunks, only the end of the connection tells the end of the body.
        self._keep = self.head.framing.keep_alive and (not has_body or length is not None or self._chunked)
        fields = [*fields, *self._framing(length)]
        if not (self._keep and self.body_read):
            self._keep = False
            fields.append((b"connection", b"close"))
        elif self.head.old:
            fields.append((b"connection", b"keep-alive"))
        head = status_line(status) + field_block(fields) + b"\r\n"
        if has_body:
            self._held = head  # goes out with the first piece, in one packet
        else:
            await self._stream.write(head)

    def _framing(self, length: int | None) -> Headers:
        if length is not None:
            return [(b"content-length", b"%d" % length)]
        return [(b"transfer-encoding", b"chunked")] if self._chunked else []

    async def write(self, data: bytes) -> None:
        if not data:
            await self._flush()
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._held:
            data, self._held = self._held + data, b""
        await self._stream.write(data)

    async def finish(self, trailers: Headers) -> None:
        if self._chunked:
            last = _LAST_CHUNK + field_block(trailers) + b"\r\n"
            self._held += last
        await self._flush()
        self._finished = True

    async def _flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            await self._stream.write(data)

    async def refuse(self, status: int, text: str) -> None:
        self._keep = False
        if self._begun:
            self._stream.reset()
            return
        self._begun = True
        content = f"{text}\n".encode() if text else b""
        fields: Headers = [(b"content-length", b"%d" % len(content)), (b"connection", b"close")]
        if content:
            fields.append((b"content-type", b"text/plain; charset=utf-8"))
        head = self._parser.head  # of a request whose body is wrong from its first byte, only the parser knows it
        if head is not None and head.method == "HEAD":
            content = b""
        await self._stream.write(status_line(status) + field_block(fields) + b"\r\n" + content)

    async def switch(self, fields: Headers) -> Stream:
        self._begun = True
        await self._stream.write(status_line(101) + field_block(fields) + b"\r\n")
        self._stream.unread = self.excess + self._stream.unread
        return self._stream


def status_line(status: int) -> bytes:
    """With the usual phrase (RFC 9110 15)."""
    line = _STATUS_LINES.get(status)
    return line if line is not None else b"HTTP/1.1 %d \r\n" % status


_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
