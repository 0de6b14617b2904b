"""The few netlink messages that a gate needs (rtnetlink(7), nfnetlink), for the calling thread's network namespace."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from msgspec import Struct

LOOPBACK_INDEX: Final = 1

_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_GETROUTE = 16, 20, 24, 26
_LOCAL, _ANYCAST = 2, 4
_REQUEST: Final = 0x1
_REQUEST_ACK: Final = 0x1 | 0x4
_CREATE: Final = 0x400
_IFF_UP: Final = 1
_ERROR: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
_NETLINK_NETFILTER: Final = 12
_NFLOG_PACKET, _NFLOG_CONFIG = 0x400, 0x401
_COPY_PACKET: Final = 2


def bring_up_loopback(addresses: Sequence[str]) -> None:
    """`lo` up with these addresses, and default routes over it. Repeatable. What IPv6 needs may be missing."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as link:
        link.bind((0, 0))
        _ask(link, _RTM_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, LOOPBACK_INDEX, _IFF_UP, _IFF_UP))
        for address in addresses:
            packed = ip_address(address).packed
            family, bits = (socket.AF_INET, 32) if len(packed) == 4 else (socket.AF_INET6, 128)
            # IFA_LOCAL and IFA_ADDRESS; IPv6 without duplicate address detection
            body = struct.pack("=BBBBi", family, bits, 0x02 if bits == 128 else 0, 0, LOOPBACK_INDEX)
            body += _attribute(2, packed) + _attribute(1, packed)
            _ask(link, _RTM_NEWADDR, _CREATE, body, may_fail=bits == 128)
            # A default route, table main, protocol static, scope link, type unicast, out through lo.
            route = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 254, 4, 253 if bits == 32 else 0, 1, 0)
            route += _attribute(4, struct.pack("=i", LOOPBACK_INDEX))
            _ask(link, _RTM_NEWROUTE, _CREATE, route, may_fail=bits == 128)


def open_packet_log(group: int, snap_bytes: int) -> socket.socket:
    """A socket that receives every packet that the rules log to that NFLOG group, at once, cut to
    `snap_bytes`. Non-blocking."""
    log = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    try:
        log.bind((0, 0))
        head = struct.pack("!BBH", socket.AF_UNSPEC, 0, group)
        _ask(log, _NFLOG_CONFIG, 0, head + _attribute(1, b"\x01"))
        _ask(log, _NFLOG_CONFIG, 0, head + _attribute(2, struct.pack("!IBx", snap_bytes, _COPY_PACKET)))
        _ask(log, _NFLOG_CONFIG, 0, head + _attribute(5, struct.pack("!I", 1)))
        log.setblocking(False)
    except BaseException:
        log.close()
        raise
    return log


def is_local(address: IPv4Address | IPv6Address) -> bool:
    """Whether the kernel would deliver to this host what is sent to the address. False if it has no way there."""
    family, bits = (socket.AF_INET, 32) if address.version == 4 else (socket.AF_INET6, 128)
    request = struct.pack("=BBBBBBBBI", family, bits, 0, 0, 0, 0, 0, 0, 0) + _attribute(1, address.packed)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as link:
        link.send(_HEADER.pack(_HEADER.size + len(request), _RTM_GETROUTE, _REQUEST, 1, 0) + request)
        for kind, route in _messages(link.recv(16384)):
            if kind == _RTM_NEWROUTE:
                return route[7] in (_LOCAL, _ANYCAST)
    return False


class Packet(Struct, frozen=True):
    """Where a packet wanted to go."""

    protocol: str
    address: str
    port: int | None


def logged_packets(datagram: bytes) -> Iterator[Packet]:
    """The packets in what a packet log received. Anything else in it is left out."""
    for kind, body in _messages(datagram):
        if kind == _NFLOG_PACKET:
            for attribute, value in _attributes(body[4:]):
                if attribute == 9 and (packet := _packet(value)) is not None:
                    yield packet


def _ask(link: socket.socket, kind: int, flags: int, body: bytes, *, may_fail: bool = False) -> None:
    """Sends a request and awaits its acknowledgement. Raises `OSError` unless what was asked for is so already."""
    link.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST_ACK | flags, 1, 0) + body)
    for answer, content in _messages(link.recv(16384)):
        if answer == _ERROR:
            number = -struct.unpack_from("=i", content)[0]
            if number not in (0, errno.EEXIST) and not may_fail:
                raise OSError(number, f"netlink request {kind}: {os.strerror(number)}")


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    while len(datagram) >= _HEADER.size:
        size, kind = struct.unpack_from("=IH", datagram)
        if size < _HEADER.size:
            return
        yield kind, datagram[_HEADER.size : size]
        datagram = datagram[(size + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        if size < 4:
            return
        yield kind & 0x3FFF, data[4:size]
        data = data[(size + 3) & ~3 :]


_PROTOCOLS: Final = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 58: "icmp", 132: "sctp", 136: "udplite"}
_WITH_PORTS: Final = frozenset((6, 17, 33, 132, 136))
_EXTENSIONS: Final = frozenset((0, 43, 60))
"""IPv6 headers in front of the transport's: hop-by-hop, routing, destination options (RFC 8200 4)."""


def _packet(data: bytes) -> Packet | None:
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        number, start, address = data[9], (data[0] & 15) * 4, data[16:20]
    elif version == 6 and len(data) >= 40:
        number, start, address = data[6], 40, data[24:40]
        while number in _EXTENSIONS and len(data) >= start + 2:
            number, start = data[start], start + (data[start + 1] + 1) * 8
    else:
        return None
    port = int.from_bytes(data[start + 2 : start + 4]) if number in _WITH_PORTS and len(data) >= start + 4 else None
    return Packet(_PROTOCOLS.get(number, f"ip-{number}"), str(ip_address(address)), port)
