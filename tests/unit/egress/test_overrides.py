"""What rules change in requests, as pure functions (PROTOCOL 5.5)."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from hiverd.egress import overrides
from hiverd.http.requests import RequestError
from hiverd.wire.model import EgressOverride


def change(**members: Any) -> EgressOverride:
    return EgressOverride(**members)


def test_without_an_override_nothing_changes() -> None:
    assert overrides.dial_target(None, "a.test", 80) == ("a.test", 80)
    assert overrides.target(None, "/a%2Fb", "x=1&x=2") == "/a%2Fb?x=1&x=2"
    assert overrides.target(None, "/", "") == "/?"
    assert overrides.headers(None, [(b"a", b"1")]) == [(b"a", b"1")]
    assert not overrides.replaces_body(None)
    assert overrides.secrets_of(None) == ()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("b.test", ("b.test", 80)), ("b.test:8080", ("b.test", 8080)), ("127.0.0.1:1", ("127.0.0.1", 1)),
     ("[::1]:443", ("::1", 443)), ("", ("a.test", 80))],
)  # fmt: skip
def test_where_it_is_dialled(host: str, expected: tuple[str, int]) -> None:
    assert overrides.dial_target(change(host=host), "a.test", 80) == expected


@pytest.mark.parametrize(
    ("query", "wanted", "expected"),
    [
        (None, {"key": "k v"}, "key=k+v"),
        ("key=1&b=2&key=3&a=1&a=0", {"key": "new"}, "a=1&a=0&b=2&key=new"),
        ("b=&a", {"c": "&="}, "a=&b=&c=%26%3D"),
        ("bytes=%ff%fe&u=%C3%A4", {"k": "1"}, "bytes=%FF%FE&k=1&u=%C3%A4"),
    ],
)
def test_query(query: str | None, wanted: dict[str, str], expected: str) -> None:
    assert overrides.target(change(query=wanted), "/p", query) == f"/p?{expected}"


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [("/v1", "/v1/p"), ("/v1/", "/v1/p"), ("v1/x", "/v1/x/p"), ("/", "/p"), ("", "/p"), ("/a%2Fb", "/a%2Fb/p"),
     ("/a b?c#d", "/a%20b%3Fc%23d/p"), ("/x HTTP/1.1\r\nEvil: 1", "/x%20HTTP/1.1%0D%0AEvil:%201/p"),
     ("/ü", "/%C3%BC/p")],
)  # fmt: skip
def test_prefix(prefix: str, expected: str) -> None:
    assert overrides.target(change(prefix_path=prefix), "/p", None) == expected


def test_headers_take_the_place_of_all_of_their_name_but_never_of_framing() -> None:
    wanted = {
        "X-Key": "secret",
        "x-KEY": "later",
        "Content-Length": "3",
        "Transfer-Encoding": "x",
        "Connection": "close",
    }
    fields = overrides.headers(change(headers=wanted), [(b"a", b"1"), (b"x-key", b"mine"), (b"x-key", b"too")])
    assert fields == [(b"a", b"1"), (b"x-key", b"later")]
    shown = overrides.shown_headers(change(headers=wanted), [(b"x-key", b"mine"), (b"a", b"1")])
    assert shown == [(b"a", b"1"), (b"x-key", b"[redacted]")]


@pytest.mark.parametrize(
    ("strategy", "sent", "expected"),
    [
        (None, b'{"a": 1, "b": {"c": 2}}', {"a": 1, "b": "new"}),
        ("merge", b"", {"b": "new"}),
        ("merge", b"[1]", {"b": "new"}),
        ("merge", b"nonsense", {"b": "new"}),
        ("merge", b"\xff\xfe", {"b": "new"}),
        ("merge", b'{"a":' * 100_000, {"b": "new"}),
        ("replace", b'{"a": 1}', {"b": "new"}),
    ],
)
def test_object_bodies(strategy: Any, sent: bytes, expected: Any) -> None:
    override = change(body={"b": "new"}, body_strategy=strategy)
    assert overrides.replaces_body(override)
    assert json.loads(overrides.body(override, sent)) == expected


def test_a_merge_leaves_the_agents_own_members_as_they_are() -> None:
    sent = (
        b'{"big": 123456789012345678901234567890, "exact": 1.10, "far": 1e400, "deep": '
        + b"[" * 500
        + b"]" * 500
        + b"}"
    )
    merged = overrides.body(change(body={"b": 1}), sent)
    assert b'"big":123456789012345678901234567890,"exact":1.10,"far":1e400,' in merged


def test_other_bodies() -> None:
    assert overrides.body(change(body="verbatim ü"), b"x") == "verbatim ü".encode()
    assert overrides.replaces_body(change(body=""))
    assert not overrides.replaces_body(change(headers={"a": "b"}))


@pytest.mark.parametrize(
    ("coding", "encode"),
    [(b"gzip", gzip.compress), (b"X-GZIP", gzip.compress), (b"deflate", zlib.compress), (b"identity", bytes)],
)
def test_codings_are_taken_off(coding: bytes, encode: Any) -> None:
    assert overrides.decoded(encode(b'{"a":1}'), [(b"content-encoding", coding)]) == b'{"a":1}'


def test_what_cannot_be_decoded_counts_as_none() -> None:
    assert overrides.decoded(b"x", [(b"content-encoding", b"br")]) == b""
    assert overrides.decoded(b"x", [(b"content-encoding", b"gzip")]) == b""
    assert overrides.decoded(gzip.compress(b"x"), [(b"content-encoding", b"gzip, gzip")]) == b""


def test_a_bomb_is_refused() -> None:
    bomb = gzip.compress(bytes(overrides.MAX_MERGED_BODY_BYTES + 1))
    with pytest.raises(RequestError) as caught:
        overrides.decoded(bomb, [(b"content-encoding", b"gzip")])
    assert caught.value.status == 413


def test_what_is_secret() -> None:
    override = change(
        headers={"authorization": "Bearer abcdefgh", "accept": "short"},
        query={"key": "with space+plus"},
        body={"token": "of-the-body", "list": [{"deep": "very-deep-one"}], "n": 1},
    )
    secrets = overrides.secrets_of(override)
    assert {
        "Bearer abcdefgh",
        "abcdefgh",
        "with space+plus",
        "with+space%2Bplus",
        "of-the-body",
        "very-deep-one",
    } <= set(secrets)
    assert "short" not in secrets
    assert [len(text) for text in secrets] == sorted(map(len, secrets), reverse=True)
