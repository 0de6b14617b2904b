"""Reading a ClientHello: what OpenSSL would take it for, or nothing."""

from __future__ import annotations

import contextlib
import ssl
import time

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress.hello import MAX_HELLO_BYTES, ClientHello, HelloError, alert, read_hello
from hiverd.egress.names import HostError, canonical_host
from support.hellos import ENCRYPTED_HELLO, alpn, extension, hello, message, records, server_name, vector

API = server_name(b"api.test")


def real_hello(name: str | None) -> bytes:
    """What Python's own client sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


REAL = real_hello("api.test")
_SEEN: list[str | None] = []


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert("api.test").configure_cert(context)
    context.sni_callback = lambda _object, name, _context: _SEEN.append(name)
    return context


SERVER = _server_context()


def seen_by_openssl(data: bytes) -> str | None:
    """The name that an OpenSSL server goes by, `-` for none; None if it gives up or waits for more."""
    incoming = ssl.MemoryBIO()
    server = SERVER.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write(data)
    _SEEN.clear()
    with contextlib.suppress(ssl.SSLError):
        server.do_handshake()
    return None if not _SEEN else _SEEN[0] or "-"


@pytest.mark.parametrize("name", ["api.test", "a", "x" * 60 + ".test", None])
def test_a_real_one(name: str | None) -> None:
    found = read_hello(real_hello(name))
    assert found == ClientHello(server_name=name, alpn=(b"h2", b"http/1.1"), encrypted=False)
    assert seen_by_openssl(real_hello(name)) == (name or "-")


@pytest.mark.parametrize(
    "data", [REAL, hello(API, alpn(b"h2")), records(message(API), size=7)], ids=["real", "made", "cut"]
)
def test_every_prefix_waits_for_more_and_none_decides_early(data: bytes) -> None:
    assert {read_hello(data[:size]) for size in range(len(data))} == {None}
    found = read_hello(data)
    assert found is not None
    assert found.server_name == "api.test"


@pytest.mark.parametrize(
    ("written", "name"),
    [(b"API.test", "api.test"), (b"api.test.", "api.test"), (b"xn--bcher-kva.test", "xn--bcher-kva.test")],
)
def test_names_are_canonical(written: bytes, name: str) -> None:
    found = read_hello(hello(server_name(written)))
    assert found is not None
    assert found.server_name == name


def test_an_encrypted_hello_is_seen() -> None:
    found = read_hello(hello(API, ENCRYPTED_HELLO))
    assert found == ClientHello(server_name="api.test", alpn=(), encrypted=True)


def test_a_hello_without_extensions() -> None:
    body = b"\3\3" + bytes(32) + vector(b"", 1) + vector(b"\0\x2f", 2) + vector(b"\0", 1)
    assert read_hello(records(b"\1" + vector(body, 3))) == ClientHello(server_name=None, alpn=(), encrypted=False)


MALFORMED = {
    "two names": hello(server_name(b"api.test", b"evil.test")),
    "no name in the list": hello(server_name()),
    "two extensions of a kind": hello(API, API),
    "another kind of name": hello(server_name(b"api.test", kind=1)),
    "an address": hello(server_name(b"8.8.8.8")),
    "an address by number": hello(server_name(b"134744072")),
    "a NUL": hello(server_name(b"api.test\0")),
    "beyond ASCII": hello(server_name(b"api.test\xe9")),
    "bytes behind the list": hello(extension(0, vector(b"\0" + vector(b"api.test", 2), 2) + b"x")),
    "a list that is cut": hello(extension(0, b"\0\x20\0")),
    "bytes behind the extensions": records(message(API, tail=b"x")),
    "an extension that is cut": records(message(API[:-1])),
    "another message": records(b"\2" + message(API)[1:]),
    "bytes behind the message": records(message(API) + b"x"),
    "an alert in between": records(message(API)[:9]) + b"\x15\3\3\0\2\1\0",
    "another record first": b"\x17" + hello(API)[1:],
    "a version of nothing": records(message(API), version=b"\2\0"),
    "an empty record": b"\x16\3\1\0\0",
    "a record that is too long": b"\x16\3\1\x40\1",
    "a message that is too long": b"\x16\3\1\0\4\1\xff\xff\xff",
    "a message that is short": records(b"\1\0\0\5" + bytes(5)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_could_be_read_otherwise_is_malformed(name: str) -> None:
    with pytest.raises(HelloError):
        read_hello(MALFORMED[name])


def test_the_size_is_bounded() -> None:
    large = message(API, extension(21, bytes(MAX_HELLO_BYTES)))
    with pytest.raises(HelloError, match="too large"):
        read_hello(records(large)[: MAX_HELLO_BYTES + 1])
    trickle = records(message(API, extension(21, bytes(12_000))), size=1)
    with pytest.raises(HelloError, match="too large"):
        read_hello(trickle[: MAX_HELLO_BYTES + 2])


def test_alerts() -> None:
    assert alert(49) == bytes.fromhex("15030300020231")


def agrees_with_openssl(data: bytes) -> None:
    try:
        found = read_hello(data)
    except HelloError:
        return  # refused, whatever it was
    theirs = seen_by_openssl(data)
    if found is None or theirs is None:
        return
    try:
        canonical = None if theirs == "-" else canonical_host(theirs)
    except HostError:
        canonical = "?"
    assert canonical == found.server_name


@given(st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 255)), max_size=6))
def test_mutations_are_read_as_by_openssl_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(REAL)
    for position, value in changes:
        data[position] = value
    agrees_with_openssl(bytes(data))


NAMES = st.lists(
    st.sampled_from([b"api.test", b"evil.test", b"", b"a" * 70, b"API.TEST.", b"x_y", b"1.2.3.4", b"\xff"])
)
EXTENSIONS = st.one_of(
    NAMES.map(lambda names: server_name(*names)),
    st.builds(extension, st.sampled_from([0, 1, 16, 21, 23, 43, 51, 0xFE0D]), st.binary(max_size=20)),
    st.just(alpn(b"http/1.1")),
)


@given(st.lists(EXTENSIONS, max_size=4), st.sampled_from([1, 5, 100, 16384]), st.sampled_from([b"", b"", b"\0"]))
def test_made_ones_are_read_as_by_openssl_or_refused(extensions: list[bytes], size: int, tail: bytes) -> None:
    agrees_with_openssl(records(message(*extensions, tail=tail), size=size))


@given(st.binary(max_size=400).map(lambda data: b"\x16\3\1" + data))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(HelloError):
        read_hello(data)


def test_reading_takes_linear_time() -> None:
    data = records(message(API, extension(21, bytes(2_000))), size=1)[:MAX_HELLO_BYTES]
    began = time.process_time()
    with contextlib.suppress(HelloError):
        read_hello(data)
    assert time.process_time() - began < 0.3
