"""Hosts: one form for each, refusal of what could be read in two ways."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress.addresses import embedded_ipv4, guarded
from hiverd.egress.names import HostError, canonical_host, joined, parse_address, split_authority


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org"),
        ("a_b.example", "a_b.example"),
        ("localhost", "localhost"),
        ("1.2.3.4", "1.2.3.4"),
        ("0x7f.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[0:0::0:1]", "::1"),
        ("[::ffff:127.0.0.1]", "127.0.0.1"),
        ("::ffff:7f00:1", "127.0.0.1"),
    ],
)
def test_a_host_has_one_form(written: str, canonical: str) -> None:
    assert canonical_host(written) == canonical
    assert canonical_host(joined(canonical, 80).rsplit(":", 1)[0]) == canonical


@pytest.mark.parametrize(
    "written",
    ["", ".", "a..b", "a b", "a/b", "user@host", "a\x00b", "é.org", "[1.2.3.4]", "[::1", "fe80::1%eth0", "a" * 64,
     "1.2.3.4.5", "256.1.1.1.", "0x", "-a.org", "a.org..", "*.org", "evil.org\r\nx", "a.999999999999"],
)  # fmt: skip
def test_an_unclear_host_is_refused(written: str) -> None:
    with pytest.raises(HostError):
        canonical_host(written)


@pytest.mark.parametrize(
    ("written", "host", "port"),
    [("a.org", "a.org", None), ("a.org:8080", "a.org", 8080), ("a.org:", "a.org", None), ("[::1]:443", "::1", 443)],
)
def test_an_authority_is_split(written: str, host: str, port: int | None) -> None:
    assert split_authority(written) == (host, port)


@pytest.mark.parametrize(
    "written",
    ["a:b@c.org", "u@c.org:80", "a.org:0", "a.org:65536", "a.org:+80", "a.org: 80", "::1:80", "[::1]x", "a.org:80:80",
     "a.org,b.org"],
)  # fmt: skip
def test_an_unclear_authority_is_refused(written: str) -> None:
    with pytest.raises(HostError):
        split_authority(written)


@given(st.text(max_size=60))
def test_any_text_is_a_canonical_host_or_refused(text: str) -> None:
    try:
        host = canonical_host(text)
    except HostError:
        return
    assert canonical_host(host) == host
    assert host == host.lower()


@pytest.mark.parametrize(
    "literal",
    ["127.0.0.1", "127.255.0.9", "::1", "169.254.169.254", "fe80::1", "0.0.0.0", "0.1.2.3", "::", "224.0.0.1",
     "ff02::1", "255.255.255.255", "240.0.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254",
     "fd20:ce::254",
     "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
     "2002:a9fe:a9fe::1", "::127.0.0.1", "64:ff9b:1::7f00:1", "fec0::1", "11.0.0.1", "11.0.0.3"],
)  # fmt: skip
def test_a_wildcard_does_not_reach(literal: str) -> None:
    assert guarded(ip_address(literal))


@pytest.mark.parametrize(
    "literal", ["1.1.1.1", "93.184.216.34", "10.0.0.1", "192.168.1.1", "172.16.0.1", "2606:4700::1111", "fd12::1",
                "64:ff9b::101:101", "2002:101:101::1", "11.0.0.8"]
)  # fmt: skip
def test_a_wildcard_reaches(literal: str) -> None:
    assert guarded(ip_address(literal)) is None


@given(st.ip_addresses(v=6))
def test_an_embedded_address_is_guarded_as_itself(address: object) -> None:
    parsed = parse_address(str(address))
    assert parsed is not None
    inner = embedded_ipv4(parsed)
    if inner is not None and guarded(inner) is not None:
        assert guarded(parsed) is not None
