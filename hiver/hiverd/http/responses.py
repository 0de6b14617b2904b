"""Reading HTTP/1.1 responses from a peer that is not trusted: bytes in, head and body pieces out, no I/O (RFC 9112).

What comes out is always re-serialised by whoever relays it, so the danger is not odd bytes in themselves but a framing
on which two readers disagree. Hence the body's length is taken from one unambiguous source or the response is refused:
no Content-Length beside Transfer-Encoding, no second Content-Length, no transfer coding but `chunked`, no line folding,
exact chunk lines. A bare LF ends a line of the head (RFC 9112 2.2 allows it, and hand-made servers send it).
Bytes behind the end of a response are never taken for another one.
"""

from __future__ import annotations

import re
from typing import Final

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_FIELDS: Final = 1_000
MAX_INTERIM_RESPONSES: Final = 100
MAX_CHUNK_LINE_BYTES: Final = 4 * 1024

Headers = list[tuple[bytes, bytes]]
"""Field lines in order of arrival; names in lower case, values without surrounding white space."""

_HEAD_END = re.compile(rb"\n\r?\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_FRAMING: Final = frozenset((b"content-length", b"transfer-encoding", b"connection"))


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.1 as we accept it. The text is safe to show."""


class ResponseHead:
    """Status line and header fields of one response, and how its body is delimited."""

    __slots__ = ("chunked", "content_length", "headers", "keep_alive", "status")

    def __init__(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = headers
        self.content_length: int | None = None
        """As announced; also set where there is no body (HEAD, 304)."""
        self.chunked = False
        self.keep_alive = True


class ResponseParser:
    """Reads the responses to one request: any number of interim ones (1xx), then a final one with its body.

    `feed` returns body bytes as they come. Afterwards `head` is set once the final head is known, `complete` when the
    body has ended. Build a new parser for every request.
    """

    __slots__ = (
        "_awaiting_crlf",
        "_buffer",
        "_chunked",
        "_in_trailers",
        "_interim_count",
        "_no_body",
        "_remaining",
        "_upgradable",
        "complete",
        "continued",
        "excess",
        "head",
        "trailers",
    )

    def __init__(self, method: str, *, upgradable: bool = False) -> None:
        """`upgradable`: the request asked for a protocol switch, so 101 is a final answer."""
        self.head: ResponseHead | None = None
        self.complete = False
        self.continued = False
        """True once `100 Continue` has arrived."""
        self.excess = b""
        """Not empty if something followed the end of the response; after 101, the first bytes of the new protocol."""
        self.trailers: Headers = []
        self._no_body = method == "HEAD"
        self._upgradable = upgradable
        self._buffer = b""
        self._interim_count = 0
        self._chunked = False
        self._remaining: int | None = None
        """Bytes of the body, or of the current chunk, still to come; None while delimited by the close."""
        self._awaiting_crlf = False
        self._in_trailers = False

    def feed(self, data: bytes) -> bytes:
        """Takes what was received, returns the body bytes in it. Raises `ProtocolError`: the connection is useless."""
        if self.head is None:
            rest = self._read_heads(self._buffer + data if self._buffer else data)
            if rest is None:
                return b""
            data = rest
        if self.complete:
            self.excess = self.excess or data
            return b""
        if self._chunked:
            return self._read_chunks(data)
        if self._remaining is None:
            return data
        return self._read_counted(data, self._remaining)

    def eof(self) -> None:
        """The peer has closed. Completes a body delimited by that; raises `ProtocolError` on anything cut short."""
        if self.complete:
            return
        if self.head is None or self._chunked or self._remaining is not None:
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
        elif head.chunked:
            self._chunked = True
            self._remaining = 0
        else:
            self._remaining = head.content_length
            self.complete = head.content_length == 0
            head.keep_alive = head.keep_alive and head.content_length is not None

    def _read_counted(self, data: bytes, remaining: int) -> bytes:
        size = len(data)
        if size < remaining:
            self._remaining = remaining - size
            return data
        self._remaining = 0
        self.complete = True
        if size == remaining:
            return data
        self.excess = data[remaining:]
        return data[:remaining]

    def _read_chunks(self, data: bytes) -> bytes:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        pieces: list[bytes] = []
        position: int | None = 0
        end = len(data)
        while position is not None and position < end and not self.complete:
            if self._remaining:
                piece = data[position : position + self._remaining]
                pieces.append(piece)
                position += len(piece)
                self._remaining -= len(piece)
                self._awaiting_crlf = self._remaining == 0
            elif self._in_trailers:
                position = self._read_trailers(data, position)
            else:
                position = self._read_chunk_line(data, position)
        if self.complete and position is not None:
            self.excess = data[position:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_chunk_line(self, data: bytes, position: int) -> int | None:
        """The CRLF behind the previous chunk, then `size [; extension] CRLF`. None: more bytes are needed."""
        start = position
        if self._awaiting_crlf:
            if not b"\r\n".startswith(data[start : start + 2]):
                raise ProtocolError("malformed chunk in the response")
            start += 2
        line_end = data.find(b"\r\n", start, start + MAX_CHUNK_LINE_BYTES)
        if line_end < 0:
            if len(data) - start >= MAX_CHUNK_LINE_BYTES:
                raise ProtocolError("malformed chunk in the response")
            self._buffer = data[position:]
            return None
        line = _CHUNK_LINE.fullmatch(data, start, line_end)
        if line is None:
            raise ProtocolError("malformed chunk in the response")
        self._awaiting_crlf = False
        self._remaining = int(line[1], 16)
        self._in_trailers = self._remaining == 0
        return line_end + 2

    def _read_trailers(self, data: bytes, position: int) -> int | None:
        if data.startswith(b"\r\n", position):
            self.complete = True
            return position + 2
        found = data.find(b"\r\n\r\n", position)
        if (found if found >= 0 else len(data)) - position > MAX_HEAD_BYTES:
            raise ProtocolError("the response trailers are too large")
        if found < 0:
            self._buffer = data[position:]
            return None
        self.trailers = parse_fields(data[position:found].split(b"\r\n"))
        self.complete = True
        return found + 4


def parse_response_head(block: bytes) -> ResponseHead:
    """Parses a head without its final empty line. Raises `ProtocolError`."""
    lines = [line[:-1] if line.endswith(b"\r") else line for line in block.split(b"\n")]
    status_line = _STATUS_LINE.fullmatch(lines[0])
    if status_line is None:
        raise ProtocolError("malformed status line in the response")
    old = status_line[1] == b"0"
    head = ResponseHead(int(status_line[2]), parse_fields(lines[1:]))
    head.keep_alive = not old
    framing = [field for field in head.headers if field[0] in _FRAMING]
    if framing:
        _judge_framing(head, framing, old=old)
    return head


def parse_fields(lines: list[bytes]) -> Headers:
    """Parses field lines without their ends. Raises `ProtocolError` on folding, bad names and control characters."""
    if len(lines) > MAX_FIELDS:
        raise ProtocolError("too many header fields in the response")
    fields: Headers = []
    for line in lines:
        field = _FIELD_LINE.fullmatch(line)
        if field is None:
            raise ProtocolError("malformed header field in the response")
        fields.append((field[1].lower(), field[2].strip(b" \t")))
    return fields


def _judge_framing(head: ResponseHead, framing: Headers, *, old: bool) -> None:
    lengths = [value for name, value in framing if name == b"content-length"]
    codings = [value for name, value in framing if name == b"transfer-encoding"]
    if lengths:
        if len(lengths) > 1 or _LENGTH.fullmatch(lengths[0]) is None:
            raise ProtocolError("invalid Content-Length in the response")
        head.content_length = int(lengths[0])
    if codings:
        if lengths or old or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise ProtocolError("invalid Transfer-Encoding in the response")
        head.chunked = True
    tokens = connection_tokens(framing)
    if b"close" in tokens:
        head.keep_alive = False
    elif old and b"keep-alive" in tokens:
        head.keep_alive = True


def connection_tokens(headers: Headers) -> frozenset[bytes]:
    """The members of all Connection fields, in lower case (RFC 9110 7.6.1)."""
    return frozenset(
        token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")
    )
