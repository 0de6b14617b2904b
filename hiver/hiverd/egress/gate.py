"""The gate: what is set up in a sandbox's network namespace so that nothing leaves it unseen (docs/egress.md).

The namespace has no link to the outside. All that a program sends goes over `lo`, where these rules turn TCP to our
listener and names to our resolver, and reject and log all else. So if the server dies, the way out dies with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import threading
from typing import Final

from msgspec import Struct

from hiverd.contracts.isolation import GATE_ADDRESS
from hiverd.egress import netlink, nft
from hiverd.netns import enter_network_namespace

SANDBOX_ADDRESS: Final = "11.0.0.2"
TCP_PORT: Final = 15001
DNS_PORT: Final = 15053
LOG_GROUP: Final = 7
BACKLOG: Final = 512

_SANDBOX_ADDRESS_6: Final = "fd11::2"
_SO_ORIGINAL_DST: Final = 80
_BIND_SECONDS: Final = 5.0

_REPLACE: Final = """
table inet hiver
delete table inet hiver
"""
"""For a namespace that has a gate already. The kernel takes 10 ms for it, and half a millisecond without."""

_RULES: Final = """
table inet hiver {{
  chain way_in {{
    type nat hook output priority -100; policy accept;
    ip daddr 127.0.0.0/8 return
    ip daddr {listener} return
    meta nfproto ipv4 udp dport 53 dnat ip to {listener}:{dns_port}
    meta nfproto ipv4 meta l4proto tcp dnat ip to {listener}:{tcp_port}
  }}
  chain way_out {{
    type filter hook output priority 0; policy drop;
    ip daddr 127.0.0.0/8 accept
    ip6 daddr ::1 accept
    ct state established,related accept
    ip daddr {listener} ct status dnat accept
    log group {log_group} snaplen 96 queue-threshold 1
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
}}
"""


class GateSockets(Struct, frozen=True):
    """What was born inside. The holder closes them."""

    tcp: socket.socket
    dns: socket.socket
    packet_log: socket.socket

    def close(self) -> None:
        for sock in (self.tcp, self.dns, self.packet_log):
            sock.close()


async def set_up(namespace: str, *, fresh: bool) -> GateSockets:
    """Closes the namespace whose nsfs file is given, and opens the gate's sockets in it.

    `fresh`: nobody has set it up before; otherwise a new server takes over from one that died. Raises
    `UnavailableError` or `OSError`, and then the sandbox must not start.
    """
    loop = asyncio.get_running_loop()
    made: asyncio.Future[GateSockets] = loop.create_future()

    def work() -> None:
        outcome: GateSockets | Exception
        try:
            outcome = _set_up_inside(namespace, fresh=fresh)
        except Exception as error:  # noqa: BLE001 -- handed to the caller
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(_deliver, made, outcome)

    # A thread of its own, which ends inside: none of ours ever has to find the way back.
    threading.Thread(target=work, name="gate", daemon=True).start()
    return await made


def original_destination(sock: socket.socket) -> tuple[str, int]:
    """Where an accepted connection wanted to go, (IPv4 address, port). Raises `OSError`."""
    raw = sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
    port, address = struct.unpack_from("!2xH4s", raw)
    return socket.inet_ntoa(address), port


def _set_up_inside(namespace: str, *, fresh: bool) -> GateSockets:
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_network_namespace(descriptor)
    finally:
        os.close(descriptor)
    netlink.bring_up_loopback([SANDBOX_ADDRESS, GATE_ADDRESS, _SANDBOX_ADDRESS_6])
    opened: list[socket.socket] = []
    try:
        opened.append(_bound(socket.SOCK_STREAM, TCP_PORT))
        opened[0].listen(BACKLOG)
        opened.append(_bound(socket.SOCK_DGRAM, DNS_PORT))
        opened.append(netlink.open_packet_log(LOG_GROUP))
        rules = _rules(tcp_port=_port_of(opened[0]), dns_port=_port_of(opened[1]))
        nft.load(rules if fresh else _REPLACE + rules)
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return GateSockets(*opened)


def _rules(*, tcp_port: int, dns_port: int) -> str:
    return _RULES.format(listener=GATE_ADDRESS, tcp_port=tcp_port, dns_port=dns_port, log_group=LOG_GROUP)


def _bound(kind: socket.SocketKind, port: int) -> socket.socket:
    """On the port if it is free. The workload may have taken it while no server ran: then on any other."""
    sock = socket.socket(socket.AF_INET, kind)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((GATE_ADDRESS, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            sock.bind((GATE_ADDRESS, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def _port_of(sock: socket.socket) -> int:
    port = sock.getsockname()[1]
    assert isinstance(port, int)  # noqa: S101 -- an AF_INET socket's address is (str, int)
    return port


def _deliver(made: asyncio.Future[GateSockets], outcome: GateSockets | Exception) -> None:
    if made.cancelled():
        if isinstance(outcome, GateSockets):
            outcome.close()
    elif isinstance(outcome, Exception):
        made.set_exception(outcome)
    else:
        made.set_result(outcome)
