"""Packets in the log, as the kernel writes them, and what is no such thing."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress.netlink import Packet, is_local, logged_packets

PORTS = struct.pack("!HH", 1000, 443)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def logged(*payloads: bytes, kind: int = 0x400) -> bytes:
    """A datagram with one message per packet, other attributes around it."""
    messages = b""
    for payload in payloads:
        body = struct.pack("!BBH", 2, 0, 7) + attribute(1, b"\x08\0\3\0") + attribute(9, payload) + attribute(10, b"\0")
        messages += struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body + bytes(-len(body) % 4)
    return messages


def ipv4(protocol: int, content: bytes = PORTS, *, options: bytes = b"") -> bytes:
    head = bytes((0x45 + len(options) // 4, 0)) + bytes(7) + bytes((protocol,)) + bytes(2)
    return head + bytes((11, 0, 0, 2)) + bytes((8, 8, 8, 8)) + options + content


def ipv6(protocol: int, content: bytes = PORTS) -> bytes:
    address = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    return b"\x60" + bytes(5) + bytes((protocol, 64)) + address + address + content


@pytest.mark.parametrize(
    ("payload", "packet"),
    [
        (ipv4(17), Packet("udp", "8.8.8.8", 443)),
        (ipv4(6), Packet("tcp", "8.8.8.8", 443)),
        (ipv4(132), Packet("sctp", "8.8.8.8", 443)),
        (ipv4(1), Packet("icmp", "8.8.8.8", None)),
        (ipv4(41), Packet("ip-41", "8.8.8.8", None)),
        (ipv4(17, options=bytes(8)), Packet("udp", "8.8.8.8", 443)),
        (ipv4(17, b"\0"), Packet("udp", "8.8.8.8", None)),
        (ipv6(58), Packet("icmp", "2001:db8::1", None)),
        (ipv6(17), Packet("udp", "2001:db8::1", 443)),
        (ipv6(43, b"\6\0" + bytes(6) + PORTS), Packet("tcp", "2001:db8::1", 443)),
        (ipv6(0, b"\x3c\1" + bytes(14) + b"\x11\0" + bytes(6) + PORTS), Packet("udp", "2001:db8::1", 443)),
        (ipv6(44, b"\x11\0" + bytes(6) + PORTS), Packet("ip-44", "2001:db8::1", None)),
        (ipv6(0, b"\0"), Packet("ip-0", "2001:db8::1", None)),
    ],
)
def test_packets(payload: bytes, packet: Packet) -> None:
    assert list(logged_packets(logged(payload))) == [packet]


def test_several_in_one_datagram() -> None:
    assert [packet.protocol for packet in logged_packets(logged(ipv4(17), ipv6(6), ipv4(1)))] == ["udp", "tcp", "icmp"]


@pytest.mark.parametrize(
    "datagram",
    [b"", bytes(15), bytes(16), logged(ipv4(17), kind=2), logged(b""), logged(b"\x45"), logged(b"\x60" + bytes(38))],
)
def test_what_is_none_is_left_out(datagram: bytes) -> None:
    assert list(logged_packets(datagram)) == []


@given(st.binary(max_size=200))
def test_any_datagram(data: bytes) -> None:
    assert len(list(logged_packets(data))) <= len(data)


@given(st.sampled_from([b"\x45", b"\x4f", b"\x60"]), st.binary(max_size=96))
def test_any_packet(first: bytes, data: bytes) -> None:
    for packet in logged_packets(logged(first + data)):
        ip_address(packet.address)


@pytest.mark.parametrize(
    ("address", "local"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("192.0.2.200", False)]
)
def test_local_addresses(address: str, local: bool) -> None:
    assert is_local(ip_address(address)) == local
