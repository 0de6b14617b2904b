"""Field lines and body framing of HTTP/1.1, the same for requests and responses: bytes in, no I/O (RFC 9112).

What comes out is always re-serialised by whoever relays it, so the danger is not odd bytes in themselves but a framing
on which two readers disagree. Hence a body's length is taken from one unambiguous source or the message is refused:
no Content-Length beside Transfer-Encoding, no second Content-Length, no transfer coding but `chunked`, no line folding,
exact chunk lines.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_FIELDS: Final = 1_000
MAX_CHUNK_LINE_BYTES: Final = 4 * 1024

Headers = list[tuple[bytes, bytes]]
"""Field lines in order of arrival; names in lower case, values without surrounding white space."""

_FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_FRAMING: Final = frozenset((b"content-length", b"transfer-encoding", b"connection"))


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.1 as we accept it. The text is safe to show."""


class Framing(Struct):
    """How a message's body is delimited, and whether another message may follow."""

    content_length: int | None = None
    chunked: bool = False
    keep_alive: bool = True


class BodyReader:
    """Reads one body. `feed` returns its bytes as they come; afterwards `complete` tells whether it has ended."""

    __slots__ = (
        "_awaiting_crlf",
        "_buffer",
        "_chunked",
        "_in_trailers",
        "_remaining",
        "complete",
        "excess",
        "trailers",
    )

    def __init__(self) -> None:
        self.complete = False
        self.excess = b""
        """What followed the end of the message."""
        self.trailers: Headers = []
        self._buffer = b""
        self._chunked = False
        self._remaining: int | None = None
        """Bytes of the body, or of the current chunk, still to come; None while delimited by the close."""
        self._awaiting_crlf = False
        self._in_trailers = False

    def _frame(self, framing: Framing) -> None:
        """Begins a body. Without a length and chunks it ends with the connection."""
        self._chunked = framing.chunked
        self._remaining = 0 if framing.chunked else framing.content_length
        self.complete = self._remaining == 0 and not framing.chunked

    def _read_body(self, data: bytes) -> bytes:
        if self.complete:
            self.excess = self.excess or data
            return b""
        if self._chunked:
            return self._read_chunks(data)
        if self._remaining is None:
            return data
        return self._read_counted(data, self._remaining)

    @property
    def _ends_with_close(self) -> bool:
        return not self._chunked and self._remaining is None

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
                raise ProtocolError("malformed chunk")
            start += 2
        line_end = data.find(b"\r\n", start, start + MAX_CHUNK_LINE_BYTES)
        if line_end < 0:
            if len(data) - start >= MAX_CHUNK_LINE_BYTES:
                raise ProtocolError("malformed chunk")
            self._buffer = data[position:]
            return None
        line = _CHUNK_LINE.fullmatch(data, start, line_end)
        if line is None:
            raise ProtocolError("malformed chunk")
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
            raise ProtocolError("the trailers are too large")
        if found < 0:
            self._buffer = data[position:]
            return None
        self.trailers = parse_fields(data[position:found].split(b"\r\n"))
        self.complete = True
        return found + 4


def parse_fields(lines: list[bytes]) -> Headers:
    """Parses field lines without their ends. Raises `ProtocolError` on folding, bad names and control characters."""
    if len(lines) > MAX_FIELDS:
        raise ProtocolError("too many header fields")
    fields: Headers = []
    for line in lines:
        field = _FIELD_LINE.fullmatch(line)
        if field is None:
            raise ProtocolError("malformed header field")
        fields.append((field[1].lower(), field[2].strip(b" \t")))
    return fields


def judge_framing(headers: Headers, *, old: bool) -> Framing:
    """RFC 9112 6; `old` is HTTP/1.0. Raises `ProtocolError` on whatever two readers could take differently."""
    result = Framing(keep_alive=not old)
    framing = [field for field in headers if field[0] in _FRAMING]
    if not framing:
        return result
    lengths = [value for name, value in framing if name == b"content-length"]
    codings = [value for name, value in framing if name == b"transfer-encoding"]
    if lengths:
        if len(lengths) > 1 or _LENGTH.fullmatch(lengths[0]) is None:
            raise ProtocolError("invalid Content-Length")
        result.content_length = int(lengths[0])
    if codings:
        if lengths or old or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise ProtocolError("invalid Transfer-Encoding")
        result.chunked = True
    tokens = connection_tokens(framing)
    if b"close" in tokens:
        result.keep_alive = False
    elif old and b"keep-alive" in tokens:
        result.keep_alive = True
    return result


def connection_tokens(headers: Headers) -> frozenset[bytes]:
    """The members of all Connection fields, in lower case (RFC 9110 7.6.1)."""
    return frozenset(
        token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")
    )
