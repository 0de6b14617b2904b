"""Names with addresses of their own (`extra_hosts`), this host's among them: known inside, and judged by name."""

from __future__ import annotations

from typing import Any, Final

import pytest

from support.upstreams import HttpUpstream, SocketUpstream

pytestmark = pytest.mark.system

DOCKERS_NAME: Final = "host.docker.internal"
ALLOWED: Final = {"access": "allow", "host": DOCKERS_NAME}
EXTRA: Final = [f"{DOCKERS_NAME}:host-gateway"]


def url(upstream: HttpUpstream, path: str, name: str = DOCKERS_NAME) -> str:
    return f"http://{name}:{upstream.port}{path}"


async def test_a_service_of_this_host_by_dockers_name(sandboxes: Any, plain: HttpUpstream) -> None:
    sandbox = await sandboxes(egress=[ALLOWED], extra_hosts=EXTRA)
    hosts = (await sandbox.run("cat /etc/hosts")).stdout
    assert [line.split()[1:] for line in hosts.splitlines()].count([DOCKERS_NAME]) == 1, hosts
    output = await sandbox.run(["curl", "-sS", url(plain, "/reached")])
    assert '"path": "/reached"' in output.stdout, output
    request, response, *_ = await sandbox.events()
    assert (request["type"], request["access"], request["host"]) == ("egress.request", "allowed", DOCKERS_NAME)
    assert (response["type"], response["status"]) == ("egress.response", 200)
    assert [seen.path for seen in plain.seen] == ["/reached"]


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [{"access": "deny", "host": DOCKERS_NAME}, {"access": "allow", "host": "*"}],
        [{"access": "allow", "host": "*"}],  # this host is reached only where it is meant
        [{**ALLOWED, "paths": ["/other/*"]}],
    ],
    ids=["nothing", "all but this host", "all", "another path"],
)
async def test_what_is_denied_does_not_reach_this_host(sandboxes: Any, plain: HttpUpstream, rules: list[Any]) -> None:
    sandbox = await sandboxes(egress=rules, extra_hosts=EXTRA)
    output = await sandbox.run(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url(plain, "/secret")])
    assert output.stdout == "403", (output, await sandbox.events())
    assert plain.seen == []
    assert "denied" in {event["access"] for event in await sandbox.events("egress.request")}


BYTES = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as sock:
    sock.sendall(b"\\0\\1 not a request\\n")
    print(sock.recv(100).decode())
"""


async def test_bytes_that_name_no_host(sandboxes: Any) -> None:
    """As a database's client sends them: the address inside says which host is meant."""
    with SocketUpstream(lambda connection: connection.sendall(connection.recv(100)[::-1])) as upstream:
        speak = ["python3", "-c", BYTES, DOCKERS_NAME, str(upstream.port)]
        allowed = await sandboxes(egress=[ALLOWED], extra_hosts=EXTRA)
        output = await allowed.run(speak)
        assert "tseuqer a ton" in output.stdout, (output, await allowed.events())
        assert upstream.connections == 1
        for denied in (
            await sandboxes(egress=[{"access": "allow", "host": "*"}], extra_hosts=EXTRA),
            # Two names and only one of them allowed: which one is meant?
            await sandboxes(egress=[ALLOWED], extra_hosts=[*EXTRA, "other:host-gateway"]),
        ):
            output = await denied.run(speak)
            assert "tseuqer" not in output.stdout, output
        assert upstream.connections == 1


async def test_a_name_with_an_address(sandboxes: Any, plain: HttpUpstream) -> None:
    """It resolves for the proxy, too: the rule names the host, and nobody is asked for its address."""
    extra = ["db.internal:10.9.8.7", "loop.internal:127.0.0.1"]
    sandbox = await sandboxes(egress=[{"access": "allow", "host": "*.internal"}], extra_hosts=extra)
    assert "10.9.8.7\tdb.internal\n" in (await sandbox.run("cat /etc/hosts")).stdout
    # An address of this host is no way around: a wildcard does not mean it.
    connect = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--connect-to", "::11.0.0.1:"]
    output = await sandbox.run([*connect, url(plain, "/", "loop.internal")])
    assert output.stdout == "403", (output, await sandbox.events())
    await sandbox.apply(egress=[{"access": "allow", "host": "loop.internal"}], extra_hosts=extra)
    output = await sandbox.run([*connect, url(plain, "/", "loop.internal")])
    assert output.stdout == "200", (output, await sandbox.events())
    assert [seen.path for seen in plain.seen] == ["/"]
