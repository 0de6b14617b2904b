"""Requests that may be smuggled: what we take for one request, no other reader takes for two, or for another.

The other readers are h11, which is strict, and one below that forgives all that servers are known to forgive. They read
what we would send on, as `Exchange` writes it, and what the agent had sent.
"""

from __future__ import annotations

import contextlib
import re
import time

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hiverd.http.framing import MAX_HEAD_BYTES, ProtocolError
from hiverd.http.requests import RequestParser

LINES = st.sampled_from(
    [
        *(b"Host: api.test", b"Host: evil.test", b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 05"),
        *(
            b"Content-Length: 5, 5",
            b"Content-Length: +5",
            b"Content-Length:5 ",
            b"Content-Length : 5",
            b"content-length: 7",
        ),
        *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked ", b"Transfer-Encoding: identity"),
        *(b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding : chunked"),
        *(
            b" folded: x",
            b"\tTransfer-Encoding: chunked",
            b"X: a\0b",
            b"X: a\rY: b",
            b"X: a\nContent-Length: 5",
            b"nonsense",
        ),
        *(b"Connection: close", b"Connection: keep-alive, content-length", b"Expect: 100-continue", b"X-Y: \xff"),
    ]
)
STARTS = st.sampled_from(
    [
        *(b"GET / HTTP/1.1", b"POST /a HTTP/1.1", b"POST /a HTTP/1.0", b"HEAD / HTTP/1.1", b"get / HTTP/1.1"),
        *(b"GET  / HTTP/1.1", b"GET / HTTP/1.2", b"GET http://api.test/ HTTP/1.1", b"GET /a b HTTP/1.1", b"GET /"),
    ]
)
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"])
BODIES = st.lists(
    st.sampled_from(
        [
            *(b"hello", b"0\r\n\r\n", b"5\r\nhello\r\n", b"5;x=y\r\nhello\r\n", b"5\nhello\n", b"05\r\nhello\r\n"),
            *(
                b"0\r\nX: y\r\n\r\n",
                b"0\r\nX\r\n\r\n",
                b"-5\r\nhello\r\n",
                b"0x5\r\nhello\r\n",
                b"5 \r\nhello\r\n",
                b"\r\n",
            ),
            *(b"GET /b HTTP/1.1\r\nHost: api.test\r\n\r\n", b"5\r\nhelloX\r\n", b"fffffffffffffffff\r\n"),
        ]
    ),
    max_size=4,
).map(b"".join)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    lines = [draw(STARTS), b"Host: api.test", *draw(st.lists(LINES, max_size=3))]
    head = b"".join(line + draw(ENDS) for line in lines)
    return head + draw(ENDS) + draw(BODIES)


def ours(data: bytes, size: int = 1 << 20) -> tuple[RequestParser, bytes] | None:
    """The first request and its body; None if it was refused or is not whole."""
    parser = RequestParser()
    body = b""
    try:
        for start in range(0, len(data), size):
            body += parser.feed(data[start : start + size])
            if parser.complete:
                return parser, body
    except ProtocolError:
        return None
    return None


def h11s(data: bytes) -> tuple[bytes, bytes, bytes, bytes] | None:
    """Method, target, body and what is left of it; None if it refuses, or waits."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    body = b""
    try:
        event = connection.next_event()
        if not isinstance(event, h11.Request):
            return None
        while isinstance(piece := connection.next_event(), h11.Data):
            body += bytes(piece.data)
    except h11.RemoteProtocolError:
        return None
    if not isinstance(piece, h11.EndOfMessage):
        return None
    return event.method, event.target, body, connection.trailing_data[0]


def lenient(data: bytes) -> tuple[bytes, bytes] | None:
    """Body and rest as a forgiving server reads it: any line end, folding, spaces before colons; chunks win."""
    head, separator, rest = (
        re.split(rb"(\r?\n\r?\n)", data, maxsplit=1) if re.search(rb"\r?\n\r?\n", data) else (b"", b"", b"")
    )
    if not separator:
        return None
    fields = re.findall(rb"(?mi)^[ \t]*([\w-]+)[ \t]*:[ \t\x0b]*([^\r\n]*)", head)
    values = {name.lower(): value.strip(b" \t\x0b").lower() for name, value in fields}
    if b"chunked" in values.get(b"transfer-encoding", b""):
        body = b""
        while match := re.match(rb"[ \t]*0*([0-9a-fA-F]{1,6})[^\n]*\n", rest):
            size = int(match[1], 16)
            rest = rest[match.end() :]
            if size == 0:
                return body, re.sub(rb"\A(?:[^\r\n]+\r?\n)*\r?\n", b"", rest)
            body, rest = body + rest[:size], rest[size:].lstrip(b"\r\n")
        return None
    size = int(re.match(rb"\+?([0-9]*)", values.get(b"content-length", b"0"))[1] or 0)  # type: ignore[index]
    return (rest[:size], rest[size:]) if len(rest) >= size else None


@given(streams(), st.integers(1, 40))
@example(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nHost: a\r\n\r\n", 7)
def test_what_we_accept_every_reader_frames_alike(data: bytes, size: int) -> None:
    found = ours(data)
    in_pieces = ours(data, size)
    assert (found is None) == (in_pieces is None)
    if found is None:
        return
    parser, body = found
    head = parser.head
    assert head is not None
    assert in_pieces is not None
    assert in_pieces[1] == body
    theirs = lenient(data)
    assert theirs is not None
    assert theirs == (body, parser.excess)
    strict = h11s(data)
    if strict is not None:
        assert strict[2:] == (body, parser.excess)
        assert strict[0].decode() == head.method


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_in_any_pieces(data: bytes, size: int) -> None:
    parser = RequestParser()
    with contextlib.suppress(ProtocolError):
        for start in range(0, len(data), size):
            parser.feed(data[start : start + size])


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
        b"G" * 200_000,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 200_000,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 20_000,
    ],
    ids=["fields", "line", "extension", "trailers"],
)
def test_endless_heads_end_in_bounded_memory_and_time(data: bytes) -> None:
    parser = RequestParser()

    def feed() -> None:
        for start in range(0, len(data), 1_000):
            parser.feed(data[start : start + 1_000])
            assert len(parser._buffer) <= MAX_HEAD_BYTES + 1_000

    began = time.process_time()
    with pytest.raises(ProtocolError):
        feed()
    assert time.process_time() - began < 1
