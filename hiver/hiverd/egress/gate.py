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
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from hiverd.contracts.errors import UnavailableError
from hiverd.contracts.isolation import GATE_ADDRESS
from hiverd.egress import netlink, nft
from hiverd.netns import enter_network_namespace, leave_network_namespace

SANDBOX_ADDRESS: Final = "11.0.0.2"
TCP_PORT: Final = 15001
DNS_PORT: Final = 15053
LOG_GROUP: Final = 7
SNAP_BYTES: Final = 96
"""Of each refused packet, for the record: enough for its addresses and ports."""
BACKLOG: Final = 512
_PORT_ATTEMPTS: Final = 8

SANDBOX_ADDRESS_6: Final = "fd11::2"
_SO_ORIGINAL_DST: Final = 80

MARK: Final = 0x68697672
"""Of our sockets in the namespace (SO_MARK). Setting it takes CAP_NET_ADMIN, or CAP_NET_RAW."""

_REPLACE: Final = """
table inet hiver
delete table inet hiver
"""
"""For a namespace that has a gate already. The kernel takes 10 ms for it, and half a millisecond without."""

_RULES: Final = """
table inet hiver {{
  chain unjudgeable {{
    type filter hook output priority -150; policy accept;
    ip option lsrr exists goto refuse
    ip option ssrr exists goto refuse
    exthdr rt exists goto refuse
    ip saddr {listener} ct direction original meta mark != {mark} goto refuse
  }}
  chain way_in {{
    type nat hook output priority -100; policy accept;
    ip daddr {{ 127.0.0.0/8, {own}, {listener} }} return
    meta nfproto ipv4 meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {listener}:{dns_port}
    meta nfproto ipv4 meta l4proto tcp dnat ip to {listener}:{tcp_port}
  }}
  chain way_out {{
    type filter hook output priority 0; policy drop;
    ip daddr {{ 127.0.0.0/8, {own} }} accept
    ip6 daddr {{ ::1, {own_6} }} accept
    ct status dnat accept
    ip daddr {listener} ct direction reply accept
    goto refuse
  }}
  chain to_us {{
    type filter hook input priority 0; policy accept;
    ip daddr {listener} ct direction original socket mark != {mark} goto refuse
  }}
  chain refuse {{
    log group {log_group} snaplen {snap_bytes} queue-threshold 1
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
}}
"""
"""Loaded in one transaction.

`unjudgeable`, before addresses are translated: a source route would lead elsewhere than the address says, and a
connection *from* our address would look like one of ours. `way_out`: what was translated goes to us, by either of the
rules above; everything else that is not the sandbox talking to itself is refused; replies to our address are the
resets that refusals send. `to_us`: while no server runs, the
workload may take our ports, by the wildcard address too; what was redirected still reaches no socket but one with our
mark, which takes a capability to set.
"""


class GateSockets(Struct, frozen=True):
    """What was born inside. The holder closes them."""

    tcp: socket.socket
    dns: socket.socket
    dns_tcp: socket.socket
    """On the same port as `dns`."""
    packet_log: socket.socket

    def close(self) -> None:
        for sock in (self.tcp, self.dns, self.dns_tcp, self.packet_log):
            sock.close()


async def set_up(namespace: str, *, fresh: bool) -> GateSockets:
    """Closes the namespace whose nsfs file is given, and opens the gate's sockets in it.

    `fresh`: nobody has set it up before; otherwise a new server takes over from one that died. Raises
    `UnavailableError` or `OSError`, and then the sandbox must not start.
    """
    return await _in_thread(lambda: _set_up_inside(namespace, fresh=fresh))


async def probe() -> None:
    """Sets a gate up in a namespace of its own, which is gone afterwards. Raises `UnavailableError` saying what this
    host lacks."""
    try:
        (await _in_thread(_set_up_in_new_namespace)).close()
    except OSError as error:
        raise UnavailableError(f"no gate for egress can be set up here: {error}") from error


async def _in_thread(work: Callable[[], GateSockets]) -> GateSockets:
    """A thread of its own, which ends inside: none of ours ever has to find the way back."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[GateSockets] = loop.create_future()

    def run() -> None:
        outcome: GateSockets | Exception
        try:
            outcome = work()
        except Exception as error:  # noqa: BLE001 -- handed to the caller
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(_deliver, made, outcome)

    threading.Thread(target=run, name="gate", daemon=True).start()
    return await made


def original_destination(sock: socket.socket) -> tuple[str, int]:
    """Where an accepted connection wanted to go, (IPv4 address, port). Raises `OSError`."""
    raw = sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
    port, address = struct.unpack_from("!2xH4s", raw)
    return socket.inet_ntoa(address), port


def _set_up_inside(namespace: str, *, fresh: bool) -> GateSockets:
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        own, other = os.stat("/proc/self/ns/net"), os.fstat(descriptor)
        if (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino):
            raise UnavailableError("a gate in this server's own network namespace would cut the host off")
        enter_network_namespace(descriptor)
    finally:
        os.close(descriptor)
    return _set_up_here(fresh=fresh)


def _set_up_in_new_namespace() -> GateSockets:
    leave_network_namespace()
    return _set_up_here(fresh=True)


def _set_up_here(*, fresh: bool) -> GateSockets:
    netlink.bring_up_loopback([SANDBOX_ADDRESS, GATE_ADDRESS, SANDBOX_ADDRESS_6])
    opened: list[socket.socket] = []
    try:
        opened.append(_listener(TCP_PORT))
        opened += _resolver_pair()
        opened.append(netlink.open_packet_log(LOG_GROUP, SNAP_BYTES))
        text = rules(tcp_port=_port_of(opened[0]), dns_port=_port_of(opened[1]))
        nft.load(text if fresh else _REPLACE + text)
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return GateSockets(*opened)


def rules(*, tcp_port: int, dns_port: int) -> str:
    """The packet filter of a gate whose listeners have these ports."""
    return _RULES.format(
        own=SANDBOX_ADDRESS,
        own_6=SANDBOX_ADDRESS_6,
        listener=GATE_ADDRESS,
        tcp_port=tcp_port,
        dns_port=dns_port,
        mark=MARK,
        log_group=LOG_GROUP,
        snap_bytes=SNAP_BYTES,
    )


def _listener(port: int) -> socket.socket:
    """On the port if it is free. The workload may have taken it while no server ran: then on any other."""
    try:
        return _listening(port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    return _listening(0)


def _listening(port: int) -> socket.socket:
    sock = _marked(socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the server before may linger
        # What a peeking eye skips and a later reader finds must not exist: urgent bytes stay in line (tcp(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        sock.bind((GATE_ADDRESS, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _resolver_pair() -> tuple[socket.socket, socket.socket]:
    """UDP and TCP on one port."""
    for port in (DNS_PORT, *[0] * _PORT_ATTEMPTS):
        listener = _listener(port)
        # No SO_REUSEADDR: for UDP that would let a workload's socket with the same option share the port.
        datagrams = _marked(socket.SOCK_DGRAM)
        try:
            datagrams.bind((GATE_ADDRESS, _port_of(listener)))
        except OSError as error:
            listener.close()
            datagrams.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return datagrams, listener
    raise OSError(errno.EADDRINUSE, "the workload holds all ports")


def _marked(kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
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
