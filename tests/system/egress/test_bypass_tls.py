"""Attacks on the name in a TLS handshake, and on what is inside."""

from __future__ import annotations

import json
import socket
from typing import Any, Final

import pytest

from hiverd.egress.hello import read_hello
from support.hellos import ENCRYPTED_HELLO, hello, message, records, server_name
from support.upstreams import HttpUpstream, SocketUpstream, lead
from system.egress.attacks import allowances, denials, others, run_attacks

pytestmark = pytest.mark.system

ACCESS_DENIED: Final = "1503030002" + "0231"
DECODE_ERROR: Final = "1503030002" + "0232"
SERVER_HELLO: Final = "160303"

SEND: Final = """
with open("/tmp/payloads.json") as file:
    payloads = json.load(file)
def send(pieces):
    with socket.create_connection(("8.8.8.8", 443), timeout=15) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            urgent = piece.startswith("!")
            sock.send(bytes.fromhex(piece.lstrip("!")), socket.MSG_OOB if urgent else 0)
            time.sleep(0.01 if len(pieces) > 3 else 0)
        return sock.recv(7).hex()
for name, pieces in payloads.items():
    attack(send, pieces, name=name)
"""


class Urgent(bytes):
    """Sent out of band (tcp(7), MSG_OOB)."""


async def send_all(sandbox: Any, payloads: dict[str, list[bytes] | bytes]) -> dict[str, str]:
    """The first seven bytes of each answer."""

    def text(piece: bytes) -> str:
        return ("!" if isinstance(piece, Urgent) else "") + piece.hex()

    document = {
        name: [text(p) for p in ([data] if isinstance(data, bytes) else data)] for name, data in payloads.items()
    }
    await sandbox.write("/tmp/payloads.json", json.dumps(document))
    return await run_attacks(sandbox, SEND)


EVIL: Final = hello(server_name(b"evil.test"))
DENIED: Final[dict[str, list[bytes] | bytes]] = {
    "another name": EVIL,
    "a name below": hello(server_name(b"api.test.evil.test")),
    "a name above": hello(server_name(b"test")),
    "no name": hello(),
    "byte by byte": [EVIL[index : index + 1] for index in range(len(EVIL))],
    "in tiny records": records(message(server_name(b"evil.test")), size=3),
    "another name, encrypted hello": hello(server_name(b"evil.test"), ENCRYPTED_HELLO),
}
MALFORMED: Final[dict[str, list[bytes] | bytes]] = {
    "two names": hello(server_name(b"api.test", b"evil.test")),
    "two extensions": hello(server_name(b"api.test"), server_name(b"evil.test")),
    "an address": hello(server_name(b"127.0.0.1")),
    "a decimal address": hello(server_name(b"2130706433")),
    "an IPv6 address": hello(server_name(b"[::1]")),
    "a NUL": hello(server_name(b"api.test\0.evil.test")),
    "a Cyrillic letter": hello(server_name(b"\xd0\xb0pi.test")),
    "a full-width dot": hello(server_name(b"api\xe3\x80\x82test")),
    "a port": hello(server_name(b"api.test:443")),
    "an empty name": hello(server_name(b"")),
    "a kind that is unknown": hello(server_name(b"api.test", kind=1)),
    "bytes behind the extensions": records(message(server_name(b"api.test"), tail=b"\0\0")),
    "another message behind it": records(message(server_name(b"api.test")) + message(server_name(b"evil.test"))),
    "another first message": records(b"\2" + message(server_name(b"api.test"))[1:]),
    "an alert in between": EVIL[:5] + b"\x15\3\3\0\2\1\0",
    "the version of nothing": records(message(server_name(b"api.test")), version=b"\2\0"),
    "an empty record": records(message(server_name(b"api.test"))[:3]) + b"\x16\3\1\0\0",
    "an endless one": records(message(server_name(b"api.test"), b"\0\x15\x40\0" + bytes(16384))),
}
ALLOWED: Final[dict[str, list[bytes] | bytes]] = {
    "plain": hello(server_name(b"api.test")),
    "upper case": hello(server_name(b"API.Test")),
    "a final dot": hello(server_name(b"api.test.")),
    "an encrypted hello inside": hello(server_name(b"api.test"), ENCRYPTED_HELLO),
}


async def test_the_name_in_the_hello_has_one_reading(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    assert others(await send_all(sandbox, DENIED), {ACCESS_DENIED}) == {}
    assert others(await send_all(sandbox, MALFORMED), {DECODE_ERROR}) == {}
    denied = [event for event in await sandbox.events() if event.get("access") == "denied"]
    assert len(denied) == len(DENIED) + len(MALFORMED)
    assert secure.connections == 0
    allowed = await send_all(sandbox, ALLOWED)
    assert {name: answer[:6] for name, answer in allowed.items()} == dict.fromkeys(ALLOWED, SERVER_HELLO)


FRONTING: Final = """
def request(name, host, path="/"):
    context = ssl.create_default_context()
    with socket.create_connection(("8.8.8.8", 443)) as plain, context.wrap_socket(plain, server_hostname=name) as sock:
        fields = f"Host: {host}\\r\\nConnection: close\\r\\n\\r\\n" if host else "\\r\\n"
        sock.sendall(f"GET {path} HTTP/1.{1 if host else 0}\\r\\n{fields}".encode())
        return sock.recv(1000).split(b"\\r\\n")[0].decode()
attack(request, "api.test", "api.test", "/same")
outcomes["same"] = outcomes.pop("request")
attack(request, "api.test", "evil.test", name="allowed name, denied Host")
attack(request, "evil.test", "api.test", name="denied name, allowed Host")
attack(request, "api.test", "other.test", "/other", name="both allowed")
attack(request, "api.test", "127.0.0.1", name="loopback as Host")
attack(request, "api.test", "api.test:80", "/port", name="another port in Host")
attack(request, "api.test", None, "/none", name="no Host")
attack(request, "api.test", "api.test, evil.test", name="two in one")
"""


async def test_name_and_host_must_both_be_allowed_and_the_name_decides(sandboxes: Any, secure: HttpUpstream) -> None:
    with SocketUpstream(lambda connection: None) as other:
        sandbox = await sandboxes(egress=[lead("api.test", secure), lead("other.test", other)])
        outcomes = await run_attacks(sandbox, FRONTING)
        assert other.connections == 0
    ok, forbidden = "HTTP/1.1 200 OK", "HTTP/1.1 403 Forbidden"
    assert outcomes == {
        "same": ok,
        "allowed name, denied Host": forbidden,
        "denied name, allowed Host": "SSLError",
        "both allowed": ok,
        "loopback as Host": forbidden,
        "another port in Host": ok,
        "no Host": ok,
        "two in one": "HTTP/1.1 400 Bad Request",
    }
    assert sorted(seen.path for seen in secure.seen) == ["/none", "/other", "/port", "/same"]
    denied = [event for event in await sandbox.events() if event.get("access") == "denied"]
    assert len(denied) == 4


def urgent_pieces(name: bytes) -> list[bytes]:
    """A hello with this name for who drops urgent bytes, and none at all for who does not."""
    data = hello(server_name(name))
    middle = data.index(name) + 2
    return [data[:middle], Urgent(b"x"), data[middle:]]


async def test_spliced_connections_are_those_whose_hello_was_judged(sandboxes: Any) -> None:
    arrived: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        connection.settimeout(2)
        arrived.append(connection.recv(65536))
        connection.sendall(b"spliced")

    with SocketUpstream(serve) as upstream:
        sandbox = await sandboxes(egress=[lead("api.test", upstream)], mitm=False)
        outcomes = await send_all(
            sandbox,
            {
                "allowed": hello(server_name(b"api.test")),
                "denied": EVIL,
                "encrypted": hello(server_name(b"api.test"), ENCRYPTED_HELLO),
                "urgent": urgent_pieces(b"api.test"),
            },
        )
    assert outcomes.pop("urgent") in {DECODE_ERROR, "EPIPE", "ECONNRESET"}
    assert outcomes == {"allowed": b"spliced".hex(), "denied": ACCESS_DENIED, "encrypted": ACCESS_DENIED}
    (only,) = arrived
    seen = read_hello(only)
    assert seen is not None
    assert seen.server_name == "api.test"
    events = await sandbox.events()
    assert denials(events) == {("evil.test", "TLS", "/"), ("api.test", "TLS", "/"), ("8.8.8.8:443", "?", "/")}
    assert allowances(events) == [("api.test", "TLS", "/")]


URGENT: Final = """
def send():
    with socket.create_connection(("9.9.9.9", 7)) as sock:
        sock.sendall(b"\\0bytes")
        time.sleep(0.3)
        sock.send(b"U", socket.MSG_OOB)
        time.sleep(0.1)
        sock.sendall(b"more")
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(100):
            answer += piece
        return answer.decode()
attack(send)
"""


async def test_urgent_bytes_stay_where_they_were_sent_and_hold_nobody_up(sandboxes: Any) -> None:
    """The kernel does not splice them: without care, one of them keeps the server's loop turning."""

    def serve(connection: socket.socket) -> None:
        data = b""
        while piece := connection.recv(100):
            data += piece
        connection.sendall(data)

    with SocketUpstream(serve) as upstream:
        sandbox = await sandboxes(egress=[lead("9.9.9.9", upstream)])
        assert await run_attacks(sandbox, URGENT) == {"send": "\0bytesUmore"}
