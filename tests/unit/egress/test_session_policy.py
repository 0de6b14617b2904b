"""Rules in force on connections: who is judged, what a change does, and what waits for one (PROTOCOL 5.2 to 5.6)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from typing import Any

import pytest

from hiverd.egress import openings
from support.egress import eventually, request
from support.upstreams import Authority, HttpUpstream, SocketUpstream, lead


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def greeting(connection: socket.socket) -> None:
    connection.sendall(b"220 hello\r\n")
    echo(connection)


# -- TLS --------------------------------------------------------------------------------------------------------------


async def test_requests_within_tls(make_rig: Any, secure: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", secure, methods=["GET"]))
    agent = await rig.secure_agent()
    assert agent.writer.get_extra_info("ssl_object").getpeercert()["subjectAltName"] == (("DNS", "api.test"),)
    for _ in range(2):
        assert (await agent.get("https://api.test/a")).status == 200
    denied = await agent.get("https://api.test/a", method="DELETE")
    assert (denied.status, denied.body, denied.headers["connection"]) == (403, b"", "close")
    assert await agent.rest() == b""
    assert secure.connections == 1
    assert rig.summary()[-2:] == ["denied DELETE api.test/a", "7: 403"]


async def test_a_host_that_is_denied_is_refused_before_the_handshake(make_rig: Any, secure: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", secure))
    with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
        await rig.secure_agent("other.test")
    assert rig.summary() == ["denied TLS other.test/", "1: 0"]


async def test_both_names_of_a_request_are_judged(make_rig: Any, secure: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", secure), lead("also.test", secure))
    agent = await rig.secure_agent()
    answer = await agent.get("https://also.test:443/")
    assert dict(json.loads(answer.body)["headers"])["Host"] == "also.test:443"
    assert (await agent.get("https://front.test/")).status == 403
    assert [request.host for request in rig.requests] == ["api.test", "api.test"]
    assert rig.requests[1].headers["Host"] == "front.test"


async def test_without_a_name_the_address_is_judged(make_rig: Any, upstream_authority: Authority) -> None:
    with HttpUpstream(upstream_authority.context("192.0.2.7")) as upstream:
        rig = await make_rig(lead("192.0.2.7", upstream))
        agent = await rig.secure_agent(None, address="192.0.2.7", check_host=False)
        assert (await agent.get("https://192.0.2.7/")).status == 200
        with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
            await rig.secure_agent(None, address="192.0.2.8", check_host=False)
    assert [request.host for request in rig.requests] == ["192.0.2.7", "192.0.2.8"]


async def test_an_agent_that_does_not_trust_us_leaves_a_trace(
    make_rig: Any, secure: HttpUpstream, upstream_authority: Authority
) -> None:
    rig = await make_rig(lead("api.test", secure))
    with pytest.raises(ssl.SSLCertVerificationError):
        await rig.secure_agent(trusted=upstream_authority.path)
    await rig.recorded(2)
    assert rig.summary() == ["allowed TLS api.test/", "1: 0"]


async def test_without_mitm_bytes_pass_untouched(
    make_rig: Any, secure: HttpUpstream, upstream_authority: Authority
) -> None:
    rule = lead("api.test", secure, methods=["GET"], override={"headers": {"x-key": "1"}})
    rig = await make_rig(rule, mitm=False)
    agent = await rig.secure_agent(trusted=upstream_authority.path)
    for _ in range(2):
        assert (await agent.get("https://elsewhere.test/", method="POST")).status == 200
    assert secure.seen[0].header("x-key") is None
    assert rig.summary() == ["allowed TLS api.test/", "1: 200"]
    assert rig.requests[0].upstream == secure.address


async def test_without_mitm_a_dial_that_fails(make_rig: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    rule = {"access": "allow", "host": "api.test"}
    rig = await make_rig(rule | {"override": {"host": address}}, rule | {"host": "*"}, mitm=False)
    with pytest.raises(ssl.SSLError, match="INTERNAL_ERROR"):
        await rig.secure_agent()
    with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
        await rig.secure_agent(None, address="127.0.0.1")
    assert rig.summary() == ["allowed TLS api.test/", "1: 502", "denied TLS 127.0.0.1/", "3: 0"]


async def test_what_is_no_http_within_tls_goes_on_within_tls(make_rig: Any, upstream_authority: Authority) -> None:
    with SocketUpstream(echo, upstream_authority.context("api.test")) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.secure_agent()
        await agent.send(b"\0\1\2")
        await agent.expect(b"\0\1\2")
        rig.change([])
        assert await agent.ended()
    assert rig.summary() == ["allowed ? api.test:443/", "1: 200"]
    assert rig.requests[0].upstream == upstream.address


async def test_the_end_of_what_is_no_http_arrives_whole(make_rig: Any, upstream_authority: Authority) -> None:
    size = 5_000_000

    def serve(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(b"x" * size)
        with contextlib.suppress(OSError):
            connection.unwrap()  # type: ignore[attr-defined]

    with SocketUpstream(serve, upstream_authority.context("api.test")) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.secure_agent(receive_bytes=16384)
        await agent.send(b"\0")
        got = 0
        while got < size:
            await asyncio.sleep(0.001)  # a slow reader
            got += len(await agent.reader.readexactly(min(50_000, size - got)))


# -- upstream certificates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "options", "reason"),
    [
        (("api.test",), {"days": (-10, -1)}, "its certificate has expired"),
        (("api.test",), {"days": (1, 10)}, "its certificate is not valid yet"),
        (("other.test", "127.0.0.1"), {}, "its certificate is for another host"),
        (("api.test",), {"issuer": "unknown"}, "its certificate's issuer is not trusted"),
        (("api.test",), {"issuer": "itself"}, "its certificate is self-signed"),
    ],
)
async def test_an_upstream_that_cannot_be_trusted(
    make_rig: Any, upstream_authority: Authority, names: Any, options: Any, reason: str
) -> None:
    """Whatever `override.host` says: the certificate is for the name that the agent wants."""
    with HttpUpstream(upstream_authority.strange_context(*names, **options)) as upstream:
        rig = await make_rig(lead("api.test", upstream))
        agent = await rig.secure_agent()
        answer = await agent.get("https://api.test/")
        assert (answer.status, answer.body.decode()) == (502, f"cannot trust api.test: {reason}\n")
        assert upstream.seen == []
    assert rig.summary() == ["allowed GET api.test/", "1: 502"]


async def test_an_upstream_without_tls_is_not_spoken_to(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    answer = await (await rig.secure_agent()).get("https://api.test/")
    assert answer.status == 502
    assert plain.seen == []


# -- bytes that are no requests ---------------------------------------------------------------------------------------


async def test_a_server_that_speaks_first(make_rig: Any) -> None:
    with SocketUpstream(greeting) as upstream:
        rig = await make_rig(lead("mail.test", upstream))
        rig.outlet.names.note("mail.test")
        agent = await rig.agent(25)
        await agent.expect(b"220 hello\r\n")
        await agent.send(b"EHLO me\r\n")
        await agent.expect(b"EHLO me\r\n")
        agent.finish_sending()
        assert await agent.rest() == b""
    assert rig.summary() == ["allowed ? mail.test:25/", "1: 200"]
    assert rig.chunks == []


async def test_a_slow_agent_is_not_taken_for_one_that_waits_for_a_greeting(
    make_rig: Any, secure: HttpUpstream, plain: HttpUpstream
) -> None:
    """Its requests and its hello are judged and on record like those of others."""
    rig = await make_rig(
        lead("api.test", secure, ports=[443]), lead("api.test", plain), {"access": "allow", "host": "*"}
    )
    for names in (["api.test"], ["a.test", "b.test"]):
        for name in names:
            rig.outlet.names.note(name)
        agent = await rig.agent()
        await asyncio.sleep(0.5)
        assert (await agent.get("http://api.test/")).status == 200
        agent = await rig.agent(443)
        await asyncio.sleep(0.5)
        await agent.writer.start_tls(rig.agent_context(), server_hostname="api.test")
        assert (await agent.get("https://api.test/")).status == 200
    assert {request.host for request in rig.requests} == {"api.test"}
    assert {request.method for request in rig.requests} == {"GET"}


async def test_a_connection_on_which_nobody_speaks_ends(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openings, "IDLE_SECONDS", 0.2)
    with SocketUpstream(echo) as upstream:
        rig = await make_rig(lead("db.test", upstream))
        rig.outlet.names.note("db.test")
        agent = await rig.agent(5432)
        assert await agent.rest() == b""
    assert rig.summary() == ["allowed ? db.test:5432/", "1: 0"]


async def test_a_greeting_that_comes_when_the_rules_have_changed_is_not_passed_on(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openings, "FIRST_BYTES_SECONDS", 0.2)
    go = threading.Event()

    def serve(connection: socket.socket) -> None:
        go.wait(20)
        greeting(connection)

    with SocketUpstream(serve) as upstream:
        rig = await make_rig(lead("mail.test", upstream))
        rig.outlet.names.note("mail.test")
        agent = await rig.agent(25)
        await eventually(lambda: upstream.connections == 1, what="the upstream is dialled")
        rig.change([])
        go.set()
        assert await agent.rest() == b""
    assert rig.responses[0].status == 0


@pytest.mark.parametrize(
    "rule",
    [{"methods": ["GET"]}, {"paths": ["/**"]}, {"override": {"headers": {"a": "b"}}}, {"access": "deny"}, None],
)
async def test_only_a_rule_for_all_of_a_host_lets_bytes_pass(make_rig: Any, rule: Any) -> None:
    with SocketUpstream(echo) as upstream:
        rules = [] if rule is None else [lead("db.test", upstream, **rule)]
        if rule == {"access": "deny"}:
            rules = [{"access": "deny", "host": "db.test"}, lead("*", upstream)]
        rig = await make_rig(*rules)
        rig.outlet.names.note("db.test")
        agent = await rig.agent(5432)
        await agent.send(b"\0\0\0\x08\x04\xd2\x16/")
        assert await agent.ended()
    assert rig.summary() == ["denied ? db.test:5432/", "1: 0"]
    assert upstream.connections == 0


async def test_a_name_is_taken_only_if_it_is_the_only_one(make_rig: Any) -> None:
    with SocketUpstream(echo) as upstream:
        rig = await make_rig(lead("*.test", upstream))
        rig.outlet.names.note("a.test")
        rig.outlet.names.note("b.test")
        agent = await rig.agent(5432)
        await agent.send(b"\0\0")
        assert await agent.ended()
    assert rig.summary() == ["denied ? 11.0.0.1:5432/", "1: 0"]


# -- changes ----------------------------------------------------------------------------------------------------------


async def test_a_kept_connection_is_judged_at_its_next_request(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    assert (await agent.get()).status == 200
    rig.change([])
    assert (await agent.get()).status == 403
    assert len(plain.seen) == 1


async def test_a_request_under_way_is_answered(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(lead("api.test", plain))
    agent = await rig.agent()
    await agent.send(request("http://api.test/slow/0.3"))
    await eventually(lambda: len(plain.seen) == 1, what="the request arrives")
    rig.change([])
    assert (await agent.answer()).status == 200


@pytest.mark.parametrize("mitm", [True, False])
async def test_tunnels_are_cut_at_once_and_only_those_that_are_denied(
    make_rig: Any, upstream_authority: Authority, mitm: bool
) -> None:
    context = upstream_authority.context("a.test", "b.test")
    with SocketUpstream(echo, context) as upstream:
        rig = await make_rig(lead("a.test", upstream), lead("b.test", upstream), mitm=mitm)
        trusted = None if mitm else upstream_authority.path
        gone = await rig.secure_agent("a.test", trusted=trusted)
        kept = await rig.secure_agent("b.test", trusted=trusted)
        for agent in (gone, kept):
            await agent.send(b"\0one")
            await agent.expect(b"\0one")
        began = time.monotonic()
        rig.change([lead("b.test", upstream)])
        assert await gone.ended()
        assert time.monotonic() - began < 1
        await kept.send(b"two")
        await kept.expect(b"two")


# -- waiting for a change (PROTOCOL 5.6) ------------------------------------------------------------------------------


async def test_a_denied_request_waits_and_passes_when_it_is_allowed(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig(deny_wait_seconds=20.0)
    agent = await rig.agent()
    await agent.send(request("http://api.test/a", method="POST", body=b"kept"))
    await rig.recorded(1)
    assert rig.summary() == ["denied POST api.test/a"]
    rig.change([lead("other.test", plain)])
    await asyncio.sleep(0.4)
    assert len(rig.events.recorded) == 1
    rig.change([lead("api.test", plain, override={"headers": {"x-key": "secret-value"}})])
    assert (await agent.answer()).status == 200
    assert plain.seen[0].body == b"kept"
    assert rig.summary()[:3] == ["denied POST api.test/a", "allowed POST api.test/a", "2: 200"]
    assert rig.responses[0].duration_ms >= 400
    assert (rig.requests[0].body, rig.requests[1].body) == (None, "kept")
    assert (await agent.get()).status == 200


async def test_a_wait_keeps_the_deadline_that_it_began_with(make_rig: Any) -> None:
    rig = await make_rig(deny_wait_seconds=0.6)
    agent = await rig.agent()
    began = time.monotonic()
    await agent.send(request("http://api.test/"))
    await rig.recorded(1)
    rig.change([], deny_wait_seconds=60.0)
    assert (await agent.answer()).status == 403
    assert 0.5 < time.monotonic() - began < 5
    assert rig.summary() == ["denied GET api.test/", "1: 403"]
    assert rig.responses[0].duration_ms >= 500  # the loop's clock stands still during a turn, which load makes longer


@pytest.mark.parametrize("how", ["leave", "reset"])
async def test_a_wait_ends_when_the_agent_leaves(make_rig: Any, how: str) -> None:
    rig = await make_rig(deny_wait_seconds=60.0)
    agent = await rig.agent()
    await agent.send(request("http://api.test/"))
    await rig.recorded(1)
    getattr(agent, how)()
    await rig.recorded(2)
    assert rig.summary() == ["denied GET api.test/", "1: 403"]


async def test_a_handshake_waits_too(make_rig: Any, secure: HttpUpstream) -> None:
    rig = await make_rig(deny_wait_seconds=20.0)
    waiting = asyncio.create_task(rig.secure_agent())
    await rig.recorded(1)
    rig.change([lead("api.test", secure)])
    assert (await (await waiting).get("https://api.test/")).status == 200
    assert rig.summary()[:3] == ["denied TLS api.test/", "allowed GET api.test/", "2: 200"]


async def test_the_wait_of_a_handshake_ends_when_the_agent_leaves(make_rig: Any) -> None:
    rig = await make_rig(deny_wait_seconds=60.0)
    agent = await rig.agent(443)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = rig.agent_context().wrap_bio(incoming, outgoing, server_hostname="api.test")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    await agent.send(outgoing.read())
    await rig.recorded(1)
    agent.leave()
    await rig.recorded(2)
    assert rig.summary() == ["denied TLS api.test/", "1: 0"]


async def test_bytes_that_are_no_requests_wait_too(make_rig: Any) -> None:
    with SocketUpstream(echo) as upstream:
        rig = await make_rig(deny_wait_seconds=20.0)
        rig.outlet.names.note("db.test")
        agent = await rig.agent(5432)
        await agent.send(b"\0\0\0\x08")
        await rig.recorded(1)
        rig.change([lead("db.test", upstream)])
        await agent.expect(b"\0\0\0\x08")
    assert rig.summary() == ["denied ? db.test:5432/", "allowed ? db.test:5432/", "2: 200"]


# -- what the gate leads to -------------------------------------------------------------------------------------------


async def test_a_wildcard_does_not_reach_the_loopback(make_rig: Any, plain: HttpUpstream) -> None:
    rig = await make_rig({"access": "allow", "host": "*"}, hosts={"local.test": "127.0.0.1"})
    for address, host in (("127.0.0.1", "127.0.0.1"), ("11.0.0.1", "local.test")):
        agent = await rig.agent(plain.port, address)
        assert (await agent.get(f"http://{host}:{plain.port}/")).status == 403
    rig.change([{"access": "allow", "host": "local.test"}])
    agent = await rig.agent(plain.port)
    assert (await agent.get(f"http://local.test:{plain.port}/")).status == 200
    assert len(plain.seen) == 1
