"""Attacks in HTTP: requests that two readers would take differently, and ways to name a path, a method or a host.

`api.test` is allowed but for `/admin` and what is below, and for DELETE. Whatever an attack sends, the upstream must
see only what a rule allows, and what it sees must be what was judged.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any, Final

import pytest

from support.upstreams import HttpUpstream, SocketUpstream, lead
from system.egress.attacks import denials, others, run_attacks

pytestmark = pytest.mark.system

HOST: Final = b"Host: api.test\r\n"
CLOSE: Final = HOST + b"Connection: close\r\n"
HIDDEN: Final = b"GET /admin/hidden HTTP/1.1\r\nHost: api.test\r\n\r\n"
CHUNKED: Final = b"POST /ok HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n"


def post(fields: bytes, body: bytes = b"") -> bytes:
    return b"POST /ok HTTP/1.1\r\n" + CLOSE + fields + b"\r\n" + body


def get(path: bytes, fields: bytes = CLOSE, method: bytes = b"GET") -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\n" + fields + b"\r\n"


TWO_READINGS: Final[dict[str, bytes]] = {
    "CL.TE": post(b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE.CL": post(b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", b"60\r\n" + HIDDEN + b"\r\n0\r\n\r\n"),
    "TE.TE": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE list": post(b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE unknown": post(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE quoted": post(b'Transfer-Encoding: "chunked"\r\n', b"0\r\n\r\n" + HIDDEN),
    "TE vertical tab": post(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE space before colon": post(b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE folded": post(b"Transfer-Encoding:\r\n chunked\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE behind a bare LF": post(b"X: x\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE behind a bare CR": post(b"X: x\rTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + HIDDEN),
    "TE with HTTP/1.0": b"POST /ok HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "CL twice": post(b"Content-Length: 0\r\nContent-Length: 60\r\n", HIDDEN),
    "CL twice the same": post(b"Content-Length: 0\r\nContent-Length: 0\r\n", HIDDEN),
    "CL list": post(b"Content-Length: 0, 60\r\n", HIDDEN),
    "CL with a sign": post(b"Content-Length: +60\r\n", HIDDEN),
    "CL negative": post(b"Content-Length: -60\r\n", HIDDEN),
    "CL hexadecimal": post(b"Content-Length: 0x3c\r\n", HIDDEN),
    "CL empty": post(b"Content-Length:\r\n", HIDDEN),
    "CL huge": post(b"Content-Length: 18446744073709551616\r\n", HIDDEN),
    "NUL in a field": get(b"/ok", CLOSE + b"X: a\0b\r\n"),
    "NUL in a name": get(b"/ok", CLOSE + b"X\0: a\r\n"),
    "a bare LF ends the head": b"GET /ok HTTP/1.1\nHost: api.test\n\n" + HIDDEN,
    "a field before the first": b"GET /ok HTTP/1.1\r\n X: y\r\n" + CLOSE + b"\r\n",
    "a line without colon": get(b"/ok", CLOSE + b"GET /admin HTTP/1.1\r\n"),
    "two Hosts": get(b"/ok", CLOSE + b"Host: evil.test\r\n"),
    "no Host": b"GET /ok HTTP/1.1\r\nConnection: close\r\n\r\n",
    "a list of Hosts": get(b"/ok", b"Host: api.test, evil.test\r\n"),
    "Host with user information": get(b"/ok", b"Host: api.test@evil.test\r\n"),
    "Host with a path": get(b"/ok", b"Host: evil.test/api.test\r\n"),
    "Host with a space": get(b"/ok", b"Host: api.test evil.test\r\n"),
    "Host with a bad port": get(b"/ok", b"Host: api.test:80@evil.test\r\n"),
    "Host with a zone": get(b"/ok", b"Host: [fe80::1%25lo]\r\n"),
    "absolute form of another host": get(b"http://evil.test/"),
    "absolute form with user information": get(b"http://api.test@evil.test/"),
    "a fragment": get(b"/ok#/../admin"),
    "a space in the path": get(b"/ok /admin"),
    "a tab in the request line": b"GET\t/admin/x\tHTTP/1.1\r\n" + CLOSE + b"\r\n",
    "two spaces": b"GET  /admin/x HTTP/1.1\r\n" + CLOSE + b"\r\n",
    "HTTP/0.9": b"GET /admin/x\r\n\r\n",
    "HTTP/1.2": b"GET /ok HTTP/1.2\r\n" + CLOSE + b"\r\n",
    "HTTP/2.0": b"GET /ok HTTP/2.0\r\n" + CLOSE + b"\r\n",
    "white space first": b" \t" + get(b"/admin/x"),
    "a relative path": get(b"admin/x"),
    "bytes beyond ASCII": get(b"/\xef\xbc\x8fadmin"),
    "an unknown expectation": get(b"/ok", CLOSE + b"Expect: 200-ok\r\n"),
    "an endless head": b"GET /ok HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 70_000,
    "an endless target": get(b"/" + b"x" * 20_000),
    "too many fields": get(b"/ok", CLOSE + b"X: x\r\n" * 1_100),
}
"""Refused before they are judged: 400, or a status that says more."""

BROKEN_BODIES: Final[dict[str, bytes]] = {
    "a chunk size that overflows": CHUNKED + b"\r\nfffffffffffffffff\r\nx",
    "a chunk size with a sign": CHUNKED + b"\r\n-1\r\nx",
    "a chunk size with 0x": CHUNKED + b"\r\n0x1\r\nx\r\n0\r\n\r\n",
    "a chunk line that ends with LF": CHUNKED + b"\r\n1\nx\r\n0\r\n\r\n",
    "LF in a chunk extension": CHUNKED + b"\r\n1;a\nb\r\nx\r\n0\r\n\r\n" + HIDDEN,
    "an endless chunk extension": CHUNKED + b"\r\n1;" + b"x" * 5_000,
    "a chunk longer than it says": CHUNKED + b"\r\n1\r\nxx\r\n0\r\n\r\n" + HIDDEN,
    "a broken trailer": CHUNKED + b"\r\n0\r\nX y\r\n\r\n" + HIDDEN,
    "endless trailers": CHUNKED + b"\r\n0\r\nX: " + b"x" * 70_000,
}
"""Their heads are judged and allowed; the upstream's connection is given up in the middle of the body."""

SPELLINGS: Final = """
/admin /admin/ /admin/x /admin?x //admin ///admin//x /./admin /ok/../admin /.//admin
/%61dmin /%61%64%6d%69%6e /%2561dmin /ok/%2e%2e/admin /ok/.%2e/admin /ok/%252e%252e/admin /%2fadmin /admin%2fx
/ok/..%2fadmin /ok/..%252fadmin /ok\\..\\admin /ok/..%5cadmin /%5cadmin /%2561dmin/\\.. /ok/..%c0%afadmin /admin%00
/admin;x /admin;x=/y /;x/admin /ok/..;/admin /ok/..;x=y/admin /admin%3bx /ok/..%253b/admin /admin;%2f..%2fok
"""
DENIED: Final[dict[str, bytes]] = {path: get(path.encode("ascii")) for path in SPELLINGS.split()} | {
    "absolute form": get(b"http://api.test/admin"),
    "another host": get(b"/ok", b"Host: evil.test\r\n"),
    "a name below": get(b"/ok", b"Host: evil.api.test\r\n"),
    "a name above": get(b"/ok", b"Host: test\r\n"),
    "the address as the host": get(b"/ok", b"Host: 8.8.8.8\r\n"),
    "a decimal address": get(b"/ok", b"Host: 134744072\r\n"),
    "an empty Host": get(b"/ok", b"Host:\r\n"),
    "no Host in HTTP/1.0": b"GET /ok HTTP/1.0\r\n\r\n",
    "a method in lower case": get(b"/ok", method=b"delete"),
    "a method in mixed case": get(b"/ok", method=b"DeLeTe"),
    "a WebSocket": get(b"/admin/ws", HOST + b"Connection: upgrade\r\nUpgrade: websocket\r\n"),
    "HTTP/2 by upgrade": get(b"/admin", HOST + b"Connection: upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n"),
    "an empty line first": b"\r\n" + get(b"/admin"),
}

CLOSED: Final[dict[str, bytes]] = {
    "CONNECT": b"CONNECT api.test:80 HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "connect": b"connect api.test:80 HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "HTTP/2 by prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "PROXY protocol": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + HIDDEN,
    "PROXY protocol, version 2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + HIDDEN,
    "a line of something else": b"HELO\r\n" + HIDDEN,
    "bytes of something else": b"\0\1\2\3" + HIDDEN,
    "a record before the hello": b"\x15\3\1\0\2\1\0" + HIDDEN,
    "the hello of SSL 2": b"\x80\x2e\1\3\1" + HIDDEN,
}
"""Neither HTTP nor TLS that we read: a closed connection, method `?`."""

JUDGED_EACH: Final[dict[str, tuple[bytes, list[str]]]] = {
    "pipelined": (get(b"/ok", HOST) + get(b"/admin"), ["200", "403"]),
    "pipelined to another host": (get(b"/ok", HOST) + get(b"/ok", b"Host: evil.test\r\n"), ["200", "403"]),
    "pipelined CONNECT": (get(b"/ok", HOST) + b"CONNECT evil.test:80 HTTP/1.1\r\n" + HOST + b"\r\n", ["200", "501"]),
    "pipelined preface of HTTP/2": (get(b"/ok", HOST) + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ["200", "400"]),
    "behind a body": (get(b"/ok", HOST + b"Content-Length: 3\r\n") + b"abc" + get(b"/admin"), ["200", "403"]),
    "behind chunks": (CHUNKED.replace(b"Connection: close\r\n", b"") + b"\r\n0\r\n\r\n" + HIDDEN, ["200", "403"]),
    "within a body": (post(b"Content-Length: %d\r\n" % len(HIDDEN), HIDDEN), ["200"]),
    "within chunks": (CHUNKED + b"\r\n%x;ext=1\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN), ["200"]),
    "another protocol": (get(b"/ok", CLOSE.replace(b"close", b"close, upgrade") + b"Upgrade: h2c\r\n"), ["200"]),
    "hop-by-hop by name": (get(b"/ok", HOST + b"Connection: close, host, x-kept\r\nX-Kept: x\r\n"), ["200"]),
}

SCRIPT: Final = """
from concurrent.futures import ThreadPoolExecutor
with open("/tmp/payloads.json") as file:
    payloads = json.load(file)
def in_pieces(pieces):
    for piece in pieces:
        yield bytes.fromhex(piece)
        time.sleep(0.1)
def send(item):
    attack(exchange, in_pieces(item[1]), ("8.8.8.8", 80), name=item[0])
with ThreadPoolExecutor(8) as pool:
    list(pool.map(send, payloads.items()))
"""


def rules(upstream: HttpUpstream) -> list[dict[str, Any]]:
    return [
        {"access": "deny", "host": "api.test", "paths": ["/admin/**"]},
        {"access": "deny", "host": "api.test", "methods": ["DELETE"]},
        lead("api.test", upstream),
    ]


async def send_all(sandbox: Any, payloads: dict[str, bytes], *, in_pieces: bool = False) -> dict[str, list[str]]:
    """The statuses that each payload was answered with. `in_pieces`: the head first, then the rest."""
    document: dict[str, list[str]] = {}
    for name, data in payloads.items():
        head_bytes = data.index(b"\r\n\r\n") + 4 if in_pieces else len(data)
        document[name] = [data[:head_bytes].hex(), data[head_bytes:].hex()]
    await sandbox.write("/tmp/payloads.json", json.dumps(document))
    answers = await run_attacks(sandbox, SCRIPT)
    return {name: re.findall(r"(?:^|\})HTTP/1\.1 (\d+)", answer, re.MULTILINE) for name, answer in answers.items()}


async def test_requests_with_two_readings_are_refused_and_recorded(sandboxes: Any, plain: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=rules(plain))
    statuses = await send_all(sandbox, TWO_READINGS)
    special = {"an unknown expectation": ["417"], "an endless head": ["431"], "an endless target": ["414"]}
    assert others(statuses, [["400"], ["414"], ["417"], ["431"]]) == {}
    assert {name: statuses[name] for name in special} == special
    assert plain.seen == []
    events = await sandbox.events()
    assert len([event for event in events if event.get("access") == "denied"]) == len(TWO_READINGS)
    assert denials(events) <= {("8.8.8.8:80", "?", "/"), ("api.test", "GET", "/ok")}


@pytest.mark.parametrize("in_pieces", [False, True], ids=["at once", "after its head"])
async def test_broken_bodies_end_the_request_and_nothing_of_them_becomes_another(
    sandboxes: Any, plain: HttpUpstream, in_pieces: bool
) -> None:
    sandbox = await sandboxes(egress=rules(plain))
    statuses = await send_all(sandbox, BROKEN_BODIES, in_pieces=in_pieces)
    assert others(statuses, [["400"]]) == {}
    assert {seen.path for seen in plain.seen} <= {"/ok"}
    answers = [event["status"] for event in await sandbox.events() if event["type"] == "egress.response"]
    assert answers == [400] * len(BROKEN_BODIES)


async def test_denied_paths_methods_and_hosts_in_every_spelling_are_refused_and_recorded(
    sandboxes: Any, plain: HttpUpstream
) -> None:
    sandbox = await sandboxes(egress=rules(plain))
    statuses = await send_all(sandbox, DENIED)
    assert others(statuses, [["403"]]) == {}
    assert plain.seen == []
    denied = [event for event in await sandbox.events() if event.get("access") == "denied"]
    assert len(denied) == len(DENIED)


async def test_what_is_neither_is_closed_and_recorded(sandboxes: Any, plain: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=rules(plain))
    statuses = await send_all(sandbox, CLOSED)
    assert others(statuses, [[]]) == {}
    assert plain.connections == 0
    events = await sandbox.events()
    assert denials(events) == {("8.8.8.8:80", "?", "/")}
    assert len([event for event in events if event.get("access") == "denied"]) == len(CLOSED)


async def test_each_request_of_a_connection_is_judged_and_a_body_stays_a_body(
    sandboxes: Any, plain: HttpUpstream
) -> None:
    sandbox = await sandboxes(egress=rules(plain))
    statuses = await send_all(sandbox, {name: payload for name, (payload, _) in JUDGED_EACH.items()})
    assert statuses == {name: expected for name, (_, expected) in JUDGED_EACH.items()}
    assert {seen.path for seen in plain.seen} == {"/ok"}
    assert len(plain.seen) == len(JUDGED_EACH)
    assert not [seen for seen in plain.seen if seen.header("upgrade") or seen.header("x-kept")]
    assert {seen.header("host") for seen in plain.seen} == {"api.test"}
    refused = sum(status != "200" for expected in statuses.values() for status in expected)
    events = await sandbox.events()
    assert len([event for event in events if event.get("access") == "denied"]) == refused


async def test_redirects_are_the_agents_to_follow_and_each_hop_is_judged(sandboxes: Any, plain: HttpUpstream) -> None:
    targets = ["http://evil.test/", f"http://127.0.0.1:{plain.port}/", "http://169.254.169.254/", "http://[::1]/"]
    sandbox = await sandboxes(
        egress=[lead("api.test", plain, ports=[80]), {"access": "allow", "host": "*.test.example"}]
    )
    for target in targets:
        await sandbox.run(f"curl -sSL -m 5 'http://api.test/redirect?to={target}'")
    assert [seen.path for seen in plain.seen] == [f"/redirect?to={target}" for target in targets]
    hosts = {host for host, _, _ in denials(await sandbox.events())}
    # 127.0.0.1 is the sandbox's own, where nobody listens; IPv6 loopback too.
    assert hosts == {"evil.test", "169.254.169.254"}


BEHIND_A_WHOLE_HOST: Final = """
from concurrent.futures import ThreadPoolExecutor
EVIL = b"GET /evil HTTP/1.1\\r\\nHost: evil.test\\r\\nConnection: close\\r\\n\\r\\n"
def slowly(*pieces, pause):
    with socket.create_connection((WHOLE, 80)) as sock:
        sock.settimeout(4)
        for piece in pieces:
            time.sleep(pause)
            sock.sendall(piece)
        answer = b""
        try:
            while piece := sock.recv(65536):
                answer += piece
        except ConnectionResetError:
            answer += b"[reset]"
        return answer.decode()
def urgently(before, urgent, after):
    with socket.create_connection((WHOLE, 80)) as sock:
        sock.sendall(before)
        sock.send(urgent, socket.MSG_OOB)
        sock.sendall(after)
        sock.shutdown(socket.SHUT_WR)
        return sock.recv(100).decode()
WHOLE = "9.9.9.9"
cases = {
    "after silence": (EVIL, 0.6),
    "an empty line first": (b"\\r\\n" + EVIL, 0), "a strange method": (b"FOO" + EVIL[3:], 0),
    "in lower case": (b"get" + EVIL[3:], 0), "a tab": (EVIL.replace(b" ", b"\\t"), 0),
    "CONNECT": (b"CONNECT evil.test:80 HTTP/1.1\\r\\nHost: evil.test\\r\\n\\r\\n", 0),
    "HTTP/2 after silence": (b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n", 0.6),
    "a long method": (b"A" * 100 + EVIL[3:], 0),
}
with ThreadPoolExecutor(8) as pool:
    for name, (payload, pause) in cases.items():
        pool.submit(attack, lambda payload=payload, pause=pause: slowly(payload, pause=pause), name=name)
    pool.submit(attack, lambda: urgently(b"GE", b"T", EVIL[3:]), name="an urgent byte")
    pool.submit(attack, lambda: slowly(b"GE", b"T" + EVIL[3:], pause=0.2), name="in pieces")
outcomes["something else"] = slowly(b"something else\\n", pause=0)
"""


async def test_bytes_under_a_rule_for_a_whole_host_hide_no_request(sandboxes: Any) -> None:
    """The rule lets anything that is no request pass to 9.9.9.9, unread: a server there may serve evil.test as well."""
    arrived: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            arrived.append(data)
            connection.sendall(b"served")
            return

    with SocketUpstream(serve) as upstream:
        sandbox = await sandboxes(egress=[lead("9.9.9.9", upstream)])
        outcomes = await run_attacks(sandbox, BEHIND_A_WHOLE_HOST)
    assert outcomes.pop("something else") == "served"
    assert not [answer for answer in outcomes.values() if "served" in answer], outcomes
    assert arrived == [b"something else\n"]
    denied = denials(await sandbox.events())
    assert {host for host, _, _ in denied} == {"evil.test", "9.9.9.9:80"}


GREETED: Final = """
def greeted(reply):
    with socket.create_connection(("9.9.9.9", 25)) as sock:
        greeting = sock.recv(100)
        sock.sendall(reply)
        try:
            return (greeting + sock.recv(100)).decode()
        except ConnectionResetError:
            return "[reset]"
attack(greeted, b"EHLO me\\r\\n", name="mail")
attack(greeted, b"GET / HTTP/1.1\\r\\nHost: evil.test\\r\\n\\r\\n", name="a request")
attack(greeted, bytes.fromhex("16030100050100000100"), name="a hello")
"""


async def test_a_server_that_speaks_first_is_heard_and_still_gets_no_request(sandboxes: Any) -> None:
    arrived: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        connection.sendall(b"220 ready\r\n")
        if data := connection.recv(1000):
            arrived.append(data)
            connection.sendall(b"250 served\r\n")

    with SocketUpstream(serve) as upstream:
        sandbox = await sandboxes(egress=[lead("9.9.9.9", upstream)])
        outcomes = await run_attacks(sandbox, GREETED)
    assert outcomes["mail"] == "220 ready\r\n250 served\r\n"
    assert "served" not in outcomes["a request"] + outcomes["a hello"]
    assert arrived == [b"EHLO me\r\n"]
    denied = [event for event in await sandbox.events() if event.get("access") == "denied"]
    assert [(event["host"], event["method"]) for event in denied] == [("9.9.9.9:25", "?")] * 2
