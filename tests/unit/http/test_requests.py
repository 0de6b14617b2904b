"""The request parser: what it takes, what it refuses, and that pieces of any size give the same result."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hiverd.http.framing import MAX_FIELDS, MAX_HEAD_BYTES, ProtocolError
from hiverd.http.requests import MAX_TARGET_BYTES, RequestError, RequestHead, RequestParser

HOST = b"Host: a.test\r\n"


def parse(*pieces: bytes) -> tuple[RequestParser, bytes]:
    parser = RequestParser()
    return parser, b"".join(parser.feed(piece) for piece in pieces)


def head_of(*pieces: bytes) -> RequestHead:
    head = parse(*pieces)[0].head
    assert head is not None
    return head


def test_a_request_without_a_body() -> None:
    parser, body = parse(b"GET /a%20b?x=1&y HTTP/1.1\r\nHost: A.test:80\r\nX-A:  1 \r\nx-a:2\r\n\r\nGET /next")
    head = parser.head
    assert head is not None
    assert (head.method, head.path, head.query, head.host) == ("GET", "/a%20b", "x=1&y", "A.test:80")
    assert head.headers[1:] == [(b"x-a", b"1"), (b"x-a", b"2")]
    assert (head.framing.keep_alive, head.has_body, parser.complete, body) == (True, False, True, b"")
    assert parser.excess == b"GET /next"


def test_bodies() -> None:
    parser, body = parse(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhelloGET")
    assert (body, parser.complete, parser.excess) == (b"hello", True, b"GET")
    chunks = b"5;a=b\r\nhello\r\n0\r\nX-T: 1\r\n\r\nGET"
    parser, body = parse(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", chunks)
    assert (body, parser.trailers, parser.excess) == (b"hello", [(b"x-t", b"1")], b"GET")


def test_forms_of_the_target() -> None:
    assert head_of(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n").path == "*"
    head = head_of(b"GET http://a.test?q HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (head.path, head.query, head.host) == ("/", "q", "a.test")
    head = head_of(b"GET /p? HTTP/1.0\r\n\r\n")
    assert (head.query, head.host, head.framing.keep_alive) == ("", None, False)


def test_an_empty_line_before_a_request_is_skipped_once() -> None:
    assert parse(b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n")[0].complete
    with pytest.raises(RequestError):
        parse(b"\r\n\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n")


@pytest.mark.parametrize(
    ("fields", "upgrade"),
    [
        (b"Connection: Upgrade\r\nUpgrade: WebSocket\r\n", b"websocket"),
        (b"Connection: keep-alive, upgrade\r\nUpgrade: h2c\r\n", b"h2c"),
        (b"Upgrade: websocket\r\n", None),
        (b"Connection: upgrade\r\nUpgrade: websocket, h2c\r\n", None),
        (b"Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n", None),
    ],
)
def test_upgrades(fields: bytes, upgrade: bytes | None) -> None:
    assert head_of(b"GET / HTTP/1.1\r\n" + HOST + fields + b"\r\n").upgrade == upgrade


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET  / HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"GET\t/ HTTP/1.1", 400),
        (b"GET / HTTP/2.0", 400),
        (b"GET / http/1.1", 400),
        (b"GET /", 400),
        (b"GET /#f HTTP/1.1", 400),
        (b"GET a.test/ HTTP/1.1", 400),
        (b"GET http://u@a.test/ HTTP/1.1", 400),
        (b"GET http://b.test/ HTTP/1.1", 400),
        (b"GET ftp://a.test/ HTTP/1.1", 400),
        (b"GET * HTTP/1.1", 400),
        (b"GET /\xc3\xa9 HTTP/1.1", 400),
        (b"G" * 33 + b" / HTTP/1.1", 400),
        (b"CONNECT a.test:443 HTTP/1.1", 501),
        (b"PRI * HTTP/2.0", 400),
        (b"GET /" + b"x" * MAX_TARGET_BYTES + b" HTTP/1.1", 414),
    ],
)
def test_refused_request_lines(line: bytes, status: int) -> None:
    with pytest.raises(RequestError) as refused:
        parse(line + b"\r\n" + HOST + b"\r\n")
    assert refused.value.status == status


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length:\r\n",
        b"Content-Length: 9999999999999999999\r\n",
        b"Content-Length : 5\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: x\x0bchunked\r\n",
        b"Transfer-Encoding:\r\n chunked\r\n",
        b"X: a\r\n folded\r\n",
        b"X: a\nTransfer-Encoding: chunked\r\n",
        b"X: a\rTransfer-Encoding: chunked\r\n",
        b"X: a\x00b\r\n",
        b"X Y: a\r\n",
        b": a\r\n",
        b"no colon\r\n",
        b"Host: b.test\r\n",
        b"hOST: a.test\r\n",
    ],
)
def test_fields_on_which_readers_disagree_are_refused(fields: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        parse(b"POST / HTTP/1.1\r\n" + HOST + fields + b"\r\n")
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nExpect: magic\r\n\r\n", 417),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * (MAX_FIELDS + 1) + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * MAX_HEAD_BYTES, 431),
        (b"x" * (MAX_HEAD_BYTES + 1), 431),
    ],
)
def test_refused_requests(request_bytes: bytes, status: int) -> None:
    with pytest.raises(RequestError) as refused:
        parse(request_bytes)
    assert refused.value.status == status


@pytest.mark.parametrize(
    "chunk", [b"5\nhello", b"5\r\nhelloX", b"0x5\r\n", b"-1\r\n", b"\r\n", b"5 \x00\r\n", b"g\r\n", b"5\r\nhello\n0"]
)
def test_refused_chunks(chunk: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", chunk + b"0\r\n\r\n")


@pytest.mark.parametrize(("fields", "expected"), [(b"Content-Length: 1\r\n", True), (b"", False)])
def test_expect_continue_counts_only_with_a_body(fields: bytes, expected: bool) -> None:
    head = head_of(b"POST / HTTP/1.1\r\n" + HOST + fields + b"Expect: 100-Continue\r\n\r\n")
    assert head.expects_continue is expected


WHOLE = (
    b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;e\r\nde\r\n0\r\nA: b\r\n\r\nrest"
)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=8))
def test_pieces_make_no_difference(cuts: list[int]) -> None:
    parser, body, behind = RequestParser(), b"", b""
    for start, end in pairwise([0, *sorted(cuts), len(WHOLE)]):
        if parser.complete:
            behind += WHOLE[start:end]
        else:
            body += parser.feed(WHOLE[start:end])
    assert (body, parser.trailers, parser.excess + behind) == (b"abcde", [(b"a", b"b")], b"rest")


@given(st.lists(st.binary(max_size=60), max_size=6))
@example([b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"ffffffffffffffff\r\n", b"x"])
def test_any_bytes_are_a_request_or_refused(pieces: list[bytes]) -> None:
    with contextlib.suppress(ProtocolError):
        parse(*pieces)


_TOKENS = [b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b"Host: a", b"Content-Length: 3", b"\r", b":", b"abc"]
_TOKENS += [b"Transfer-Encoding: chunked", b"0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n"]


@given(st.lists(st.sampled_from(_TOKENS), max_size=12))
def test_near_requests_are_a_request_or_refused(tokens: list[bytes]) -> None:
    with contextlib.suppress(ProtocolError):
        parser, _ = parse(b"".join(tokens))
        if parser.head is not None:
            assert sum(name == b"host" for name, _ in parser.head.headers) == 1
            assert not (parser.head.framing.chunked and parser.head.framing.content_length is not None)
