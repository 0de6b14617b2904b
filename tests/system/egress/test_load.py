"""Much, many and slow through the proxy: memory stays flat, nothing leaks, and others go on."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from support.leaks import marks_of, wait_until_clean
from support.memory import GROWTH_BYTES, MIB, Peak
from support.plain import plain_client
from support.server import DEFAULT_CONFIG, Backend, Server
from support.upstreams import Authority, HttpUpstream, SocketUpstream, lead
from support.waiting import until_async

pytestmark = [pytest.mark.system, pytest.mark.slow]

SIZE_MIB = int(os.environ.get("HIVER_TEST_EGRESS_MIB", "1024"))
STOP_SECONDS = 20.0

WAYS = [("http", True), ("https", True), ("https", False)]
WAY_NAMES = ["plain", "intercepted", "spliced"]

MANY = """
import asyncio, ssl, sys
context = None
if sys.argv[1] == "443":
    context = ssl.create_default_context()
    if sys.argv[3] == "spliced":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
async def one():
    reader, writer = await asyncio.open_connection(
        "api.test", int(sys.argv[1]), ssl=context, ssl_handshake_timeout=100 if context else None)
    writer.write(b"GET /slow/3 HTTP/1.1\\r\\nHost: api.test\\r\\nConnection: close\\r\\n\\r\\n")
    answer = await reader.read()
    writer.close()
    return answer.startswith(b"HTTP/1.1 200")
async def main():
    outcomes = await asyncio.gather(*[one() for _ in range(int(sys.argv[2]))], return_exceptions=True)
    print(sum(outcome is True for outcome in outcomes), *{repr(o) for o in outcomes if isinstance(o, Exception)})
asyncio.run(main())
"""

SEQUENCE = """
import http.client, ssl, sys
scheme, count, fresh = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "fresh"
context = ssl.create_default_context() if scheme == "https" else None
def connect():
    if context:
        return http.client.HTTPSConnection("api.test", context=context, timeout=60)
    return http.client.HTTPConnection("api.test", timeout=60)
connection, good = connect(), 0
for number in range(count):
    connection.request("GET", "/status/200")
    answer = connection.getresponse()
    answer.read()
    good += answer.status == 200
    if fresh:
        connection.close()
        connection = connect()
print(good)
"""

LORIS = """
import socket, sys, time, threading
KINDS = {
    "silent": (80, b"", b""),
    "head": (80, b"GET / HTTP/1.1\\r\\nHost: api.test\\r\\n", b"X: y\\r\\n"),
    "endless": (80, b"GET / HTTP/1.1\\r\\nHost: api.test\\r\\n", b"X: " + b"y" * 8000 + b"\\r\\n"),
    "hello": (443, b"\\x16\\x03\\x01\\x02\\x00\\x01\\x00\\x01\\xfc", b"\\x03"),
    "tls-silent": (443, b"\\x16", b""),
}
def dribble(kind, outcomes):
    port, first, more = KINDS[kind]
    began = time.monotonic()
    sock = socket.create_connection(("api.test", port))
    sock.settimeout(1)
    try:
        sock.sendall(first)
        while time.monotonic() - began < 90:
            if more:
                sock.sendall(more)
            try:
                while sock.recv(1000):
                    pass
                break
            except TimeoutError:
                pass
    except OSError:
        pass
    outcomes.append((kind, time.monotonic() - began))
outcomes = []
threads = [threading.Thread(target=dribble, args=(kind, outcomes)) for kind in KINDS for _ in range(20)]
for thread in threads: thread.start()
for thread in threads: thread.join()
for kind in KINDS:
    print(kind, max(seconds for other, seconds in outcomes if other == kind))
"""

HOLD = """
import socket, time
hanging = b"GET /slow/1000 HTTP/1.1\\r\\nHost: api.test\\r\\n\\r\\n"
held = []
for port, first in ((80, hanging), (80, b"GET / HTT"), (5432, b"\\0\\0"), (443, b"\\x16")):
    for _ in range(5):
        held.append(socket.create_connection(("api.test", port)))
        held[-1].sendall(first)
print("holding", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def upstreams(authority: Authority) -> Iterator[Callable[[str], HttpUpstream]]:
    with HttpUpstream() as plain, HttpUpstream(authority.context("api.test")) as secure:
        yield lambda scheme: plain if scheme == "http" else secure


@pytest.mark.parametrize(
    ("scheme", "mitm", "version"),
    [(*way, "http1.1") for way in WAYS] + [("https", True, "http2")],
    ids=[*WAY_NAMES, "h2"],
)
@pytest.mark.parametrize("direction", ["down", "up"])
async def test_a_gigabyte(
    sandboxes: Any, egress_server: Server, upstreams: Any, scheme: str, mitm: bool, version: str, direction: str
) -> None:
    """With HTTP/2, which costs more, a quarter of it."""
    sandbox = await sandboxes(egress=[lead("api.test", upstreams(scheme))], mitm=mitm)
    size = SIZE_MIB * MIB // (4 if version == "http2" else 1)
    curl = f"curl -ksS --{version}"
    if direction == "down":
        command = f"{curl} -o /dev/null -w '%{{size_download}}' {scheme}://api.test/bytes/{size}"
        expected = str(size)
    else:
        command = f"truncate -s {size} /tmp/big && {curl} -T /tmp/big {scheme}://api.test/discard"
        expected = json.dumps({"bytes": size})
    began = time.monotonic()
    async with Peak(egress_server) as peak:
        output = await sandbox.run(command)
    print(f"{size / MIB / (time.monotonic() - began):.0f} MiB/s, memory grew by {peak.growth / MIB:.0f} MiB")
    assert output.stdout == expected, output
    assert peak.growth < GROWTH_BYTES


async def test_text_that_comes_faster_than_it_can_be_recorded(
    sandboxes: Any, egress_server: Server, upstreams: Any
) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", upstreams("http"))])
    size = 256 * MIB
    async with Peak(egress_server) as peak:
        curl = f"curl -sS -o /dev/null -w '%{{size_download}} ' http://api.test/text/{size // 4}"
        output = await sandbox.run(f"for i in 1 2 3 4; do {curl} & done; wait")
    assert output.stdout == f"{size // 4} " * 4, output
    assert peak.growth < 2 * GROWTH_BYTES


async def _settles(server: Server, before: int) -> None:
    """Kept connections to upstreams end after ten seconds."""

    async def settled() -> bool:
        return server.open_descriptors() <= before + 8

    await until_async(
        settled, seconds=30, what=f"descriptors are back at {before}, {server.open_descriptors()} are open"
    )


@pytest.mark.parametrize(("scheme", "mitm"), WAYS, ids=WAY_NAMES)
async def test_five_hundred_at_once(
    sandboxes: Any, egress_server: Server, upstreams: Any, scheme: str, mitm: bool
) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", upstreams(scheme))], mitm=mitm)
    await sandbox.write("/tmp/many.py", MANY)
    before = egress_server.open_descriptors()
    port = 443 if scheme == "https" else 80
    async with Peak(egress_server) as peak:
        output = await sandbox.run(["python3", "/tmp/many.py", str(port), "500", "" if mitm else "spliced"])
    assert output.stdout.split() == ["500"], output
    print(f"memory grew by {peak.growth / MIB:.0f} MiB")
    assert peak.growth < 2 * GROWTH_BYTES  # a TLS session takes some 100 KiB on each side
    await _settles(egress_server, before)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_one_after_the_other(sandboxes: Any, egress_server: Server, upstreams: Any, scheme: str) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", upstreams(scheme))])
    await sandbox.write("/tmp/sequence.py", SEQUENCE)

    async def run(count: int, kind: str) -> None:
        output = await sandbox.run(["python3", "/tmp/sequence.py", scheme, str(count), kind])
        assert output.stdout.split() == [str(count)], output

    await run(200, "kept")
    await run(100, "fresh")
    before = egress_server.open_descriptors()
    async with Peak(egress_server) as peak:
        await run(10_000, "kept")
        await run(2_000, "fresh")
    print(f"memory grew by {peak.growth / MIB:.0f} MiB")
    assert peak.growth < GROWTH_BYTES
    assert len(upstreams(scheme).seen) == 12_300
    await _settles(egress_server, before)


async def test_agents_that_take_their_time_are_cut_and_hold_nobody_up(
    sandboxes: Any, egress_server: Server, upstreams: Any
) -> None:
    sandbox = await sandboxes(egress=[lead("api.test", upstreams("http"), methods=["GET"])])
    await sandbox.write("/tmp/loris.py", LORIS)
    before = egress_server.open_descriptors()
    slow = asyncio.create_task(sandbox.run(["python3", "/tmp/loris.py"]))
    await asyncio.sleep(2)
    for _ in range(5):
        output = await sandbox.run("curl -sS -o /dev/null -w '%{http_code} %{time_total}' http://api.test/")
        status, seconds = output.stdout.split()
        assert (status, float(seconds) < 1) == ("200", True), output
    took = dict(line.split() for line in (await slow).stdout.splitlines())
    print(took)
    assert set(took) == {"silent", "head", "endless", "hello", "tls-silent"}
    assert max(map(float, took.values())) < 60
    await _settles(egress_server, before)


@pytest.fixture
async def own_server(
    tmp_path: Any, authority: Authority, isolated_by: Backend
) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    """A server that may be killed; its sandboxes outlive it."""
    server = Server(tmp_path, ephemeral=False, config=DEFAULT_CONFIG + authority.settings, backend=isolated_by)
    server.start()
    async with plain_client(base_url=server.url, timeout=60) as client:
        yield server, client
    server.stop()
    server.ephemeral = True
    server.start()
    assert server.stop() == 0
    wait_until_clean(marks_of(server.data_dir))


class Sandbox:
    def __init__(self, client: httpx.AsyncClient, base: str) -> None:
        self._client = client
        self._base = base

    @classmethod
    async def make(cls, client: httpx.AsyncClient, **config: Any) -> Sandbox:
        answer = await client.post("/v1/sandboxes/load", json=config)
        assert answer.status_code == 201, answer.text
        return cls(client, f"/sandbox/{answer.json()['id']}/v1/load")

    async def run(self, command: str) -> str:
        answer = await self._client.post(f"{self._base}/exec", json={"command": command})
        return str(answer.json()["stdout"])


async def test_a_killed_server_comes_back_with_the_same_rules_and_trust(
    own_server: tuple[Server, httpx.AsyncClient], upstreams: Any
) -> None:
    server, client = own_server
    rules = [lead("api.test", upstreams("https"), methods=["GET"], override={"headers": {"x-key": "injected"}})]
    sandbox = await Sandbox.make(client, egress=rules)
    loop = "while true; do curl -sS -m 5 -o /dev/null https://api.test/bytes/100000000; done"
    await sandbox.run(f"for i in 1 2 3 4; do ({loop}) >/dev/null 2>&1 & done; curl -sS https://api.test/ >/dev/null")
    await asyncio.sleep(1)
    before = await sandbox.run("sha256sum /etc/ssl/certs/* | sort")
    server.kill()
    server.start()
    output = await sandbox.run(
        "curl -sS https://api.test/after; curl -sS -o /dev/null -w '%{http_code}' -d x https://api.test/"
    )
    document, _, status = output.rpartition("}")
    assert ["X-Key", "injected"] in json.loads(document + "}")["headers"]
    assert status == "403"
    assert await sandbox.run("sha256sum /etc/ssl/certs/* | sort") == before


async def test_a_server_stops_in_time_whatever_is_open(
    own_server: tuple[Server, httpx.AsyncClient], upstreams: Any
) -> None:
    def hold(connection: socket.socket) -> None:
        while connection.recv(1000):
            pass

    server, client = own_server
    with SocketUpstream(hold) as database:
        rules = [lead("api.test", database, ports=[5432]), lead("api.test", upstreams("http"))]
        sandbox = await Sandbox.make(client, egress=rules)
        await client.post(f"{sandbox._base}/file/tmp/hold.py", content=HOLD)
        wait = "for i in $(seq 50); do sleep 0.1; grep holding /tmp/held && break; done"
        started = await sandbox.run(f"python3 /tmp/hold.py > /tmp/held 2>&1 & {wait}; cat /tmp/held")
        assert "holding" in started
        await asyncio.sleep(1)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < STOP_SECONDS
        server.start()
