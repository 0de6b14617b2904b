"""Hosts and addresses: whatever the C library or the kernel would take a text for is what is judged."""

from __future__ import annotations

import contextlib
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress.addresses import embedded_ipv4, guarded
from hiverd.egress.names import HostError, canonical_host, split_authority

PARTS = st.sampled_from(
    ["127", "0x7f", "0177", "1", "0", "256", "0x", "0xffffff", "4294967295", "08", "a", "", "-1", "²"]
)
numbers = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@given(numbers)
def test_what_the_resolver_takes_for_an_address_is_canonical_or_refused(text: str) -> None:
    try:
        host = canonical_host(text)
    except HostError:
        return
    try:
        expected = socket.inet_ntoa(socket.inet_aton(text.removesuffix(".")))
    except (OSError, UnicodeError):
        with pytest.raises(ValueError, match="does not appear"):
            ip_address(host)
    else:
        assert host == expected


@given(st.one_of(st.text(max_size=40), st.text("ab.:[]%@/-_0x1\0 ", max_size=20)))
def test_a_canonical_host_is_its_own_canonical_form_and_harmless(text: str) -> None:
    with contextlib.suppress(HostError):
        host = canonical_host(text)
        assert canonical_host(host) == host
        assert host.isascii()
        assert not set(host) & set(" \0/@%?#\\\r\n[]")


@given(st.one_of(st.text(max_size=40), st.text("ab.:[]%@0123456789", max_size=20)))
def test_an_authority_has_one_host_and_one_port(text: str) -> None:
    with contextlib.suppress(HostError):
        host, port = split_authority(text)
        assert canonical_host(host) == host
        assert port is None or 1 <= port <= 65535
        assert "@" not in text


IPV4 = st.integers(0, 2**32 - 1).map(IPv4Address)
GUARDED = ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "11.0.0.3", "100.100.100.200"]


@given(st.one_of(st.sampled_from(GUARDED).map(IPv4Address), IPV4), st.integers(0, 2**16 - 1))
def test_an_address_within_an_address_is_guarded_as_itself(inner: IPv4Address, low: int) -> None:
    number = int(inner)
    forms = [
        IPv6Address(0xFFFF << 32 | number),
        IPv6Address(0x64FF9B << 96 | number),
        IPv6Address(0x2002 << 112 | number << 80 | low),
        IPv6Address(0x20010000 << 96 | low << 32 | number ^ 0xFFFFFFFF),
    ]
    for form in forms:
        assert embedded_ipv4(form) == inner
        if guarded(inner) is not None:
            assert guarded(form) is not None, form


@given(st.one_of(IPV4, st.integers(0, 2**128 - 1).map(IPv6Address)))
def test_what_the_standard_library_knows_as_this_host_is_guarded(address: IPv4Address | IPv6Address) -> None:
    if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
        assert guarded(address) is not None
