"""The gate by itself, in a namespace where the test has all privileges: what a sandbox's seccomp profile and missing
capabilities would stop before is stopped by the gate as well."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from hiverd.contracts.errors import UnavailableError
from hiverd.egress import gate, netlink
from hiverd.egress.gate import GateSockets
from support.gateway import network_namespace

pytestmark = pytest.mark.system

CLONE_NEWNET = 0x40000000
SO_MARK = 36


@pytest.fixture
def namespace() -> Iterator[str]:
    with network_namespace() as path:
        yield path


@pytest.fixture
async def sockets(namespace: str) -> AsyncIterator[GateSockets]:
    opened = await gate.set_up(namespace, fresh=True)
    yield opened
    await asyncio.to_thread(opened.close)


async def inside(namespace: str, work: Callable[[], Any]) -> Any:
    """Runs this in a thread that is in the namespace; an `OSError` is returned."""
    outcome: list[Any] = []

    def enter() -> None:
        descriptor = os.open(namespace, os.O_RDONLY)
        try:
            assert ctypes.CDLL(None).setns(descriptor, CLONE_NEWNET) == 0
            outcome.append(work())
        except OSError as error:
            outcome.append(error)
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=enter)
    thread.start()
    await asyncio.to_thread(thread.join)
    return outcome[0]


def refused(sockets: GateSockets) -> set[netlink.Packet]:
    """What the packet log holds."""
    packets: set[netlink.Packet] = set()
    with contextlib.suppress(BlockingIOError):
        while True:
            packets.update(netlink.logged_packets(sockets.packet_log.recv(65536)))
    return packets


def connecting(target: tuple[Any, ...], *options: tuple[int, int, Any], source: str = "") -> Callable[[], str]:
    def work() -> str:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        with socket.socket(family) as sock:
            sock.settimeout(1)
            for option in options:
                sock.setsockopt(*option)
            if source:
                sock.bind((source, 0))
            sock.connect(target)
            return "connected"

    return work


def source_route(kind: int, hop: str) -> tuple[int, int, bytes]:
    return (socket.IPPROTO_IP, socket.IP_OPTIONS, bytes((kind, 7, 4)) + socket.inet_aton(hop) + b"\0")


@pytest.mark.parametrize("kind", [131, 137], ids=["loose", "strict"])
async def test_source_routes_are_refused_whatever_their_first_hop(
    namespace: str, sockets: GateSockets, kind: int
) -> None:
    outcome = await inside(namespace, connecting(("9.9.9.9", 81), source_route(kind, "127.0.0.1")))
    assert isinstance(outcome, OSError), outcome
    assert netlink.Packet("tcp", "127.0.0.1", 81) in refused(sockets)


async def test_routing_headers_are_refused(namespace: str, sockets: GateSockets) -> None:
    # Segment routing (RFC 8754) to an address behind ::1.
    segments = socket.inet_pton(socket.AF_INET6, "2001:db8::1") + socket.inet_pton(socket.AF_INET6, "::1")
    header = bytes((0, len(segments) // 8, 4, 1, 1, 0, 0, 0)) + segments
    option = (socket.IPPROTO_IPV6, socket.IPV6_RTHDR, header)
    outcome = await inside(namespace, connecting(("2001:db8::1", 83), option))
    assert isinstance(outcome, OSError), outcome
    assert refused(sockets) == {netlink.Packet("tcp", "::1", 83)}


async def test_a_connection_from_the_gates_address_is_refused(namespace: str, sockets: GateSockets) -> None:
    outcome = await inside(namespace, connecting(("9.9.9.9", 84), source=gate.GATE_ADDRESS))
    assert isinstance(outcome, ConnectionRefusedError), outcome
    assert refused(sockets) == {netlink.Packet("tcp", "9.9.9.9", 84)}


async def test_tcp_and_names_come_to_the_listeners_with_their_true_target(namespace: str, sockets: GateSockets) -> None:
    assert await inside(namespace, connecting(("9.9.9.9", 85))) == "connected"
    accepted, _ = sockets.tcp.accept()
    with accepted:
        assert gate.original_destination(accepted) == ("9.9.9.9", 85)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE) == 1
        assert accepted.getsockopt(socket.SOL_SOCKET, SO_MARK) == gate.MARK
    assert await inside(namespace, connecting(("8.8.8.8", 53))) == "connected"
    accepted, _ = sockets.dns_tcp.accept()
    accepted.close()
    assert refused(sockets) == set()


def ask() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.3)
        sock.connect(("8.8.8.8", 53))
        sock.send(b"a question")
        return sock.recv(100).decode()


class Impostor:
    """A workload that listens where a server did that has died, on every address."""

    def __init__(self, *, address: str = "0.0.0.0", options: tuple[int, ...] = (socket.SO_REUSEADDR,)) -> None:
        self._address = address
        self._options = options
        self.sockets: list[socket.socket] = []

    def start(self) -> str:
        for kind, port in ((socket.SOCK_STREAM, gate.TCP_PORT), (socket.SOCK_DGRAM, gate.DNS_PORT)):
            sock = socket.socket(socket.AF_INET, kind)
            self.sockets.append(sock)
            sock.setblocking(False)
            for option in self._options:
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
            sock.bind((self._address, port))
            if kind == socket.SOCK_STREAM:
                sock.listen()
        return "listens"

    def caught(self) -> bool:
        listener, datagrams = self.sockets
        with contextlib.suppress(BlockingIOError):
            listener.accept()[0].close()
            return True
        with contextlib.suppress(BlockingIOError):
            datagrams.recv(100)
            return True
        return False

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.mark.parametrize("address", ["0.0.0.0", gate.GATE_ADDRESS])
async def test_who_takes_the_ports_of_a_dead_server_hears_nothing(
    namespace: str, sockets: GateSockets, address: str
) -> None:
    sockets.close()
    impostor = Impostor(address=address)
    try:
        assert await inside(namespace, impostor.start) == "listens"
        assert isinstance(await inside(namespace, connecting(("9.9.9.9", 86))), ConnectionRefusedError)
        assert isinstance(await inside(namespace, ask), OSError)
        again = await gate.set_up(namespace, fresh=False)
        try:
            assert await inside(namespace, connecting(("9.9.9.9", 87))) == "connected"
            accepted, _ = again.tcp.accept()
            with accepted:
                assert gate.original_destination(accepted) == ("9.9.9.9", 87)
            await inside(namespace, ask)
            assert again.dns.recv(100) == b"a question"
        finally:
            await asyncio.to_thread(again.close)
        assert not impostor.caught()
    finally:
        impostor.close()


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
async def test_ports_of_a_living_server_cannot_be_shared(namespace: str, sockets: GateSockets, option: int) -> None:
    for address in (gate.GATE_ADDRESS, "0.0.0.0"):
        impostor = Impostor(address=address, options=(option,))
        assert isinstance(await inside(namespace, impostor.start), OSError), address
        impostor.close()

    def share_datagrams() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
            sock.bind((gate.GATE_ADDRESS, gate.DNS_PORT))
            return "shared"

    assert isinstance(await inside(namespace, share_datagrams), OSError)


async def test_the_servers_own_namespace_is_never_closed() -> None:
    before = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True).stdout
    with pytest.raises(UnavailableError, match="own network namespace"):
        await gate.set_up("/proc/self/ns/net", fresh=True)
    assert subprocess.run(["nft", "list", "tables"], check=True, capture_output=True).stdout == before


async def test_probing_leaves_nothing_in_this_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    before = subprocess.run(["ip", "address"], check=True, capture_output=True).stdout
    await gate.probe()
    assert subprocess.run(["ip", "address"], check=True, capture_output=True).stdout == before
    monkeypatch.setattr(gate, "rules", lambda **_: "table inet hiver { chain x { no such rule } }")
    with pytest.raises(UnavailableError, match="does not take the sandbox's packet filter"):
        await gate.probe()


async def test_what_cannot_be_set_up_leaves_no_socket(tmp_path: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    no_namespace = tmp_path / "net"
    no_namespace.write_text("")
    with pytest.raises(OSError, match="setns"):
        await gate.set_up(str(no_namespace), fresh=True)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_rules_that_the_kernel_refuses_are_an_error_and_leave_no_socket(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(gate, "rules", lambda **_: "table inet hiver { chain x { no such rule } }")
    with pytest.raises(Exception, match="does not take the sandbox's packet filter"):
        await gate.set_up(namespace, fresh=True)
    assert len(os.listdir("/proc/self/fd")) == before
