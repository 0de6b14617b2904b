"""What a script is given, and what of what it leaves is sent."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress.script import ScriptError, call_of, judge
from hiverd.egress.script_frames import MAX_BODY_BYTES, MAX_HEADER_BYTES, MAX_HEADERS, Answer, Call
from hiverd.http.framing import Headers

FIELDS: Headers = [
    (b"accept", b"text/html"),
    (b"accept", b"*/*"),
    (b"authorization", b"Bearer agent"),
    (b"x-long-name", b"1"),
]


def call(fields: Headers | None = None, body: bytes = b"body", target: str = "/p?q=1") -> Call:
    return call_of(
        "-- script", method="POST", host="h.test", target=target, fields=FIELDS if fields is None else fields, body=body
    )


def left(**headers: str) -> Answer:
    """The headers that `call()` gives, with some of them other."""
    values = {"Accept": "text/html", "Authorization": "Bearer agent", "X-Long-Name": "1", **headers}
    return Answer(headers=[(name.encode(), value.encode()) for name, value in values.items() if value != "-"])


def sent(answer: Answer) -> Headers:
    return judge(call(), answer).headers(FIELDS)


def test_a_script_sees_the_request_as_it_would_be_sent() -> None:
    made = call()
    assert made.headers == [(b"X-Long-Name", b"1"), (b"Authorization", b"Bearer agent"), (b"Accept", b"text/html")]
    assert (made.method, made.host, made.path, made.query) == (b"POST", b"h.test", b"/p", b"q=1")
    assert (call(target="/p").path, call(target="/p").query) == (b"/p", b"")
    assert call(target="/p?a?b").query == b"a?b"


def test_it_does_not_see_what_is_not_its_own() -> None:
    fields = [(b"host", b"h"), (b"content-length", b"4"), (b"connection", b"x-hop"), (b"x-hop", b"1"), (b"te", b"x")]
    assert call([*fields, (b"expect", b"100-continue")]).headers == []


def test_what_it_leaves_alone_is_sent_as_it_was_repeated_fields_too() -> None:
    assert sent(left()) == FIELDS
    assert judge(call(), left()).body == b"body"


def test_fields_are_set_changed_and_removed() -> None:
    fields = sent(left(Authorization="Bearer ours", Accept="-", **{"X-New": " 2 "}))
    assert fields == [(b"x-long-name", b"1"), (b"authorization", b"Bearer ours"), (b"x-new", b"2")]


def test_the_spelling_of_a_name_does_not_matter() -> None:
    assert (b"authorization", b"Bearer ours") in sent(left(authorization="Bearer ours"))
    assert b"Bearer agent" not in dict(sent(left(authorization="Bearer ours"))).values()
    answer = Answer(headers=[(b"authorization", b"Bearer ours"), (b"Authorization", b"Bearer agent")])
    assert sent(answer) == [(b"authorization", b"Bearer ours")]
    assert sent(Answer(headers=[(b"AUTHORIZATION", b"Bearer agent")])) == [(b"authorization", b"Bearer agent")]


def test_two_new_values_of_one_field_are_refused() -> None:
    with pytest.raises(ScriptError, match="two values"):
        sent(left(authorization="1", AUTHORIZATION="2"))


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "host", "Transfer-Encoding", "Connection", "Upgrade", "TE", "Trailer", "Keep-Alive", "Expect"),
        *("Proxy-Authorization", "Proxy-Connection"),
    ],
)
def test_fields_of_the_connection_and_the_host_are_refused(name: str) -> None:
    with pytest.raises(ScriptError, match="not its own"):
        sent(left(**{name: "h.test"}))


def test_a_content_length_may_be_set_if_it_is_right_and_is_not_taken_over() -> None:
    answer = left(**{"Content-Length": "4"})
    assert sent(answer) == FIELDS
    with pytest.raises(ScriptError, match="not its own"):
        sent(left(**{"content-length": "5"}))


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\rb", "a\0b", "a\x7fb", "a\x0bb"])
def test_values_with_control_characters_are_refused(value: str) -> None:
    with pytest.raises(ScriptError, match="control characters"):
        sent(left(**{"X-New": value}))


@pytest.mark.parametrize("name", ["", "a b", "a:", "a\r\n", "é", "a" * 257])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ScriptError, match="a name in headers"):
        sent(left(**{name: "1"}))


def test_what_a_worker_claims_is_bounded() -> None:
    with pytest.raises(ScriptError, match="larger than 8 MiB"):
        judge(call(), Answer(body=bytes(MAX_BODY_BYTES + 1)))
    with pytest.raises(ScriptError, match="too much"):
        judge(call(), Answer(headers=[(b"x", bytes(MAX_HEADER_BYTES))]))
    with pytest.raises(ScriptError, match="too much"):
        judge(call(), Answer(headers=[(b"x", b"")] * (MAX_HEADERS + 1)))


def test_reasons_hold_only_words_of_ours() -> None:
    with pytest.raises(ScriptError, match=r"it raised an error, in line 3: attempt to call a nil value$"):
        judge(call(), Answer(failure="error", line=3, hint="attempt to call a nil value"))
    with pytest.raises(ScriptError, match=r"it raised an error$"):
        judge(call(), Answer(failure="error", hint="attempt to call a secret value"))


_value = st.binary(max_size=30).map(lambda data: bytes(byte for byte in data if byte >= 0x20 and byte != 0x7F).strip())
_name = st.text(string.ascii_lowercase, min_size=1, max_size=5).map(lambda text: b"x-" + text.encode())


@given(st.lists(st.tuples(_name, _value), max_size=8), st.dictionaries(_name, _value, max_size=8))
def test_after_it_each_name_has_what_the_script_left(fields: Headers, wanted: dict[bytes, bytes]) -> None:
    made = call(fields)
    result = judge(made, Answer(headers=list(wanted.items()))).headers(fields)
    assert {name for name, _ in result} == wanted.keys()
    for name, value in wanted.items():
        found = [other for key, other in result if key == name]
        before = [other for key, other in fields if key == name]
        assert found == (before if before[:1] == [value] else [value])


@given(st.lists(st.tuples(st.binary(max_size=12), st.binary(max_size=12)), max_size=6), st.binary(max_size=20))
def test_whatever_is_left_is_sent_well_formed_or_refused(headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    try:
        result = judge(call(), Answer(headers=headers, body=body)).headers(FIELDS)
    except ScriptError:
        return
    for name, value in result:
        assert not {*name} & {*b"\r\n\0: "}
        assert not {*value} & {*b"\r\n\0"}
        assert name not in {b"host", b"content-length", b"transfer-encoding", b"connection"}
