"""An upstream that fails is told to the agent as a clear status, and is on record."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from support.server import free_port
from support.upstreams import Authority, HttpUpstream, SocketUpstream, lead

pytestmark = pytest.mark.system


def allow(address: str) -> list[dict[str, Any]]:
    return [{"access": "allow", "host": "api.test", "override": {"host": address}}]


async def statuses(sandbox: Any) -> list[int]:
    return [event["status"] for event in await sandbox.events() if event["type"] == "egress.response"]


def self_signed(folder: Path) -> ssl.SSLContext:
    """An authority's own certificate in place of a server's."""
    ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
    path = folder / "self-signed.pem"
    path.write_bytes(ca.cert_pem.bytes() + ca.private_key_pem.bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


@pytest.mark.parametrize("fault", ["expired", "not yet valid", "self-signed", "of a stranger", "for another host"])
async def test_a_certificate_that_cannot_be_trusted(
    sandboxes: Any, authority: Authority, tmp_path: Path, fault: str
) -> None:
    now = datetime.now(UTC)
    if fault == "expired":
        context = authority.context("api.test", not_before=now - timedelta(days=2), not_after=now - timedelta(days=1))
        reason = "its certificate has expired"
    elif fault == "not yet valid":
        context = authority.context("api.test", not_before=now + timedelta(days=1), not_after=now + timedelta(days=2))
        reason = "its certificate is not valid yet"
    elif fault == "self-signed":
        context, reason = self_signed(tmp_path), "its certificate is self-signed"
    elif fault == "of a stranger":
        context, reason = Authority(tmp_path).context("api.test"), "its certificate's issuer is not trusted"
    else:
        context, reason = authority.context("elsewhere.test"), "its certificate is for another host"
    with HttpUpstream(context) as upstream:
        sandbox = await sandboxes(egress=[lead("api.test", upstream)])
        output = await sandbox.run("curl -sS -w '\\n%{http_code}' https://api.test/secret")
        assert output.stdout.endswith("\n502"), output
        assert reason in output.stdout
        assert upstream.seen == [], "nothing is sent to a stranger"
        assert await statuses(sandbox) == [502]


@contextmanager
def resetting(context: ssl.SSLContext | None) -> Iterator[str]:
    """Takes a request, and resets the connection."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    with SocketUpstream(serve, context) as upstream:
        yield upstream.address


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_upstream_that_refuses_or_resets(sandboxes: Any, authority: Authority, scheme: str) -> None:
    context = authority.context("api.test") if scheme == "https" else None
    sandbox = await sandboxes(egress=allow(f"127.0.0.1:{free_port()}"))
    command = f"curl -sS -w '%{{http_code}}' -o /tmp/text {scheme}://api.test/; cat /tmp/text"
    refused = await sandbox.run(command)
    assert refused.stdout.startswith("502"), refused
    assert "Connection refused" in refused.stdout
    assert "127.0.0.1" not in refused.stdout, "where a rule leads is not the agent's to know"
    with resetting(context) as address:
        await sandbox.apply(egress=allow(address))
        reset = await sandbox.run(command)
        assert reset.stdout.startswith("502"), reset
    assert await statuses(sandbox) == [502, 502]


async def test_an_answer_that_breaks_off_is_not_taken_for_whole(sandboxes: Any, secure: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)])
    output = await sandbox.run(
        "curl -sS https://api.test/cut; echo $?; curl -sS -w '%{http_code}' https://api.test/close"
    )
    body, exit_code, *rest = output.stdout.replace("half", "half\n").splitlines()
    assert (body, exit_code != "0") == ("half", True), output
    assert rest[-1].endswith("502")
    assert await statuses(sandbox) == [200, 502]


async def test_upstreams_that_do_not_answer(sandboxes: Any) -> None:
    """One takes the connection and never the handshake, another never the connection: ten seconds each."""
    silent = socket.create_server(("127.0.0.1", 0), backlog=8)
    deaf = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = [socket.socket() for _ in range(3)]
    try:
        for sock in waiting:  # until its backlog is full
            sock.setblocking(False)
            sock.connect_ex(deaf.getsockname())
        rules = [
            {"access": "allow", "host": f"{name}.test", "override": {"host": f"127.0.0.1:{server.getsockname()[1]}"}}
            for name, server in (("silent", silent), ("deaf", deaf))
        ]
        sandbox = await sandboxes(egress=rules)
        started = time.monotonic()
        output = await sandbox.run(
            "for name in silent deaf; do curl -sS -m 30 -w '%{http_code} ' https://$name.test/ & done; wait"
        )
        seconds = time.monotonic() - started
    finally:
        for sock in (silent, deaf, *waiting):
            sock.close()
    assert output.stdout.count("502") == 2, output
    assert "silent.test does not finish the TLS handshake" in output.stdout
    assert "the upstream does not answer" in output.stdout
    assert 9 < seconds < 20
    assert await statuses(sandbox) == [502, 502]


async def test_a_name_that_does_not_resolve(sandboxes: Any) -> None:
    sandbox = await sandboxes(egress=[{"access": "allow", "host": "*"}])
    output = await sandbox.run("curl -sS -w '%{http_code}' http://nowhere.invalid/")
    assert output.stdout.endswith("502"), output
    assert "does not resolve" in output.stdout


# -- without interception ---------------------------------------------------------------------------------------------


async def test_without_interception_the_agent_sees_the_upstreams_own_certificate(
    sandboxes: Any, authority: Authority, secure: HttpUpstream
) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", secure)], mitm=False)
    await sandbox.write("/tmp/ca.pem", authority.path.read_bytes())
    output = await sandbox.run("curl -sS --cacert /tmp/ca.pem https://api.test/a; curl -sS https://api.test/b")
    assert '"path": "/a"' in output.stdout, output
    assert "certificate" in output.stderr, "the sandbox's own authority has not signed it"
    assert [seen.path for seen in secure.seen] == ["/a"]
    request, response, *_ = await sandbox.events()
    assert (request["method"], request["host"], request["path"]) == ("TLS", "api.test", "/")
    assert request["access"] == "allowed"
    assert (response["request_id"], response["status"]) == (request["id"], 200)
    assert "egress.chunk" not in [event["type"] for event in await sandbox.events()]


async def test_without_interception_what_is_denied_or_fails_is_on_record(sandboxes: Any) -> None:
    sandbox = await sandboxes(egress=allow(f"127.0.0.1:{free_port()}"), mitm=False)
    output = await sandbox.run("curl -sS https://api.test/; echo $?; curl -sS https://denied.test/; echo $?")
    assert "0" not in output.stdout.split(), output
    assert "access denied" in output.stderr
    found = [(event.get("access"), event.get("host"), event.get("status")) for event in await sandbox.events()]
    assert found == [
        ("allowed", "api.test", None),
        (None, None, 502),
        ("denied", "denied.test", None),
        (None, None, 0),
    ]
