"""What a proxy does to header fields."""

from __future__ import annotations

import pytest

from hiverd.http.headers import canonical, end_to_end, field_block, forwarded, joined


def test_hop_by_hop_fields_are_dropped_the_rest_stays_in_order() -> None:
    headers = [
        (b"set-cookie", b"a=1"),
        (b"connection", b"X-Private, close"),
        (b"x-private", b"1"),
        (b"keep-alive", b"timeout=5"),
        (b"transfer-encoding", b"chunked"),
        (b"trailer", b"x"),
        (b"te", b"trailers"),
        (b"upgrade", b"h2c"),
        (b"proxy-authenticate", b"x"),
        (b"location", b"/elsewhere"),
        (b"set-cookie", b"b=2"),
    ]
    assert end_to_end(headers) == [(b"set-cookie", b"a=1"), (b"location", b"/elsewhere"), (b"set-cookie", b"b=2")]


def test_forwarded_fields_of_a_direct_client() -> None:
    headers = [(b"host", b"gate:10000"), (b"accept", b"*/*"), (b"content-length", b"3"), (b"connection", b"foo")]
    assert forwarded([*headers, (b"foo", b"1")], "192.0.2.7", "http") == [
        (b"accept", b"*/*"),
        (b"x-forwarded-for", b"192.0.2.7"),
        (b"x-forwarded-host", b"gate:10000"),
        (b"x-forwarded-proto", b"http"),
    ]


def test_forwarded_fields_behind_another_proxy() -> None:
    headers = [
        (b"host", b"gate"),
        (b"x-forwarded-for", b"10.0.0.1"),
        (b"x-forwarded-for", b"10.0.0.2"),
        (b"x-forwarded-host", b"public.example"),
        (b"x-forwarded-proto", b"https"),
    ]
    assert forwarded(headers, "192.0.2.7", "http") == [
        (b"x-forwarded-host", b"public.example"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-for", b"10.0.0.1, 10.0.0.2, 192.0.2.7"),
    ]


def test_field_block() -> None:
    assert field_block([(b"content-type", b"a"), (b"x-A1-b", b"")]) == b"Content-Type: a\r\nX-A1-B: \r\n"
    assert field_block([]) == b""


@pytest.mark.parametrize("value", [b"a\r\nEvil: 1", b"a\nEvil: 1", b"a\rb", b"a\0"])
def test_nothing_breaks_out_of_its_line(value: bytes) -> None:
    with pytest.raises(ValueError, match="line break"):
        field_block([(b"x", value)])
    with pytest.raises(ValueError, match="line break"):
        field_block([(value, b"x")])


def test_joined_as_events_carry_them() -> None:
    headers = [(b"x-a", b"1"), (b"content-type", b"caf\xc3\xa9"), (b"x-a", b"2"), (b"bad", b"\xff")]
    assert joined(headers) == {"X-A": "1, 2", "Content-Type": "café", "Bad": "\ufffd"}


def test_canonical_names() -> None:
    assert canonical(b"etag") == b"Etag"
    assert canonical(b"x-" + b"y" * 100) == b"X-Y" + b"y" * 99
