"""Header lists of HTTP/2: what becomes a head, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.http.framing import ProtocolError
from hiverd.http.headers import field_block
from hiverd.http.http2 import http2_fields, is_grpc, parse_http2_request, parse_http2_response, parse_http2_trailers
from hiverd.http.requests import RequestError, parse_request_head

Fields = list[tuple[bytes, bytes]]

HEAD: Fields = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"api.test"), (b":path", b"/a?b=c")]


def head(**changed: bytes | None) -> Fields:
    """`HEAD` with other values of pseudo fields, or without them."""
    named = {name[1:].decode(): value for name, value in HEAD} | changed
    return [(f":{name}".encode(), value) for name, value in named.items() if value is not None]


def test_a_head() -> None:
    found = parse_http2_request([*HEAD, (b"x-a", b"1")], ended=True)
    assert (found.method, found.path, found.query, found.host) == ("GET", "/a", "b=c", "api.test")
    assert found.headers == [(b"host", b"api.test"), (b"x-a", b"1")]
    assert not found.has_body


def test_a_body_is_told_by_its_length_or_ends_with_the_stream() -> None:
    assert parse_http2_request(HEAD, ended=False).framing.chunked
    counted = parse_http2_request([*HEAD, (b"content-length", b"3")], ended=False).framing
    assert (counted.chunked, counted.content_length) == (False, 3)
    assert not parse_http2_request([*HEAD, (b"content-length", b"0")], ended=True).has_body


def test_host_may_stand_for_authority() -> None:
    assert parse_http2_request([*head(authority=None), (b"host", b"h.test")], ended=True).host == "h.test"
    found = parse_http2_request([*HEAD, (b"host", b"API.test")], ended=True)
    assert [field for field in found.headers if field[0] == b"host"] == [(b"host", b"api.test")]


def test_options_about_the_server() -> None:
    assert parse_http2_request(head(method=b"OPTIONS", path=b"*"), ended=True).path == "*"


def test_an_expectation() -> None:
    assert parse_http2_request([*HEAD, (b"expect", b"100-continue")], ended=False).expects_continue


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param(head(method=None), 400, id="no method"),
        pytest.param(head(scheme=None), 400, id="no scheme"),
        pytest.param(head(path=None), 400, id="no path"),
        pytest.param(head(authority=None), 400, id="no host"),
        pytest.param([*HEAD, (b":path", b"/b")], 400, id="two paths"),
        pytest.param([*HEAD, (b":authority", b"api.test")], 400, id="two authorities"),
        pytest.param([*HEAD, (b"host", b"other.test")], 400, id="another host"),
        pytest.param([*HEAD, (b"host", b"api.test"), (b"host", b"api.test")], 400, id="two hosts"),
        pytest.param(
            [*head(authority=None), (b"host", b"a.test"), (b"host", b"b.test")], 400, id="two hosts without authority"
        ),
        pytest.param(head(authority=b""), 400, id="empty authority"),
        pytest.param(head(authority=b"a b"), 400, id="blank in the authority"),
        pytest.param([HEAD[0], (b"x", b"y"), *HEAD[1:]], 400, id="pseudo behind others"),
        pytest.param([*HEAD, (b":status", b"200")], 400, id="pseudo of responses"),
        pytest.param([*HEAD, (b":new", b"x")], 400, id="unknown pseudo"),
        pytest.param(head(scheme=b"http"), 400, id="plain scheme"),
        pytest.param(head(scheme=b"HTTPS"), 400, id="upper-case scheme"),
        pytest.param(head(method=b"GE T"), 400, id="method with a blank"),
        pytest.param(head(method=b""), 400, id="empty method"),
        pytest.param(head(method=b"CONNECT"), 501, id="CONNECT"),
        pytest.param(
            [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *HEAD[1:]], 501, id="extended CONNECT, RFC 8441"
        ),
        pytest.param([*HEAD, (b":protocol", b"websocket")], 400, id="protocol without CONNECT"),
        pytest.param(head(path=b""), 400, id="empty path"),
        pytest.param(head(path=b"a"), 400, id="path without slash"),
        pytest.param(head(path=b"*"), 400, id="asterisk for GET"),
        pytest.param(head(path=b"https://other.test/"), 400, id="absolute path"),
        pytest.param(head(path=b"/a#b"), 400, id="fragment"),
        pytest.param(head(path=b"/a b"), 400, id="path with a blank"),
        pytest.param(head(path=b"/a HTTP/1.1\r\nHost: other.test\r\n\r\n"), 400, id="request in the path"),
        pytest.param(head(path="/ä".encode()), 400, id="path beyond ASCII"),
        pytest.param(head(path=b"/" + b"a" * 20_000), 414, id="long path"),
        pytest.param([*HEAD, (b"X-A", b"1")], 400, id="upper-case name"),
        pytest.param([*HEAD, (b"", b"1")], 400, id="empty name"),
        pytest.param([*HEAD, (b"x:y", b"1")], 400, id="colon in a name"),
        pytest.param([*HEAD, (b"x y", b"1")], 400, id="blank in a name"),
        pytest.param([*HEAD, (b"x", b"1\r\ny: 2")], 400, id="line break in a value"),
        pytest.param([*HEAD, (b"x", b"1\n")], 400, id="line feed at the end"),
        pytest.param([*HEAD, (b"x", b"\0")], 400, id="NUL in a value"),
        pytest.param([*HEAD, (b"x", b" 1")], 400, id="blank before a value"),
        pytest.param([*HEAD, (b"x", b"1\t")], 400, id="tab behind a value"),
        pytest.param([*HEAD, (b"connection", b"close")], 400, id="connection"),
        pytest.param([*HEAD, (b"keep-alive", b"1")], 400, id="keep-alive"),
        pytest.param([*HEAD, (b"proxy-connection", b"close")], 400, id="proxy-connection"),
        pytest.param([*HEAD, (b"transfer-encoding", b"chunked")], 400, id="transfer-encoding"),
        pytest.param([*HEAD, (b"upgrade", b"websocket")], 400, id="upgrade"),
        pytest.param([*HEAD, (b"http2-settings", b"AAAA")], 400, id="h2c's settings"),
        pytest.param([*HEAD, (b"te", b"gzip")], 400, id="te"),
        pytest.param([*HEAD, (b"content-length", b"1"), (b"content-length", b"1")], 400, id="two lengths"),
        pytest.param([*HEAD, (b"content-length", b"-1")], 400, id="negative length"),
        pytest.param([*HEAD, (b"content-length", b"1, 1")], 400, id="list of lengths"),
        pytest.param([*HEAD, (b"expect", b"200-ok")], 417, id="expectation"),
        pytest.param([*HEAD, (b"x", b"y" * 70_000)], 431, id="large"),
        pytest.param([*HEAD, *[(b"x", b"y")] * 1000], 431, id="many"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(fields: Fields, status: int) -> None:
    with pytest.raises(RequestError) as refused:
        parse_http2_request(fields, ended=False)
    assert refused.value.status == status


def test_a_body_that_was_announced_must_come() -> None:
    with pytest.raises(RequestError):
        parse_http2_request([*HEAD, (b"content-length", b"1")], ended=True)


@pytest.mark.parametrize(
    "fields",
    [[], [(b":status", b"20")], [(b":status", b"200"), (b":status", b"200")], [(b":status", b"200"), (b"A", b"b")]],
)
def test_a_response_needs_one_status(fields: Fields) -> None:
    with pytest.raises(ProtocolError):
        parse_http2_response(fields)


def test_a_response() -> None:
    found = parse_http2_response([(b":status", b"200"), (b"content-length", b"3")])
    assert (found.status, found.content_length) == (200, 3)


@pytest.mark.parametrize("name", [b":path", b"host", b"content-length", b"connection", b"X"])
def test_trailers_say_nothing_about_framing_or_routing(name: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_http2_trailers([(name, b"1")])


@pytest.mark.parametrize("field", [(b"x", b"a\r\nb"), (b"X", b"a"), (b"connection", b"x"), (b":path", b"/")])
def test_nothing_is_sent_that_means_something_else(field: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        http2_fields([], [field])


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc; x=y", True),
        (b"Application/GRPC", True),
        (b"application/grpc-web", False),
        (b"application/json", False),
        (b"text/application/grpc", False),
    ],
)
def test_what_counts_as_grpc(kind: bytes, answer: bool) -> None:
    assert is_grpc([(b"content-type", kind)]) is answer


TOKENS = st.sampled_from([name for name, _ in HEAD] + [b"host", b"content-length", b"cookie", b"x", b"te", b"X"])
VALUES = st.binary(max_size=12) | st.sampled_from([b"GET", b"https", b"api.test", b"/", b"/a/../b", b"3", b"trailers"])


@given(st.lists(st.tuples(TOKENS | st.binary(max_size=4), VALUES), max_size=8), st.booleans(), st.booleans())
def test_what_is_accepted_means_the_same_in_http_1(fields: Fields, valid: bool, ended: bool) -> None:
    """The property that matters: what was judged is what an HTTP/1.1 server reads."""
    try:
        found = parse_http2_request([*HEAD, *fields] if valid else fields, ended=ended)
    except RequestError:
        return
    target = found.path if found.query is None else f"{found.path}?{found.query}"
    headers = [field for field in found.headers if field[0] != b"content-length"]
    line = f"{found.method} {target} HTTP/1.1\r\n".encode("latin-1")
    again = parse_request_head((line + field_block(headers)).removesuffix(b"\r\n"))
    assert (again.method, again.path, again.query, again.host) == (found.method, found.path, found.query, found.host)
    assert again.headers == headers
