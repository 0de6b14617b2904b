"""Host names and authorities as a sandbox writes them, brought into the one form that is judged and dialled.

A name that two programs could read differently is refused here, before any rule sees it.
"""

from __future__ import annotations

import functools
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

Address = IPv4Address | IPv6Address

MAX_NAME_CHARACTERS: Final = 253

_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_NUMERIC_LABEL: Final = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)")
_PORT: Final = re.compile(r"[0-9]{1,5}")


class HostError(ValueError):
    """Not a host as we accept it. The text is safe to show."""


@functools.lru_cache(maxsize=4096)
def canonical_host(text: str) -> str:
    """The form in which a host is compared with rules: lower case, no final dot, addresses as their usual literal.

    IPv6 literals may stand in brackets and come out without. Numbers that the C library's resolver takes for IPv4
    addresses (`0x7f.1`, `2130706433`) come out as dotted quads, an IPv4-mapped address as the IPv4 address in it.
    Raises `HostError`.
    """
    host = text.lower()
    if host.startswith("[") and host.endswith("]"):
        address = parse_address(host[1:-1])
        if not isinstance(address, IPv6Address):
            raise HostError("the brackets do not hold an IPv6 address")
        return _literal(address)
    address = parse_address(host)
    if address is not None:
        return _literal(address)
    host = host.removesuffix(".")
    if len(host) > MAX_NAME_CHARACTERS or _NAME.fullmatch(host) is None:
        raise HostError("it is not a host name")
    # What ends in a number is an address or nothing (WHATWG URL, 3.5): the C library reads 1, 2 or 3 parts as well.
    if _NUMERIC_LABEL.fullmatch(host.rsplit(".", 1)[-1]):
        return _legacy_ipv4(host)
    return host


def parse_address(text: str) -> Address | None:
    """The address that a literal without brackets means; None for anything else, scoped ones (`%eth0`) included."""
    if "%" in text:
        return None
    try:
        return ip_address(text)
    except ValueError:
        return None


@functools.lru_cache(maxsize=4096)
def split_authority(text: str) -> tuple[str, int | None]:
    """Splits `host[:port]` of a Host field or `:authority` (RFC 9110, 7.2). The host is canonical.

    Raises `HostError`; also on user information, which some readers drop and others take for the host.
    """
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        host += bracket
    else:
        host, colon, port = text.partition(":")
        rest = colon + port
    if rest in ("", ":"):
        return canonical_host(host), None
    if not rest.startswith(":") or _PORT.fullmatch(rest[1:]) is None or not 1 <= int(rest[1:]) <= 65535:
        raise HostError("the port is not a number between 1 and 65535")
    return canonical_host(host), int(rest[1:])


def joined(host: str, port: int) -> str:
    """`host:port`, an IPv6 literal in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _literal(address: Address) -> str:
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def _legacy_ipv4(host: str) -> str:
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        raise HostError("it ends in a number and is not an address") from None
