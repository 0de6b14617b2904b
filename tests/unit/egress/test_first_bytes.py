"""What a connection begins with, byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress.first_bytes import MAX_FIRST_LINE_BYTES, classify

WHOLE = {
    b"GET / HTTP/1.1\r\n": "http",
    b"TRACE x": "http",
    b"\r\n \tGET /": "http",
    b"get / HTTP/1.1\r\n": "http",
    b"PROPFIND / http/1.1\r\n": "http",
    b"FOO\t/\tHTTP/1.0\n": "http",
    b"A" * 500 + b" / HTTP/1.1\r\n": "http",
    b"X / HTTP/1.1\rHost: x\r": "http",
    b"\x16\x03\x01": "tls",
    b"\x16\x09": "tls",
    b"CONNECT x:1 HTTP/1.1\r\n": "refused",
    b"connect x": "refused",
    b"PRI * HTTP/2.0\r\n": "refused",
    b"PROXY TCP4 1": "refused",
    b"PROXY UNKNOWN\r\n": "refused",
    b"\r\n\r\n\0\r\nQUIT\n!": "refused",
    b"\x15\x03": "refused",
    b"\x17\x03\x03": "refused",
    b"\x80\x2e\x01\x03": "refused",
    b"\x80\x2e\x01\x00": "refused",
    b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n": "opaque",
    b"EHLO me\r\n": "opaque",
    b"GETX\r\n": "opaque",
    b"PING\r\n": "opaque",
    b"get key\r\n": "opaque",
    b"PROXY me\r\n": "opaque",
    b"\0\1": "opaque",
    b"\x15\x04": "opaque",
    b"\x80\x2e\x02": "opaque",
    b"\xff\xfd\x18": "opaque",
    b"\r\n\r\n\0x": "opaque",
    b"FOO \0\r\n": "opaque",
    b"\xe2\x82\xac\x20": "opaque",
}


@pytest.mark.parametrize("data", WHOLE, ids=repr)
def test_the_kind_is_known_and_no_prefix_says_another(data: bytes) -> None:
    verdicts = [classify(data[:size]) for size in range(len(data) + 1)]
    assert verdicts[-1] == WHOLE[data]
    assert set(verdicts) <= {None, WHOLE[data]}, "a verdict that more bytes would change"


@pytest.mark.parametrize("data", [b"", b"G", b"GE", b"GET", b"FOO", b"FOO /", b"\r\n", b"PRI *", b"\x80", b"\x15"])
def test_more_bytes_are_awaited_while_they_matter(data: bytes) -> None:
    assert classify(data) is None


@pytest.mark.parametrize("byte", [b"A", b" ", b"\n"])
def test_nothing_is_awaited_for_ever(byte: bytes) -> None:
    assert classify(byte * (MAX_FIRST_LINE_BYTES - 1)) is None
    assert classify(byte * MAX_FIRST_LINE_BYTES) == "refused"


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_verdict_is_final(data: bytes, more: bytes) -> None:
    verdict = classify(data)
    assert verdict is None or classify(data + more) == verdict


@given(st.sampled_from([b"", b"\r\n", b" "]), st.from_regex(rb"\A[A-Za-z]{1,9} /[a-z]{0,5} HTTP/1\.[01]\r\n\Z"))
def test_no_request_line_passes_for_something_else(start: bytes, line: bytes) -> None:
    assert classify(start + line) in {"http", "refused"}
