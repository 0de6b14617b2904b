"""The response parser: what it takes, what it refuses, and that pieces of any size give the same result."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiverd.http import responses
from hiverd.http.framing import ProtocolError
from hiverd.http.responses import ResponseParser


class Collecting(ResponseParser):
    """Keeps the body that it has read."""

    def __init__(self, method: str, *, upgradable: bool = False) -> None:
        super().__init__(method, upgradable=upgradable)
        self.body = b""

    def feed(self, data: bytes) -> bytes:
        piece = super().feed(data)
        self.body += piece
        return piece


def parse(pieces: Sequence[bytes], method: str = "GET", *, close: bool = False, upgradable: bool = False) -> Collecting:
    parser = Collecting(method, upgradable=upgradable)
    for piece in pieces:
        parser.feed(piece)
    if close:
        parser.eof()
    return parser


def test_counted_body() -> None:
    parser = parse([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A:  1 \r\nx-a:2\r\n\r\nhello"])
    assert parser.head is not None
    assert parser.head.status == 200
    assert parser.head.headers == [(b"content-length", b"5"), (b"x-a", b"1"), (b"x-a", b"2")]
    assert parser.head.keep_alive
    assert parser.complete
    assert parser.body == b"hello"


def test_chunked_body_with_extension_and_trailers() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parser = parse([head, b"5;a=b\r\nhello\r\n00A\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n"])
    assert parser.complete
    assert parser.trailers == [(b"x-t", b"1")]
    assert parser.body == b"hello0123456789"


def test_body_until_close() -> None:
    parser = parse([b"HTTP/1.0 200 OK\n\nhel", b"lo"])
    assert parser.complete is False
    parser.eof()
    assert parser.complete is bool(parser.body == b"hello")
    assert parser.head is not None
    assert not parser.head.keep_alive


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_body(status: int) -> None:
    parser = parse([b"HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\n" % status])
    assert parser.complete
    assert not parser.excess


def test_head_has_no_body_whatever_it_announces() -> None:
    for framing in (b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X: y"):
        parser = parse([b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % framing], "HEAD")
        assert parser.complete
        assert not parser.excess


def test_interim_responses_are_skipped() -> None:
    parser = parse([b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"])
    assert parser.head is None
    assert parser.continued
    parser.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert parser.complete


def test_bytes_behind_the_end_are_not_another_response() -> None:
    second = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    for first in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ):
        parser = parse([first + second])
        assert parser.body == b"ok"
        assert parser.excess == second
        assert parser.feed(second) == b""


def test_switching_protocols_only_when_asked_for() -> None:
    data = b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n\x81\x00"
    parser = parse([data], upgradable=True)
    assert parser.complete
    assert parser.excess == b"\x81\x00"
    with pytest.raises(ProtocolError):
        parse([data])


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", True),
    ],
)
def test_persistence(head: bytes, kept: bool) -> None:
    parser = parse([head])
    assert parser.head is not None
    assert parser.head.keep_alive is kept


HOSTILE = {
    "length and coding": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
    "signed length": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
    "underscored length": b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\n",
    "hexadecimal length": b"HTTP/1.1 200 OK\r\nContent-Length: 0x5\r\n\r\n",
    "huge length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "empty length": b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
    "two codings": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "two coding fields": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "coding with a vertical tab": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
    "coding in 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "folded field": b"HTTP/1.1 200 OK\r\nX-A: 1\r\n folded\r\n\r\n",
    "space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
    "bare CR in a value": b"HTTP/1.1 200 OK\r\nX-A: 1\rSet-Cookie: evil\r\n\r\n",
    "NUL in a value": b"HTTP/1.1 200 OK\r\nX-A: 1\x00\r\n\r\n",
    "field without a colon": b"HTTP/1.1 200 OK\r\nX-A\r\n\r\n",
    "field without a name": b"HTTP/1.1 200 OK\r\n: x\r\n\r\n",
    "no status line": b"hello\r\n\r\n",
    "HTTP/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "status of two digits": b"HTTP/1.1 99 X\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 X\r\n\r\n",
    "status 600": b"HTTP/1.1 600 X\r\n\r\n",
    "control in the reason": b"HTTP/1.1 200 O\x01K\r\n\r\n",
    "leading white space": b" HTTP/1.1 200 OK\r\n\r\n",
    "bad chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "prefixed chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "empty chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\nhello\r\n0\r\n\r\n",
    "overlong chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 17 + b"\r\n\r\n",
    "chunk longer than its size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
    "bare LF behind a chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
    "endless chunk extension": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"x" * 5000,
    "large head": b"HTTP/1.1 200 OK\r\nX-A: " + b"x" * 70_000 + b"\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\nX-A: " + b"x" * 70_000,
    "many fields": b"HTTP/1.1 200 OK\r\n" + b"a:b\r\n" * 1_001 + b"\r\n",
    "large trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-A: " + b"x" * 70_000,
    "folded trailer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-A: 1\r\n b\r\n\r\n",
    "endless interim responses": b"HTTP/1.1 100 Continue\r\n\r\n" * 101,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_refused(data: bytes, step: int) -> None:
    pieces = [data[start : start + step] for start in range(0, len(data), step)]
    with pytest.raises(ProtocolError):
        parse(pieces)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ],
)
def test_cut_short(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse([data], close=True)


def test_line_ends_of_hand_made_servers() -> None:
    parser = parse([b"HTTP/1.1 200 OK\nContent-Length: 2\nX-A: 1\r\n\nhi"])
    assert parser.head is not None
    assert parser.head.headers == [(b"content-length", b"2"), (b"x-a", b"1")]
    assert parser.body == b"hi"


def test_a_long_value_of_blanks_is_judged_in_linear_time() -> None:
    with pytest.raises(ProtocolError):
        responses.parse_fields([b"x:" + b" " * 60_000 + b"\x00"])


@st.composite
def cuts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=12)))
    return [data[a:b] for a, b in pairwise([0, *places, len(data)])]


_TOKENS = st.text("abcXYZ-_.!", min_size=1, max_size=10).map(str.encode)
_VALUES = st.binary(max_size=20).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F).strip())
_BODIES = st.lists(st.binary(min_size=1, max_size=400), max_size=5)


@given(data=st.data(), fields=st.lists(st.tuples(_TOKENS, _VALUES), max_size=6), pieces=_BODIES, chunked=st.booleans())
def test_any_cutting_gives_what_was_sent(
    data: st.DataObject, fields: list[tuple[bytes, bytes]], pieces: list[bytes], chunked: bool
) -> None:
    fields = [(n, v) for n, v in fields if n.lower() not in (b"content-length", b"transfer-encoding", b"connection")]
    head = b"HTTP/1.1 200 OK\r\n" + b"".join(b"%b: %b\r\n" % field for field in fields)
    if chunked:
        sent = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        message = head + b"Transfer-Encoding: chunked\r\n\r\n" + sent + b"0\r\n\r\n"
    else:
        message = head + b"Content-Length: %d\r\n\r\n" % len(b"".join(pieces)) + b"".join(pieces)
    parser = parse(data.draw(cuts(message)))
    assert parser.complete
    assert not parser.excess
    assert parser.head is not None
    assert parser.head.headers[: len(fields)] == [(name.lower(), value) for name, value in fields]
    assert parser.body == b"".join(pieces)


_FRAGMENTS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 204 No\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"X: y\r\n",
        b" fold\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b"\x00",
        b"3\r\nabc\r\n",
        b"0\r\n\r\n",
        b"abc",
        b";x",
        b":",
    ]
)


def _h11_verdict(message: bytes) -> tuple[int, bytes] | None:
    """(status, body) as h11 reads it up to the close; None if it refuses."""
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(message)
    client.receive_data(b"")
    status, body = 0, b""
    while True:
        try:
            event = client.next_event()
        except h11.RemoteProtocolError:
            return None
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return status, body
        elif isinstance(event, h11.ConnectionClosed) or event in (h11.NEED_DATA, h11.PAUSED):
            return None


@settings(max_examples=500)
@given(data=st.data(), fragments=st.lists(_FRAGMENTS, max_size=10))
def test_agrees_with_another_reader(data: st.DataObject, fragments: list[bytes]) -> None:
    """What we accept, h11 reads in the same way: no two readers of one response (we are stricter, never laxer)."""
    message = b"HTTP/1.1 200 OK\r\n" + b"".join(fragments)
    parser = ResponseParser("GET")
    body = b""
    try:
        for piece in data.draw(cuts(message)):
            body += parser.feed(piece)
        parser.eof()
    except ProtocolError:
        return
    assert parser.head is not None
    verdict = _h11_verdict(message)
    if verdict is not None:
        assert verdict == (parser.head.status, body)


@given(
    pieces=st.lists(st.one_of(_FRAGMENTS, st.binary(max_size=60)), max_size=30), method=st.sampled_from(["GET", "HEAD"])
)
def test_no_input_raises_anything_else(pieces: list[bytes], method: str) -> None:
    parser = ResponseParser(method)
    with contextlib.suppress(ProtocolError):
        for piece in pieces:
            parser.feed(piece)
        parser.eof()
        assert parser.complete
