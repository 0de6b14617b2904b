"""Attacks in time: before the first instruction could be guarded, while no server runs, and between sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import MakeServer
from support.plain import plain_client
from support.server import Server, ServerFailed
from support.upstreams import HttpUpstream, lead
from support.waiting import until, until_async
from system.egress.attacks import denials, others, packet, run_attacks
from system.egress.conftest import Inside

pytestmark = pytest.mark.system

AT_ONCE = """
import socket, time
for number in range(20):
    for host in ("8.8.8.8", "denied.test"):
        with socket.create_connection((host, 80), 5) as sock:
            sock.sendall(b"GET /%d HTTP/1.1\\r\\nHost: %s\\r\\n\\r\\n" % (number, host.encode()))
            print(sock.recv(100).split(b"\\r\\n")[0].decode(), flush=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            print(sock.sendto(b"x", ("8.8.8.8", 1000 + number)), flush=True)
        except OSError as error:
            print(error.strerror, flush=True)
time.sleep(1000)
"""


async def test_the_first_instruction_meets_the_gate(sandboxes: Any) -> None:
    sandbox = await sandboxes(egress=[], entrypoint=["python3", "-c", AT_ONCE])

    async def printed() -> list[str]:
        lines = [event["stdout"].strip() for event in await sandbox.events("stdio")]
        return lines if len(lines) == 60 else []

    lines = await until_async(printed, seconds=20, what="the entrypoint's output")
    assert set(lines) == {"HTTP/1.1 403 Forbidden", "Operation not permitted"}
    expected = {(host, "GET", f"/{number}") for number in range(20) for host in ("8.8.8.8", "denied.test")}
    expected |= {packet("udp", f"8.8.8.8:{1000 + number}") for number in range(20)}
    assert denials(await sandbox.events()) == expected


@contextlib.asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with plain_client(base_url=server.url, timeout=60) as client:
        yield client


async def make(client: httpx.AsyncClient, **config: Any) -> Inside:
    key = f"g-{uuid.uuid4().hex[:12]}"
    answer = await client.post(f"/v1/sandboxes/{key}", json=config)
    assert answer.status_code == 201, answer.text
    return Inside(client, answer.json()["id"], key)


BESIEGER = """
import errno, socket, threading, time
def note(name, line):
    with open("/workspace/" + name, "a") as file:
        file.write(line + "\\n")
def attempt(host, number):
    try:
        with socket.create_connection(("11.0.0.1", 80), 5) as sock:
            sock.sendall(b"GET /%d HTTP/1.1\\r\\nHost: %s\\r\\nConnection: close\\r\\n\\r\\n" % (number, host))
            return sock.recv(100).split(b" ")[1].decode()
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    except IndexError:
        return "closed"
def ask():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        try:
            sock.connect(("11.0.0.1", 53))
            sock.send(bytes.fromhex("000101000001000000000000") + b"\\x01a\\x04test\\x00\\x00\\x01\\x00\\x01")
            return sock.recv(500)[-4:].hex()
        except OSError:
            return "no answer"
def take(kind, port):
    sock = socket.socket(socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("", port))
        note("taken", str(port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
            note("caught", repr(sock.accept()))
        else:
            note("caught", repr(sock.recv(500)))
    except OSError as error:
        note("caught", "no: " + str(error))
taken = False
for number in range(100000):
    outcome = attempt(b"api.test", number)
    note("log", " ".join((outcome, attempt(b"denied.test", number), ask())))
    if outcome == "ECONNREFUSED" and not taken:
        taken = True
        for kind, port in ((socket.SOCK_STREAM, 15001), (socket.SOCK_DGRAM, 15053)):
            threading.Thread(target=take, args=(kind, port), daemon=True).start()
    time.sleep(0.05)
"""


CLOSED = "ECONNREFUSED ECONNREFUSED no answer"
OPEN = "200 403 0b000001"


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def workspace_of(marker: str) -> Path | None:
    """The sandbox's /workspace, through the process that bears the marker: no server is needed for it."""
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
            if marker.encode() in arguments and lines(process / "root/workspace/log"):
                return process / "root/workspace"
    return None


async def test_the_gate_is_closed_while_no_server_runs_and_stands_again_afterwards(
    make_server: MakeServer, plain: HttpUpstream
) -> None:
    server = make_server(ephemeral=False)
    server.start()
    marker = uuid.uuid4().hex
    async with client_of(server) as client:
        sandbox = await make(client, egress=[lead("api.test", plain)], entrypoint=["python3", "-c", BESIEGER, marker])
        workspace = await asyncio.to_thread(until, lambda: workspace_of(marker), seconds=20, what="the first attempt")
    log = workspace / "log"
    until(lambda: OPEN in lines(log), seconds=20, what="an open gate")

    server.kill()
    arrived = len(plain.seen)
    until(lambda: len(lines(workspace / "taken")) == 2, seconds=20, what="the dead server's ports taken")
    before = len(lines(log))
    until(lambda: len(lines(log)) > before + 5, seconds=20, what="attempts at a closed gate")
    assert set(lines(log)[before:]) == {CLOSED}
    assert len(plain.seen) <= arrived + 1, "a request arrived that no server had judged"

    server.start()
    until(lambda: lines(log)[-1] == OPEN, seconds=20, what="the gate back in place")
    assert lines(workspace / "caught") == []
    async with client_of(server) as client:
        sandbox = Inside(client, sandbox.id, sandbox.key)
        denied = [event for event in await sandbox.events() if event.get("access") == "denied"]
        # In the moment before the new rules, what was meant for the dead server's ports is on record as that.
        assert {event["host"] for event in denied} - {"11.0.0.3:15001", "11.0.0.3:15053"} == {"denied.test"}
        assert "caught" not in (await sandbox.run("ls /workspace")).stdout


async def test_a_server_that_cannot_set_up_gates_does_not_start(make_server: MakeServer, tmp_path: Path) -> None:
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    (libraries / "libnftables.so.1").write_bytes(b"no library")
    server = make_server(environment={"LD_LIBRARY_PATH": str(libraries)})
    with pytest.raises(ServerFailed, match="libnftables1"):
        server.start()


NEIGHBOUR = """
import socket, threading, time
for family, address in ((socket.AF_INET, ("0.0.0.0", 7001)), (socket.AF_UNIX, "\\0hiver-test-neighbour")):
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen()
print("ready", flush=True)
time.sleep(1000)
"""

TO_NEIGHBOURS = """
attack(exchange, b"x", ("127.0.0.1", 7001), name="its port on loopback")
attack(exchange, b"x", ("11.0.0.2", 7001), name="its port on the address of all sandboxes")
attack(exchange, b"x", "\\0hiver-test-neighbour", socket.AF_UNIX, name="its abstract socket")
attack(exchange, b"x", "\\0hiver-test-host", socket.AF_UNIX, name="the host's abstract socket")
def sockets_in(folder):
    return [name for name in os.listdir(folder) if name.endswith(".sock")]
attack(sockets_in, "/run", name="the host's socket files")
with open("/proc/net/unix") as table:
    outcomes["foreign sockets seen"] = [line for line in table if "hiver-test" in line]
"""


async def test_other_sandboxes_and_the_hosts_sockets_are_out_of_reach(sandboxes: Any) -> None:
    """Nothing to record: each sandbox has a namespace of its own, in which these addresses are its own or nobody's."""
    neighbour = await sandboxes(egress=[], entrypoint=["python3", "-c", NEIGHBOUR])

    async def ready() -> list[dict[str, Any]]:
        return list(await neighbour.events("stdio"))

    await until_async(ready, seconds=20, what="the neighbour's listeners")
    with socket.socket(socket.AF_UNIX) as host:
        host.bind("\0hiver-test-host")
        host.listen()
        sandbox = await sandboxes(egress=[{"access": "allow", "host": "*"}])
        outcomes = await run_attacks(sandbox, TO_NEIGHBOURS)
    assert outcomes.pop("the host's socket files") == []
    assert outcomes.pop("foreign sockets seen") == []
    assert others(outcomes, {"ECONNREFUSED"}) == {}
    assert await sandbox.events() == []
