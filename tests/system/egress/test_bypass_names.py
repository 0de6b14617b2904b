"""Attacks through names: data in questions, other resolvers, names that lead to places which only a rule's own words
may open (PROTOCOL 0.2)."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support.leaks import marks_of, wait_until_clean
from support.plain import plain_client
from support.server import Backend, Server
from support.upstreams import HttpUpstream
from system.egress.attacks import denials, others, run_attacks
from system.egress.conftest import Inside

pytestmark = pytest.mark.system

QUESTIONS: Final = """
def question(name, kind=1, number=7, count=1, extra=b"", additions=0):
    labels = b"".join(bytes((len(label),)) + label for label in name.split(b".") if label)
    head = struct.pack("!6H", number, 0x100, count, 0, 0, additions)
    return head + labels + b"\\0" + struct.pack("!HH", kind, 1) + extra
def ask(data, server=("11.0.0.1", 53)):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.connect(server)
        sock.send(data)
        return sock.recv(4096).hex()
def ask_tcp(*questions, server=("11.0.0.1", 53)):
    with socket.create_connection(server) as sock:
        sock.sendall(b"".join(struct.pack("!H", len(data)) + data for data in questions))
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
        return answer.hex()
OPT = struct.pack("!BHHIH", 0, 41, 4096, 0, 0)
PAYLOAD = struct.pack("!BHHIH", 0, 41, 4096, 0, 204) + struct.pack("!HH", 65001, 200) + b"s" * 200
LONG = b".".join([b"0123456789abcdef" * 2] * 5) + b".tunnel.test"
attack(ask, question(b"plain.test"), name="plain")
attack(ask, question(b"plain.test", extra=OPT, additions=1), name="with EDNS")
attack(ask, question(b"plain.test"), ("8.8.8.8", 53), name="another server")
attack(ask_tcp, question(b"plain.test"), question(b"plain.test", 28, 8), name="over TCP")
outcomes["another server over TCP"] = ask_tcp(question(b"plain.test"), server=("1.1.1.1", 53))
before = len(outcomes)
attack(ask, question(b"data.tunnel.test", 16), name="TXT")
attack(ask, question(b"data.null.test", 10), ("9.9.9.9", 53), name="NULL")
attack(ask, question(LONG), name="a long name")
attack(ask, question(b"q" * 60 + b".tunnel.test"), name="a long label")
attack(ask, question(b"edns.tunnel.test", extra=PAYLOAD, additions=1), name="data in EDNS")
attack(ask, question(b"behind.tunnel.test", extra=b"s" * 400), name="data behind the question")
attack(ask_tcp, question(b"data.tcp.test", 16), name="TXT over TCP")
def not_answered(function, *arguments):
    answer = function(*arguments)
    if answer:
        return answer
    raise OSError(errno.ENODATA, "")
attack(not_answered, ask, b"s" * 300, name="no question at all")
attack(not_answered, ask, question(b"two.test", count=2), name="two questions")
attack(not_answered, ask_tcp, b"s" * 4097, name="endless over TCP")
attack(not_answered, exchange, b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n", ("8.8.8.8", 53), name="HTTP on port 53")
attack(not_answered, exchange, bytes.fromhex("16030100050100000100"), ("8.8.8.8", 53), name="TLS on port 53")
attack(exchange, b"", ("8.8.8.8", 853), socket.AF_INET, None, True, name="DoT, closed at once")
def dot():
    context = ssl.create_default_context()
    with socket.create_connection(("8.8.8.8", 853)) as plain, context.wrap_socket(plain, server_hostname="dns.google"):
        return "connected"
attack(dot, name="DoT")
outcomes["DoH"] = command("curl", "-sSf", "-m", "5", "https://8.8.8.8/dns-query?dns=AAAB", "-k")
"""


async def test_questions_carry_nothing_out_and_those_that_try_are_recorded(sandboxes: Any) -> None:
    sandbox = await sandboxes(egress=[{"access": "allow", "host": "allowed.test"}])
    outcomes = await run_attacks(sandbox, QUESTIONS)
    sink = "0b000001"
    for name in ("plain", "another server", "over TCP", "another server over TCP", "a long name", "data in EDNS"):
        assert sink in outcomes.pop(name), name
    assert outcomes.pop("with EDNS").endswith(sink + "000029" + "04d0" + "000000000000")
    answered = {name: outcomes.pop(name) for name in ("TXT", "NULL", "a long label", "data behind the question")}
    assert all("7363" not in answer for answer in answered.values())
    outcomes.pop("TXT over TCP")
    assert outcomes.pop("DoT, closed at once") == ""
    assert outcomes.pop("DoH") > 0
    # ENOTCONN: closed on us before we could close our side.
    assert others(outcomes, {"ENODATA", "TimeoutError", "SSLError", "ECONNRESET", "ENOTCONN", "[reset]"}) == {}
    denied = denials(await sandbox.events())
    assert {("dns.google", "TLS", "/"), ("8.8.8.8", "TLS", "/")} <= denied
    asked = {host for host, _, path in denied if path == "/dns"}
    long_name = ".".join(["0123456789abcdef" * 2] * 5) + ".tunnel.test"
    assert asked == {
        *("data.tunnel.test", "data.null.test", long_name, "q" * 60 + ".tunnel.test", "edns.tunnel.test"),
        *("behind.tunnel.test", "data.tcp.test", "malformed"),
    }


NOTATIONS: Final = {
    "loopback": ("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001"),
    "more loopback": ("127.255.255.254", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    "translated": ("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]", "[64:ff9b::a9fe:a9fe]"),
    "unspecified": ("0.0.0.0", "0", "0x0", "[::]", "0.0.0.1"),
    "metadata": (
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "[fd00:ec2::254]",
        "[::ffff:a9fe:a9fe]",
        "100.100.100.200",
    ),
    "link-local": ("169.254.1.1", "[fe80::1]", "[fec0::1]"),
    "multicast": ("224.0.0.1", "255.255.255.255", "[ff02::1]", "240.0.0.1"),
    "the gate": ("11.0.0.1", "11.0.0.2", "11.0.0.3"),
    "names": ("localhost", "LOCALHOST.", "ip6-localhost"),
}
GUARDED_NAMES: Final = {
    "loopback.names.test": "127.0.0.1",
    "loopback6.names.test": "::1",
    "mapped.names.test": "::ffff:127.0.0.1",
    "metadata.names.test": "169.254.169.254",
    "metadata6.names.test": "fd00:ec2::254",
    "unspecified.names.test": "0.0.0.0",
    "gate.names.test": "11.0.0.3",
}


class OwnHosts(Server):
    """A server with an /etc/hosts of its own, in which a test can change what names lead to."""

    @property
    def hosts(self) -> Path:
        return self.folder / "hosts"

    def command(self) -> list[str]:
        mount = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mount, str(self.hosts), *super().command()]


@pytest.fixture(scope="module")
def own_hosts(tmp_path_factory: pytest.TempPathFactory, isolated_by: Backend) -> Iterator[OwnHosts]:
    server = OwnHosts(tmp_path_factory.mktemp("hosts"), arguments=["--host", "0.0.0.0"], backend=isolated_by)
    server.folder.mkdir(exist_ok=True)
    server.hosts.write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost\n")
    with server:
        yield server
    wait_until_clean(marks_of(server.data_dir))


@pytest.fixture
async def wide_open(own_hosts: OwnHosts) -> AsyncIterator[Inside]:
    """A sandbox that may reach every host by a wildcard, and no host by name."""
    async with plain_client(base_url=own_hosts.url, timeout=60) as client:
        answer = await client.post("/v1/sandboxes/wide-open", json={"egress": [{"access": "allow", "host": "*"}]})
        sandbox = Inside(client, answer.json()["id"], "wide-open")
        yield sandbox
        await client.delete(sandbox.base)


ASK_FOR: Final = """
with open("/tmp/targets.json") as file:
    targets = json.load(file)
def status(host, port):
    request = f"GET /secret HTTP/1.1\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n"
    return exchange(request.encode(), ("8.8.8.8", port)).split(" ")[1]
for host, port in targets:
    attack(status, host, port, name=f"{host} {port}")
"""


async def ask_for(sandbox: Inside, targets: list[tuple[str, int]]) -> dict[str, Any]:
    """The status that a request to each is answered with."""
    await sandbox.write("/tmp/targets.json", json.dumps(targets))
    return await run_attacks(sandbox, ASK_FOR)


async def test_a_wildcard_reaches_no_guarded_address_in_any_notation_or_by_any_name(
    own_hosts: OwnHosts, wide_open: Inside, plain: HttpUpstream
) -> None:
    own_hosts.hosts.write_text("".join(f"{address} {name}\n" for name, address in GUARDED_NAMES.items()))
    hosts = [host for group in NOTATIONS.values() for host in group] + list(GUARDED_NAMES)
    outcomes = await ask_for(wide_open, [(host, plain.port) for host in hosts])
    assert others(outcomes, {"403", "502"}) == {}
    unresolved = [name for name, outcome in outcomes.items() if outcome == "502"]
    assert {name.split(" ")[0] for name in unresolved} <= {"localhost", "LOCALHOST.", "ip6-localhost"}
    assert plain.connections == 0
    events = await wide_open.events()
    assert len([event for event in events if event.get("access") == "denied"]) >= len(hosts) - len(unresolved)


async def test_addresses_that_are_dialled_by_number_are_guarded_too(wide_open: Inside, plain: HttpUpstream) -> None:
    script = f"""
for host in ("169.254.169.254", "100.100.100.200", "11.0.0.1", "0.0.0.9", "224.0.0.9", "192.0.2.77"):
    attack(exchange, b"\\0\\1 no request", (host, {plain.port}), name=host)
"""
    outcomes = await run_attacks(wide_open, script)
    outcomes.pop("192.0.2.77")  # not guarded: nobody is there
    assert others(outcomes, {"", "[reset]", "ENETUNREACH", "EPERM", "ECONNREFUSED", "EINVAL"}) == {}
    denied = {host for host, _, _ in denials(await wide_open.events())}
    assert {f"{host}:{plain.port}" for host in ("169.254.169.254", "100.100.100.200", "11.0.0.1")} <= denied


async def test_a_name_is_judged_each_time_it_is_resolved(
    own_hosts: OwnHosts, wide_open: Inside, plain: HttpUpstream
) -> None:
    """Rebinding: what was a public address a moment ago is loopback now."""
    port = plain.port
    own_hosts.hosts.write_text("192.0.2.99 rebound.test\n")
    await wide_open.run(f"curl -sS -m 1 http://rebound.test:{port}/")
    own_hosts.hosts.write_text("127.0.0.1 rebound.test\n192.0.2.99 rebound.test\n")
    assert (await ask_for(wide_open, [("rebound.test", port)]))[f"rebound.test {port}"] in {"502", "TimeoutError"}
    own_hosts.hosts.write_text("127.0.0.1 rebound.test\n")
    assert await ask_for(wide_open, [("rebound.test", port)]) == {f"rebound.test {port}": "403"}
    assert plain.connections == 0


def own_addresses() -> list[str]:
    """This host's addresses beyond loopback, as literals for a Host field."""
    found = []
    for target, family in (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6)):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
            except OSError:
                continue
            address = probe.getsockname()[0]
            found.append(f"[{address}]" if ":" in address else address)
    return found


async def test_the_servers_own_api_is_out_of_reach_at_every_address_of_this_host(
    own_hosts: OwnHosts, wide_open: Inside
) -> None:
    addresses = own_addresses()
    numbers = [address for address in addresses if not address.startswith("[")]
    lines = [f"{address.strip('[]')} own.test" for address in addresses] + ["::1 six.test"]
    lines += [f"::ffff:{address} mapped.test" for address in numbers]
    own_hosts.hosts.write_text("\n".join(lines) + "\n")
    mapped = [f"[::ffff:{address}]" for address in numbers]
    targets = ["127.0.0.1", "[::1]", "own.test", "six.test", "mapped.test", *addresses, *mapped]
    outcomes = await ask_for(wide_open, [(target, own_hosts.port) for target in targets])
    assert set(outcomes.values()) == {"403"}, outcomes
    assert "GET /secret" not in own_hosts.log_tail()


async def test_a_port_that_the_kernel_chose_is_guarded_as_well(tmp_path: Path, isolated_by: Backend) -> None:
    server = Server(tmp_path / "chosen", arguments=["--host", "0.0.0.0"], backend=isolated_by)
    server.port = 0
    server.folder.mkdir()
    server.answers = lambda: "is ready on" in server.log_tail()  # type: ignore[method-assign]
    server.start()
    try:
        ready = next(line for line in server.log_tail().splitlines() if "is ready on" in line)
        server.port = int(ready.rpartition(":")[2])
        async with plain_client(base_url=server.url, timeout=60) as client:
            answer = await client.post("/v1/sandboxes/chosen", json={"egress": [{"access": "allow", "host": "*"}]})
            sandbox = Inside(client, answer.json()["id"], "chosen")
            outcomes = await ask_for(sandbox, [(address, server.port) for address in own_addresses()])
            assert set(outcomes.values()) <= {"403"}, outcomes
            reasons = {host for host, _, _ in denials(await sandbox.events())}
            assert reasons == {address.strip("[]") for address in own_addresses()}
    finally:
        server.stop()
    wait_until_clean(marks_of(server.data_dir))
