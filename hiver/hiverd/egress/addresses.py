"""What a resolved address leads to (PROTOCOL 0.2): which ones only an exact rule or `override.host` may reach."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from hiverd.egress.names import Address

_METADATA: Final = frozenset(
    (
        IPv4Address("100.100.100.200"),  # Alibaba Cloud
        IPv4Address("168.63.129.16"),  # Azure's wire server
        IPv4Address("192.0.0.192"),  # Oracle Cloud
        IPv6Address("fd00:ec2::254"),  # AWS
        IPv6Address("fd20:ce::254"),  # Google Cloud
    )
)
"""Metadata services that are not link-local."""

_OWN: Final = IPv4Network("11.0.0.0/29")
"""What the gate uses inside a sandbox's namespace; outside it is somebody else's network."""

_TRANSLATED: Final = (
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64 (RFC 6052)
    (IPv6Network("64:ff9b:1::/48"), 0),  # local NAT64 (RFC 8215), its common /96 layout
    (IPv6Network("2002::/16"), 80),  # 6to4 (RFC 3056)
    (IPv6Network("::/96"), 0),  # IPv4-compatible (RFC 4291, 2.5.5.1)
)
"""IPv6 networks that hold an IPv4 address, and how many bits are right of it."""


_GUARDED: Final[tuple[tuple[IPv4Network | IPv6Network, str], ...]] = (
    (IPv4Network("127.0.0.0/8"), "the host's loopback"),
    (IPv6Network("::1/128"), "the host's loopback"),
    (IPv4Network("169.254.0.0/16"), "a link-local address"),
    (IPv6Network("fe80::/10"), "a link-local address"),
    (IPv6Network("fec0::/10"), "a site-local address"),
    (IPv4Network("0.0.0.0/8"), "the unspecified network"),  # Linux takes some of it for this host
    (IPv6Network("::/128"), "the unspecified address"),
    (IPv4Network("224.0.0.0/3"), "a multicast or reserved address"),
    (IPv6Network("ff00::/8"), "a multicast address"),
    (_OWN, "an address of the sandbox itself"),
)


def guarded(address: Address) -> str | None:
    """Why a wildcard must not reach this address, as a short phrase; None if it may."""
    if address in _METADATA:
        return "a metadata service"
    for network, reason in _GUARDED:
        if address.version == network.version and address in network:
            return reason
    inner = embedded_ipv4(address)
    return None if inner is None else guarded(inner)


def embedded_ipv4(address: Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for: mapped, translated, 6to4, Teredo or IPv4-compatible."""
    if isinstance(address, IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.teredo is not None:
        return address.teredo[1]
    for network, shift in _TRANSLATED:
        if address in network and int(address) > 1:
            return IPv4Address((int(address) >> shift) & 0xFFFF_FFFF)
    return None
