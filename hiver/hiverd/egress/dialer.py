"""Dialling out: a name is resolved here, each address is judged, and exactly a judged one is connected to."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import IPv4Address, ip_address
from typing import Final, TypeVar

from hiverd.egress.addresses import guarded
from hiverd.egress.names import Address, parse_address
from hiverd.egress.netlink import is_local
from hiverd.egress.own_api import OwnApi
from hiverd.egress.stream import Stream
from hiverd.egress.upstream_tls import tls_cause
from hiverd.http.connection import Connection

DIAL_SECONDS: Final = 10.0
"""For resolving and connecting together (PROTOCOL 5.4)."""
KEEPALIVE_SECONDS: Final = 30
"""Between two signs of life from an upstream; nine are let pass (tcp(7))."""
_T = TypeVar("_T")

Judge = Callable[[Address], bool]
"""Whether the sandbox's rules let this resolved address be dialled."""


class DialError(Exception):
    """The upstream could not be reached. The text is safe to show: where a rule leads is not in it (PROTOCOL 5.5)."""


class ForbiddenAddressError(Exception):
    """The name leads only to addresses that the rule does not reach. The text is safe to show."""


class Dialer:
    """One for all sandboxes."""

    def __init__(self, own_api: OwnApi, contexts: Mapping[str, ssl.SSLContext]) -> None:
        """`own_api`: where this server listens. `contexts`: by ALPN protocol, for TLS."""
        self.own_api = own_api
        self._contexts = contexts

    async def socket_to(
        self, host: str, port: int, *, exact: bool, judge: Judge, hosts: Mapping[str, str]
    ) -> socket.socket:
        """A connected socket. `exact`: the rule names the host, so it may be a guarded address (PROTOCOL 0.2).
        `hosts`: names with addresses of their own. Raises `DialError`, `ForbiddenAddressError`."""
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                addresses = await self._addresses(hosts.get(host, host), port)
                allowed = self._allowed(addresses, port, exact=exact, judge=judge)
                return await self._first(allowed, port)
        except TimeoutError as error:
            raise DialError("the upstream does not answer") from error
        except OSError as error:  # no descriptor is left, for instance
            raise DialError(f"the upstream cannot be connected to: {_reason(error)}") from error

    async def secure(self, sock: socket.socket, host: str, connection: Connection) -> None:
        """TLS on a fresh socket, then HTTP/1.1 on it through `connection`. Raises `DialError`."""
        loop = asyncio.get_running_loop()
        await _secured(
            host,
            loop.create_connection(lambda: connection, sock=sock, ssl=self.context("http/1.1"), server_hostname=host),
        )

    async def stream_to(self, sock: socket.socket, host: str) -> Stream:
        """TLS on a fresh socket, then bytes as they are. Raises `DialError`."""
        return await _secured(host, Stream.to(sock, self.context("http/1.1"), host))

    async def http2_to(self, sock: socket.socket, host: str) -> Stream:
        """TLS on a fresh socket, then HTTP/2. Owns the socket. Raises `DialError`, also if that is not spoken."""
        try:
            stream = await _secured(host, Stream.to(sock, self.context("h2"), host))
        except BaseException:
            sock.close()
            raise
        if stream.protocol != "h2":
            stream.abort()
            raise DialError(f"{host} does not speak HTTP/2, which gRPC needs")
        return stream

    def context(self, protocol: str) -> ssl.SSLContext:
        """How to speak TLS with upstreams, offering that protocol."""
        return self._contexts[protocol]

    async def _addresses(self, host: str, port: int) -> list[Address]:
        literal = parse_address(host)
        if literal is not None:
            return [_plain(literal)]
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise DialError("the upstream's name does not resolve") from error
        return [_plain(ip_address(str(entry[4][0]).partition("%")[0])) for entry in found]

    def _allowed(self, addresses: Sequence[Address], port: int, *, exact: bool, judge: Judge) -> list[Address]:
        allowed: list[Address] = []
        reason = "its address is denied"
        for address in dict.fromkeys(addresses):
            why = None if exact else guarded(address) or self._own(address, port)
            if why is not None:
                reason = f"it is {why}"
            elif judge(address):
                allowed.append(address)
        if not allowed:
            raise ForbiddenAddressError(reason)
        return allowed

    def _own(self, address: Address, port: int) -> str | None:
        if port == self.own_api.port and is_local(address):
            return "this server itself"
        return None

    async def _first(self, addresses: Sequence[Address], port: int) -> socket.socket:
        refused: OSError | None = None
        for address in addresses:
            sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # There is no limit on how long an answer may take, so an upstream that vanished must show.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS)
                await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
            except OSError as error:
                sock.close()
                refused = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise DialError(f"the upstream cannot be connected to: {_reason(refused)}")


def _reason(error: OSError | None) -> str:
    """Without the address, which the event loop puts into its own message."""
    return os.strerror(error.errno) if error is not None and error.errno else "no address"


async def _secured(host: str, handshake: Awaitable[_T]) -> _T:
    """Awaits a handshake, and tells why it failed."""
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            return await handshake
    except TimeoutError as error:
        raise DialError(f"{host} does not finish the TLS handshake") from error
    except ssl.SSLError as error:
        raise DialError(f"cannot trust {host}: {tls_cause(error)}") from error
    except (OSError, ssl.CertificateError) as error:
        raise DialError(f"{host} broke off the TLS handshake") from error


def _plain(address: Address) -> Address:
    """A mapped IPv6 address is the IPv4 address in it: the kernel dials that."""
    return address if isinstance(address, IPv4Address) else address.ipv4_mapped or address
