"""Reading HTTP/1.1 responses from a peer that is not trusted: bytes in, head and body pieces out, no I/O (RFC 9112).

A bare LF ends a line of the head (RFC 9112 2.2 allows it, and hand-made servers send it). Bytes behind the end of a
response are never taken for another one.
"""

from __future__ import annotations

import re
from typing import Final

from hiverd.http.framing import MAX_HEAD_BYTES, BodyReader, Headers, ProtocolError, judge_framing, parse_fields

MAX_INTERIM_RESPONSES: Final = 100

_HEAD_END = re.compile(rb"\n\r?\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")


class ResponseHead:
    """Status line and header fields of one response, and how its body is delimited."""

    __slots__ = ("chunked", "content_length", "headers", "keep_alive", "status")

    def __init__(self, status: int, headers: Headers, *, old: bool) -> None:
        """`old`: HTTP/1.0. Raises `ProtocolError` if the body's end is not clear."""
        framing = judge_framing(headers, old=old)
        self.status = status
        self.headers = headers
        self.content_length = framing.content_length
        """As announced; also set where there is no body (HEAD, 304)."""
        self.chunked = framing.chunked
        self.keep_alive = framing.keep_alive


class ResponseParser(BodyReader):
    """Reads the responses to one request: any number of interim ones (1xx), then a final one with its body.

    `feed` returns body bytes as they come. Afterwards `head` is set once the final head is known, `complete` when the
    body has ended. Build a new parser for every request. After 101, `excess` is the first bytes of the new protocol.
    """

    __slots__ = ("_interim_count", "_no_body", "_upgradable", "continued", "head")

    def __init__(self, method: str, *, upgradable: bool = False) -> None:
        """`upgradable`: the request asked for a protocol switch, so 101 is a final answer."""
        super().__init__()
        self.head: ResponseHead | None = None
        self.continued = False
        """True once `100 Continue` has arrived."""
        self._no_body = method == "HEAD"
        self._upgradable = upgradable
        self._interim_count = 0

    def feed(self, data: bytes) -> bytes:
        """Takes what was received, returns the body bytes in it. Raises `ProtocolError`: the connection is useless."""
        if self.head is None:
            rest = self._read_heads(self._buffer + data if self._buffer else data)
            if rest is None:
                return b""
            data = rest
        return self._read_body(data)

    def eof(self) -> None:
        """The peer has closed. Completes a body delimited by that; raises `ProtocolError` on anything cut short."""
        if self.complete:
            return
        if self.head is None or not self._ends_with_close:
            raise ProtocolError("the connection was closed in the middle of the response")
        self.complete = True

    def _read_heads(self, data: bytes) -> bytes | None:
        """Consumes complete heads up to the final one and returns the rest; None if more bytes are needed."""
        while self.head is None:
            # Only the last three bytes before the new data can be part of an end that was not seen before.
            found = _HEAD_END.search(data, max(0, len(self._buffer) - 3))
            if (found.end() if found else len(data)) > MAX_HEAD_BYTES:
                raise ProtocolError("the response head is too large")
            if found is None:
                self._buffer = data
                return None
            self._buffer = b""
            head = parse_response_head(data[: found.start()])
            data = data[found.end() :]
            if head.status >= 200 or (head.status == 101 and self._upgradable):
                self._begin_body(head)
            else:
                self._note_interim(head.status)
        return data

    def _note_interim(self, status: int) -> None:
        self._interim_count += 1
        if status == 101 or self._interim_count > MAX_INTERIM_RESPONSES:
            raise ProtocolError("unexpected interim response")
        self.continued = self.continued or status == 100

    def _begin_body(self, head: ResponseHead) -> None:
        """RFC 9112 6.3."""
        self.head = head
        if self._no_body or head.status in (101, 204, 304):
            self.complete = True
            return
        self._chunked = head.chunked
        self._remaining = 0 if head.chunked else head.content_length
        self.complete = head.content_length == 0 and not head.chunked
        head.keep_alive = head.keep_alive and not self._ends_with_close


def parse_response_head(block: bytes) -> ResponseHead:
    """Parses a head without its final empty line. Raises `ProtocolError`."""
    lines = [line[:-1] if line.endswith(b"\r") else line for line in block.split(b"\n")]
    status_line = _STATUS_LINE.fullmatch(lines[0])
    if status_line is None:
        raise ProtocolError("malformed status line")
    return ResponseHead(int(status_line[2]), parse_fields(lines[1:]), old=status_line[1] == b"0")
